"""Sample volumes from a stage, and hand its outputs to the next.

Shapes: B batch, N cube edge, n edge of the previous stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from app.config import Config
from app.data.cases import Case, CaseStore
from app.errors import Stopped
from app.model.denoiser import StageModel
from app.model.diffusion import sample
from app.physics.attenuation import x_to_hu
from app.train.parallel import ALONE, Ranks
from app.train.protocols import Stop
from app.train.randomness import volume_noise
from app.train.samples import LowresFolder, StageCases, batches
from app.workspace import atomic_file

log = logging.getLogger(__name__)

HAND_OVER_CHUNK = 4
"""Cases per forward pass at the hand-over; fixed, so that an interrupted hand-over gives the same bits."""


@torch.no_grad()
def reconstruct(
    model: StageModel,
    xrays: Tensor,
    lowres: Tensor | None,
    noise: Tensor,
    stop: Stop,
    views: Tensor | None = None,
    steps: int | None = None,
    relaxation: float = 1.0,
    seen: Tensor | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """One volume per pair of radiographs.

    Args:
        model: a stage, with EMA weights, in eval mode.
        xrays: (B, 2, N, N) line integrals.
        lowres: (B, 1, n, n, n) the previous stage's output in [-1, 1]; None for the first stage.
        noise: (B, 1, N, N, N) standard normal.
        stop: polled before each sampler step.
        views: (B, 2), 1 where a view may be used; None is both.
        steps: of the sampler; None is the config's.
        relaxation: step length of the SART sweeps; below 1 for radiographs that fit the geometry badly.
        seen: (B, 2, N, N) what the network alone sees in place of `xrays`, while c and the sweeps stay right.
        after_step: called after each sampler step.

    Returns:
        (B, 1, N, N, N) in [-1, 1].

    Raises:
        Stopped: `stop` asked for it.
    """
    shown = xrays.new_ones(xrays.shape[:2]) if views is None else views
    condition = model.condition(xrays, shown, lowres, seen=seen)

    def denoise(x_t: Tensor, level: Tensor) -> Tensor:
        if stop():
            raise Stopped("stopped while sampling")
        x_0: Tensor = model(x_t, level, condition)
        return x_0.clamp(-1.0, 1.0)

    def correct(x_0: Tensor) -> Tensor:
        corrected = model.data_consistent(x_0, xrays, shown, model.stage.sart_sweeps, relaxation)
        after_step()
        return corrected

    return sample(denoise, noise, steps or model.stage.sampler_steps, model.diffusion, correct)


def hand_over(
    parent: StageModel,
    store: CaseStore,
    cases: Sequence[Case],
    parent_lowres: LowresFolder | None,
    target: LowresFolder,
    config: Config,
    stop: Stop,
    ranks: Ranks = ALONE,
) -> None:
    """Write the parent's output for every case into `target`; whole chunks that are there already are kept.

    The first machine's processes share the chunks; all of them are written when this returns.

    Raises:
        Stopped: `stop` asked for it, in this process or in another one of the run; finished chunks stay.
    """
    stage, window, device = parent.stage, config.data.hu_window, parent.mean.device
    chunks = [cases[start : start + HAND_OVER_CHUNK] for start in range(0, len(cases), HAND_OVER_CHUNK)]
    # As the first process sees it: while this one looks, others may have begun to write.
    missing = ranks.first(lambda: [chunk for chunk in chunks if not all(target.holds(case) for case in chunk)])
    if not missing:
        return
    if ranks.node == 0:
        target.folder.mkdir(parents=True, exist_ok=True)
    for case in (case for chunk in missing for case in chunk):
        if target.path(case).exists() and not target.holds(case):
            log.warning("%s: damaged; it is made again", target.path(case))
    log.info("hand-over: %s makes the low-resolution volumes of %d cases", stage.name, sum(map(len, missing)))

    def make(chunk: Sequence[Case]) -> None:
        dataset = StageCases(store, chunk, stage.resolution, parent_lowres)
        batch = next(batches(dataset, [range(len(chunk))], device, window))
        noise = torch.stack(
            [
                volume_noise(batch.x_0.shape[1:], device, config.seed, stage.name, "hand-over", case.content)
                for case in chunk
            ]
        )
        volumes = x_to_hu(reconstruct(parent, batch.xrays, batch.lowres, noise, stop), window)
        for case, volume in zip(chunk, volumes.round().cpu().numpy()[:, 0].astype(np.int16), strict=True):
            with atomic_file(target.path(case)) as file:
                np.save(file, volume)

    def make_mine() -> None:
        silent = None if ranks.is_first else True
        for chunk in tqdm(ranks.written(missing), desc=f"hand-over of {stage.name}", unit="chunk", disable=silent):
            make(chunk)

    ranks.everyone(make_mine)
