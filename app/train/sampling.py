"""Volumes from radiographs by a whole trained cascade, stage by stage, one model in memory at a time.

Shapes: N cube edge of a stage, F of the config's finest stage; one patient, no batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from app.data.build import clip_hu
from app.data.pooling import pool
from app.physics.attenuation import hu_to_mu, x_to_hu, x_to_mu
from app.physics.geometry import geometry_from_config
from app.physics.projector import Projector
from app.train.inference import TrainedCascade, TrainedStage
from app.train.precision import Precision
from app.train.protocols import Stop
from app.train.randomness import volume_noise
from app.train.reconstruct import reconstruct

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SamplerOptions:
    """How the cascade is sampled."""

    seed: int
    steps: int | None
    """Of every stage's sampler; None are the config's."""
    relaxation: float
    """Of the SART sweeps between the steps."""
    samples: int
    """How many volumes are averaged."""


@dataclass(frozen=True)
class SampledVolume:
    """What the last stage made, and the radiographs that it should project to."""

    stage: str
    hu: NDArray[np.int16]
    """(N, N, N) in the window of the config."""
    xrays: Floats
    """(2, N, N) line integrals that were given."""
    drr: Floats
    """(2, N, N) line integrals of `hu`."""


def mean_projection(cascade: TrainedCascade) -> Floats:
    """Line integrals (2, N, N) of the first stage's training mean, by its own projector."""
    first, config = cascade.stages[0], cascade.config
    projector = Projector(geometry_from_config(config), first.stage.resolution)
    with torch.no_grad():
        projected: Floats = projector(x_to_mu(first.weights["mean"].float(), config.data.hu_window))[0].numpy()
    return projected


def sample_cascade(
    cascade: TrainedCascade,
    xrays: Floats,
    views: Sequence[bool],
    options: SamplerOptions,
    precision: Precision,
    stop: Stop,
) -> SampledVolume:
    """Sample every stage on the output of the one before.

    Args:
        cascade: the stages to sample, coarse to fine.
        xrays: (2, F, F) line integrals; a hidden view's values do not matter.
        views: which of the two are shown.
        options: of the sampler.
        precision: arithmetic and device.
        stop: polled before each sampler step.

    Raises:
        CheckpointError: weights that do not fit the config.
        Stopped: `stop` asked for it.
    """
    device, window = precision.device, cascade.config.data.hu_window
    steps = [options.steps or trained.stage.sampler_steps for trained in cascade.stages]
    shown = torch.tensor([list(views)], dtype=torch.float32, device=device)
    lowres: list[Tensor] = []
    with tqdm(total=options.samples * sum(steps), unit="step", disable=None) as bar:

        def advance() -> None:
            bar.update()

        for trained in cascade.stages:
            bar.set_description(trained.stage.name)
            pooled = pool(xrays, xrays.shape[-1] // trained.stage.resolution, 2)
            lowres = _stage_samples(cascade, trained, pooled, shown, lowres, options, precision, stop, advance)
    mean = torch.stack(lowres).mean(0) if len(lowres) > 1 else lowres[0]
    hu = clip_hu(x_to_hu(mean, window).numpy()[0, 0], window)
    return SampledVolume(trained.stage.name, hu, pooled, _project(cascade, hu, device))


def _stage_samples(
    cascade: TrainedCascade,
    trained: TrainedStage,
    xrays: Floats,
    shown: Tensor,
    lowres: Sequence[Tensor],
    options: SamplerOptions,
    precision: Precision,
    stop: Stop,
    after_step: Callable[[], None],
) -> list[Tensor]:
    """One volume (1, 1, N, N, N) on the CPU for each sample of the stage before, or `options.samples` of them."""
    device, edge = precision.device, trained.stage.resolution
    model = cascade.build(trained, device)
    measured = torch.from_numpy(xrays)[None].to(device)
    volumes = []
    for index in range(options.samples):
        # Drawn on the CPU, so that a seed is the same noise on every device.
        noise = volume_noise(
            (1, 1, edge, edge, edge), torch.device("cpu"), options.seed, trained.stage.name, "sample", index
        )
        given = lowres[index].to(device) if lowres else None
        with precision.autocast():
            volume = reconstruct(
                model, measured, given, noise.to(device), stop, shown, options.steps, options.relaxation,
                after_step=after_step,
            )  # fmt: skip
        volumes.append(volume.float().cpu())
    return volumes


def _project(cascade: TrainedCascade, hu: NDArray[np.int16], device: torch.device) -> Floats:
    projector = Projector(geometry_from_config(cascade.config), hu.shape[0]).to(device)
    with torch.no_grad():
        mu = hu_to_mu(torch.from_numpy(hu).to(device).float())
        projected: Floats = projector(mu[None, None])[0].cpu().numpy()
    return projected
