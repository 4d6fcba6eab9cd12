"""Validation at the end of an epoch: fixed cases, fixed noise, EMA weights, so that epochs compare.

Shapes: B batch, K noise levels, N cube edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.config import Config
from app.data.cases import Case
from app.errors import Stopped
from app.model.denoiser import StageModel
from app.model.diffusion import log_snr
from app.physics.attenuation import x_to_hu, x_to_mu
from app.train.loss import sample_losses
from app.train.metrics import projection_error_percent, psnr_db
from app.train.parallel import ALONE, Ranks, interleaved
from app.train.protocols import CasePicture, Stop
from app.train.randomness import volume_noise
from app.train.reconstruct import reconstruct
from app.train.samples import Batch, StageCases, batches

CHUNK = 4
"""Cases per forward pass; fixed, so that the figures do not depend on the micro-batch."""


@dataclass(frozen=True)
class Validation:
    """Mean losses over cases and noise levels, and what was sampled."""

    diffusion: float
    physics: float
    sampled: SampledFigures
    pictures: tuple[CasePicture, ...]


@dataclass(frozen=True)
class SampledFigures:
    """Means over sampled cases; what says whether a network has learned anything."""

    psnr_db: float
    """Against the truth, data range 2500 HU for the default window."""
    gain_over_c_db: float
    """PSNR of the sampled volumes less that of the conditioning volume; what the sampler's sweeps add is in it."""
    xray_use_db: float
    """PSNR lost when only the network's X-rays are another patient's, its conditioning volume being right."""
    projection_error_percent: float
    """|P mu - p| / |p|."""


NOT_SAMPLED = SampledFigures(math.nan, math.nan, math.nan, math.nan)


@torch.no_grad()
def validate(
    model: StageModel,
    cases: StageCases,
    others: StageCases,
    config: Config,
    pictures: int,
    stop: Stop,
    ranks: Ranks = ALONE,
) -> Validation:
    """Losses of `model` on the first `validation.cases` held-out cases, and samples of the first few.

    `others` lends another patient's X-rays where only one patient is held out. Several processes share the chunks,
    whose make-up is fixed, and put them together in order: the losses are those of one process, bit for bit. Only the
    first process samples; the pictures and their figures are its own.

    Raises:
        Stopped: `stop` asked for it, in this process or in another one of the run; nothing was changed.
    """
    device = model.mean.device
    count = min(config.validation.cases, len(cases))
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    mine = ranks.mine(chunks)

    def losses() -> list[Tensor]:
        loaded = batches(cases, mine, device, config.data.hu_window)
        return [
            _losses_at_levels(model, [cases.cases[i] for i in chunk], batch, config, stop).cpu()
            for chunk, batch in zip(mine, loaded, strict=True)
        ]

    terms = torch.cat(interleaved(ranks.gather(ranks.everyone(losses))), dim=1).to(device)
    diffusion, physics = (term.double().mean().item() for term in terms)
    sampled, drawn = ranks.everyone(
        lambda: _sample(model, cases, others, config, pictures, stop) if ranks.is_first else (NOT_SAMPLED, ())
    )
    return Validation(diffusion, physics, sampled, drawn)


def _losses_at_levels(model: StageModel, cases: Sequence[Case], batch: Batch, config: Config, stop: Stop) -> Tensor:
    """(2, K B): diffusion and physics losses."""
    condition = model.condition(batch.xrays, torch.ones_like(batch.xrays[:, :, 0, 0]), batch.lowres)
    diffusion, physics = [], []
    for level in range(config.validation.noise_levels):
        if stop():
            raise Stopped("stopped in validation")
        t = torch.tensor((level + 0.5) / config.validation.noise_levels, device=batch.x_0.device)
        snr = log_snr(t, batch.x_0.shape[-1], config.diffusion).expand(len(cases))
        noise = _noise(batch.x_0, cases, config, model.stage.name, f"validation {level}")
        losses = sample_losses(model, batch.x_0, noise, snr, condition, batch.xrays)
        diffusion.append(losses.diffusion)
        physics.append(losses.physics)
    return torch.stack([torch.cat(diffusion), torch.cat(physics)])


def _sample(
    model: StageModel, cases: StageCases, others: StageCases, config: Config, pictures: int, stop: Stop
) -> tuple[SampledFigures, tuple[CasePicture, ...]]:
    window, sampling = config.data.hu_window, config.validation
    count = min(max(sampling.sampled_cases, pictures), len(cases))
    figures, drawn = [], []
    for start in range(0, count, CHUNK):
        indices = range(start, min(start + CHUNK, count))
        batch = next(batches(cases, [indices], model.mean.device, window))
        shown = torch.ones_like(batch.xrays[:, :, 0, 0])
        own = cases.cases[indices.start : indices.stop]
        noise = _noise(batch.x_0, own, config, model.stage.name, "pictures")
        wrong = torch.stack([another_patients_xrays(cases, i, others) for i in indices]).to(batch.xrays)

        def reconstructed(
            seen: Tensor | None, batch: Batch = batch, noise: Tensor = noise, steps: int = sampling.sampler_steps
        ) -> Tensor:
            return reconstruct(model, batch.xrays, batch.lowres, noise, stop, steps=steps, seen=seen)

        predicted = reconstructed(None)
        given = model.condition(batch.xrays, shown, batch.lowres).volume
        drr = model.projector(x_to_mu(predicted, window))
        psnr = psnr_db(predicted, batch.x_0, 2.0)
        gain = psnr - psnr_db(given, batch.x_0, 2.0)
        use = psnr - psnr_db(reconstructed(wrong), batch.x_0, 2.0)
        figures.append(torch.stack([psnr, gain, use, projection_error_percent(drr, batch.xrays)]).double().cpu())
        volumes = [x_to_hu(volume, window).float().cpu().numpy()[:, 0] for volume in (batch.x_0, predicted, given)]
        xrays, drrs = batch.xrays.cpu().numpy(), drr.cpu().numpy()
        drawn += [
            CasePicture(own[i].id, volumes[0][i], volumes[1][i], volumes[2][i], xrays[i], drrs[i])
            for i in range(len(own))
            if start + i < pictures
        ]
    return SampledFigures(*torch.cat(figures, dim=1).mean(1).tolist()), tuple(drawn)


def another_patients_xrays(cases: StageCases, index: int, others: StageCases) -> Tensor:
    """(2, N, N) line integrals of the next case of another patient, in `cases`, else in `others`."""
    patient = cases.cases[index].patient
    following = [*range(index + 1, len(cases)), *range(index)]
    found = next(((cases, i) for i in following if cases.cases[i].patient != patient), None)
    source, i = found or (others, next(i for i, case in enumerate(others.cases) if case.patient != patient))
    return source[i]["xrays"]


def _noise(x_0: Tensor, cases: Sequence[Case], config: Config, stage: str, purpose: str) -> Tensor:
    shape, device = x_0.shape[1:], x_0.device
    return torch.stack([volume_noise(shape, device, config.seed, stage, purpose, case.content) for case in cases])
