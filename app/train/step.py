"""One optimizer step: the samples' draws, the losses in micro-batches, the update of weights and EMA.

Shapes: B batch, b micro-batch, N cube edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import NumericsError, Stopped
from app.model.diffusion import log_snr
from app.train.augment import augment
from app.train.loss import SampleLosses, sample_losses
from app.train.micro_batch import MicroBatchTooLarge, memory_errors
from app.train.parallel import ALONE, Ranks
from app.train.precision import without_determinism
from app.train.protocols import Stop
from app.train.randomness import StepDraws, step_draws, volume_noise
from app.train.samples import Batch
from app.train.schedule import ema_decay, learning_rate
from app.train.state import StageState


@dataclass(frozen=True)
class StepValues:
    """One completed optimizer step, for the curves."""

    diffusion: float
    physics: float
    gradient_norm: float


def train_step(
    state: StageState, loader: Iterator[Batch], weight: float, stop: Stop, ranks: Ranks = ALONE
) -> StepValues:
    """One optimizer update from `batch` samples, in micro-batches; the weights move in the last lines or not at all.

    Raises:
        Stopped: asked to stop between two micro-batches, in this process or in another one of the run.
        NumericsError: the loss or the gradient is not finite.
        MicroBatchTooLarge: the memory did not hold a micro-batch, in this process or in another one of the run.
    """
    config, stage, step = state.config, state.stage, state.progress.step + 1
    draws = step_draws(stage.batch, config.diffusion, state.model.mean.device, config.seed, stage.name, step)
    mine = ranks.samples(stage.batch)
    micro_batches = [next(loader)]
    while sum(len(batch.x_0) for batch in micro_batches) < len(mine):
        micro_batches.append(next(loader))
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, stage, config.optimizer)

    while True:
        mean, stopped, too_large = _accumulate(state, micro_batches, draws, mine.start, weight, stop)
        # Nobody leaves before the others know: they would wait for the gradients of a process that is gone.
        mean, (stopped, too_large) = ranks.reduce_step(state.model, mean, stopped, too_large)
        if stopped:
            raise Stopped("stopped in training")
        if too_large:
            state.optimizer.zero_grad(set_to_none=True)
            raise MicroBatchTooLarge
        state.precision.unscale(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.ema.weights, config.optimizer.gradient_clip)
        values = StepValues(*torch.cat([mean, norm[None]]).tolist())
        if not math.isfinite(values.diffusion + values.physics):
            raise NumericsError(_not_finite(state, step, values))
        if not state.precision.overflowed(values.gradient_norm):
            break
    if not math.isfinite(values.gradient_norm):
        raise NumericsError(_not_finite(state, step, values))

    state.precision.step(state.optimizer)
    state.ema.update(ema_decay(step, stage.ema_decay))
    return values


def _accumulate(
    state: StageState, micro_batches: Sequence[Batch], draws: StepDraws, start: int, weight: float, stop: Stop
) -> tuple[Tensor, bool, bool]:
    """Gradients of this process's samples, from number `start` of the whole batch on.

    Returns the mean diffusion and physics loss (2,); whether it was asked to stop, and whether memory ran out: with
    either one the losses are zeros and the gradients a part of what they should be.
    """
    nothing = torch.zeros(2, device=state.model.mean.device)
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        terms = []
        try:
            for index, batch in enumerate(micro_batches):
                if stop():
                    return nothing, True, False
                with memory_errors():
                    losses = _losses(state, batch, draws, start + index * len(batch.x_0))
                    terms.append(_backward(state, losses, weight, len(micro_batches)))
        except torch.OutOfMemoryError:
            return nothing, False, True
        except RuntimeError as error:
            if not without_determinism(error):
                raise
            continue
        return torch.stack(terms).mean(0), False, False


def _backward(state: StageState, losses: SampleLosses, weight: float, micro_batches: int) -> Tensor:
    """Add the gradients of one micro-batch of so many; its diffusion and physics loss, (2,)."""
    diffusion, physics = losses.diffusion.mean(), losses.physics.mean()
    state.precision.backward((diffusion + weight * physics) / micro_batches)
    return torch.stack([diffusion.detach(), physics.detach()])


def _losses(state: StageState, batch: Batch, draws: StepDraws, start: int) -> SampleLosses:
    """Losses of one micro-batch, whose first sample is number `start` of the whole batch."""
    config, stage, model = state.config, state.stage, state.model
    device, count, step = batch.x_0.device, len(batch.x_0), state.progress.step + 1
    mine = draws[start : start + count]
    names = [(config.seed, stage.name, step, index) for index in range(start, start + count)]
    batch, xrays = augment(batch, model, config, names)
    noise = torch.stack([volume_noise(batch.x_0.shape[1:], device, *name, "noise") for name in names])
    lowres = noise_level = lowres_noise = None
    truth = batch.lowres_truth()
    if truth is not None and batch.lowres is not None:
        real = mine.real_lowres[:, None, None, None, None]
        lowres = torch.where(real > 0, batch.lowres, truth)
        noise_level = mine.noise_level
        lowres_noise = torch.stack([volume_noise(truth.shape[1:], device, *name, "lowres") for name in names])
    snr = log_snr(mine.t, stage.resolution, config.diffusion)
    with state.precision.autocast():
        condition = model.condition(xrays, mine.views, lowres, noise_level, lowres_noise)
        return sample_losses(model, batch.x_0, noise, snr, condition, batch.xrays)


def _not_finite(state: StageState, step: int, values: StepValues) -> str:
    return (
        f"{state.stage.name} step {step} is not finite: diffusion loss {values.diffusion}, physics {values.physics}, "
        f"gradient norm {values.gradient_norm}. No weight has moved; the checkpoints hold the state before this step. "
        "Lower the stage's learning_rate or use compute.precision fp32 in a new run"
    )
