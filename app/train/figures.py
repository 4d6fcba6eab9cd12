"""What a trained stage is worth on cases: figures of its volumes beside those of every baseline (DESIGN 5.5).

Shapes: B batch, N cube edge. Volumes (B, 1, N, N, N) in [-1, 1].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.data.cases import Case
from app.model.denoiser import StageModel
from app.model.diffusion import add_noise, log_snr
from app.physics.attenuation import x_to_hu, x_to_mu
from app.train.metrics import SSIM_RADIUS, mae_hu, projection_error_percent, psnr_db, ssim, x2ct_psnr_db
from app.train.protocols import CasePicture, Stop
from app.train.randomness import volume_noise
from app.train.reconstruct import reconstruct
from app.train.samples import Batch, StageCases, batches
from app.train.validation import another_patients_xrays

PREDICTION = "prediction"
SHUFFLED = "X-rays shuffled"
GIVEN = "c"
ZERO_NETWORK = "zero network"
MEAN = "mean volume"
AIR = "air"
SART_SWEEPS = 20
SART = f"SART-{SART_SWEEPS}"
METHODS = (AIR, MEAN, SART, GIVEN, ZERO_NETWORK, SHUFFLED, PREDICTION)
"""`zero network`: c with the sweeps that the sampler adds; `X-rays shuffled`: the network sees another patient's."""
METRICS = (
    "psnr_db",
    "x2ct_psnr_db",
    "ssim",
    "mae_all_hu",
    "mae_lung_hu",
    "mae_soft_hu",
    "mae_bone_hu",
    "projection_error_percent",
)
CURVE_STEPS = (1, 2, 4, 8, 16)
CURVE_LEVELS = 8
CURVE_CASES = 4


class KeptLowres:
    """A stage's outputs, in memory."""

    def __init__(self) -> None:
        self._volumes: dict[str, NDArray[np.int16]] = {}

    def keep(self, case: Case, volume: NDArray[np.int16]) -> None:
        """(n, n, n) int16 HU."""
        self._volumes[case.id] = volume

    def load(self, case: Case) -> NDArray[np.int16]:
        """(n, n, n) int16 HU."""
        return self._volumes[case.id]


@dataclass
class StageFigures:
    """The figures of a stage."""

    stage: str
    edge: int
    epoch: int
    """Completed epochs of the weights."""
    steps: int
    """Of the sampler."""
    samples: int
    """Averaged into one volume."""
    cases: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Case, method, metric."""
    by_steps: dict[int, float] = field(default_factory=dict)
    """PSNR in dB of the first cases against the steps of the sampler."""
    by_level: dict[float, tuple[float, float]] = field(default_factory=dict)
    """By log SNR: PSNR in dB of one evaluation of the network on a truth noised to it; the share of c's error left."""
    seconds_per_volume: float = math.nan

    def values(self, method: str, metric: str) -> list[float]:
        """One per case."""
        return [methods[method][metric] for methods in self.cases.values()]

    def differences(self, method: str, other: str) -> list[float]:
        """PSNR in dB of one method less that of another, one per case."""
        pairs = zip(self.values(method, "psnr_db"), self.values(other, "psnr_db"), strict=True)
        return [one - two for one, two in pairs]


@dataclass(frozen=True)
class Assessment:
    """How a stage is assessed."""

    seed: int
    steps: int
    samples: int
    pictures: int
    curves: bool
    stop: Stop
    after_step: Callable[[], None]


@torch.no_grad()
def assess_stage(
    model: StageModel,
    cases: StageCases,
    others: StageCases,
    mean: Tensor,
    how: Assessment,
    found: StageFigures,
    outputs: KeptLowres,
) -> list[CasePicture]:
    """Fill `found` with the figures of every case and `outputs` with one sample of each, for the stage after.

    Args:
        model: EMA weights, frozen.
        cases: with the real output of the previous stage as their low-resolution volumes.
        others: lends another patient's X-rays where `cases` has one patient alone.
        mean: (1, 1, N, N, N), the mean of the training cases.
        how: seed, steps and the like.
        found: of this stage, empty.
        outputs: empty.

    Returns:
        The first cases for people to look at.

    Raises:
        Stopped: `how.stop` asked for it.
    """
    device, window, pictures, seconds = model.mean.device, model.hu_window, [], 0.0
    for index, batch in enumerate(batches(cases, [[i] for i in range(len(cases))], device, window)):
        case = cases.cases[index]
        volumes, started = _baselines(model, batch, mean), time.monotonic()
        samples = [_sample(model, batch, case, how, number) for number in range(how.samples)]
        seconds += time.monotonic() - started
        volumes[PREDICTION] = torch.stack(samples).mean(0)
        seen = another_patients_xrays(cases, index, others).to(batch.xrays)[None]
        volumes[SHUFFLED] = _sample(model, batch, case, how, 0, seen)
        found.cases[case.id] = {method: figures(volumes[method], batch.x_0, model, batch.xrays) for method in METHODS}
        outputs.keep(case, x_to_hu(samples[0], window).round().cpu().numpy()[0, 0].astype(np.int16))
        if index < how.pictures:
            pictures.append(_picture(case, volumes, batch, model))
    found.seconds_per_volume = seconds / len(cases) / how.samples
    if how.curves:
        _curves(model, cases, how, found)
    return pictures


def figures(volume: Tensor, truth: Tensor, model: StageModel, xrays: Tensor) -> dict[str, float]:
    """Every metric of one volume (1, 1, N, N, N) in [-1, 1]; SSIM is nan where the cube is smaller than its window."""
    window = model.hu_window
    data_range = window[1] - window[0]
    volume_hu, truth_hu = x_to_hu(volume.float(), window), x_to_hu(truth, window)
    drr = model.projector(x_to_mu(volume.float(), window))
    large = truth.shape[-1] > 2 * SSIM_RADIUS
    return {
        "psnr_db": psnr_db(volume_hu, truth_hu, data_range).item(),
        "x2ct_psnr_db": x2ct_psnr_db(volume_hu, truth_hu).item(),
        "ssim": ssim(volume_hu, truth_hu, data_range).item() if large else math.nan,
        **{f"mae_{tissue}_hu": value.item() for tissue, value in mae_hu(volume_hu, truth_hu).items()},
        "projection_error_percent": projection_error_percent(drr, xrays).item(),
    }


def _baselines(model: StageModel, batch: Batch, mean: Tensor) -> dict[str, Tensor]:
    shown = torch.ones_like(batch.xrays[:, :, 0, 0])
    given = model.condition(batch.xrays, shown, batch.lowres).volume
    return {
        AIR: torch.full_like(mean, -1.0),
        MEAN: mean,
        SART: model.data_consistent(mean, batch.xrays, shown, SART_SWEEPS),
        GIVEN: given,
        # A sampler whose every prediction is c corrects the same volume in each step.
        ZERO_NETWORK: model.data_consistent(given.clamp(-1.0, 1.0), batch.xrays, shown, model.stage.sart_sweeps),
    }


def _sample(
    model: StageModel, batch: Batch, case: Case, how: Assessment, number: int, seen: Tensor | None = None
) -> Tensor:
    names = (how.seed, model.stage.name, "evaluation", number, case.content)
    noise = volume_noise(batch.x_0.shape[1:], batch.x_0.device, *names)[None]
    return reconstruct(
        model, batch.xrays, batch.lowres, noise, how.stop, steps=how.steps, seen=seen, after_step=how.after_step
    )


def _curves(model: StageModel, cases: StageCases, how: Assessment, found: StageFigures) -> None:
    """PSNR by steps and by noise level, on the first cases."""
    device, window, indices = model.mean.device, model.hu_window, range(min(CURVE_CASES, len(cases)))
    by_steps: dict[int, list[float]] = {steps: [] for steps in CURVE_STEPS}
    by_level: dict[float, list[tuple[float, float]]] = {}
    for index, batch in zip(indices, batches(cases, [[i] for i in indices], device, window), strict=True):
        case = cases.cases[index]
        names = (how.seed, model.stage.name, "evaluation", 0, case.content)
        noise = volume_noise(batch.x_0.shape[1:], device, *names)[None]
        for steps in CURVE_STEPS:
            volume = reconstruct(
                model, batch.xrays, batch.lowres, noise, how.stop, steps=steps, after_step=how.after_step
            )
            by_steps[steps].append(psnr_db(volume, batch.x_0, 2.0).item())
        condition = model.condition(batch.xrays, torch.ones_like(batch.xrays[:, :, 0, 0]), batch.lowres)
        of_c = (condition.volume - batch.x_0).square().mean()
        for level in range(CURVE_LEVELS):
            t = torch.tensor((level + 0.5) / CURVE_LEVELS, device=device)
            snr = log_snr(t, batch.x_0.shape[-1], model.diffusion)
            predicted = model(add_noise(batch.x_0, noise, snr[None]), snr[None], condition)
            left = ((predicted - batch.x_0).square().mean() / of_c).item()
            by_level.setdefault(round(snr.item(), 2), []).append((psnr_db(predicted, batch.x_0, 2.0).item(), left))
    found.by_steps = {steps: float(np.mean(values)) for steps, values in by_steps.items()}
    found.by_level = {snr: tuple(np.mean(values, axis=0).tolist()) for snr, values in by_level.items()}


def _picture(case: Case, volumes: Mapping[str, Tensor], batch: Batch, model: StageModel) -> CasePicture:
    window = model.hu_window
    drr = model.projector(x_to_mu(volumes[PREDICTION].float(), window))
    shown: Sequence[Tensor] = (batch.x_0, volumes[PREDICTION], volumes[GIVEN])
    truth, prediction, given = (x_to_hu(volume, window).float().cpu().numpy()[0, 0] for volume in shown)
    return CasePicture(
        f"{model.stage.name}, {case.id}",
        truth,
        prediction,
        given,
        batch.xrays.cpu().numpy()[0],
        drr.cpu().numpy()[0],
    )
