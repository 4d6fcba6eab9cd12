"""Learning rate by step, physics weight by epoch, EMA decay by step: pure functions of counters."""

from __future__ import annotations

import math

from app.config import OptimizerConfig, PhysicsConfig, StageConfig


def learning_rate(step: int, stage: StageConfig, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (from 1): linear warm-up, then cosine decay or constant.

    Before the decay the warm-up takes `warmup_steps`, but never more than a tenth of the stage. `constant` does not
    know the stage's length, so that a run can be prolonged.
    """
    total = stage.epochs * stage.steps_per_epoch
    warmup = config.warmup_steps if config.schedule == "constant" else min(config.warmup_steps, total // 10)
    if step <= warmup:
        return stage.learning_rate * step / warmup
    if config.schedule == "constant":
        return stage.learning_rate
    progress = (step - warmup) / max(total - warmup, 1)
    floor = config.final_learning_rate_ratio
    return stage.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def physics_weight(epoch: int, stage: StageConfig, config: PhysicsConfig) -> float:
    """Weight of the physics loss in epoch `epoch` (from 0): 0, a linear ramp, then `config.weight`.

    The last epoch always has the final weight.
    """
    if epoch >= stage.epochs - 1:
        return config.weight
    start, end = config.ramp_start * stage.epochs, config.ramp_end * stage.epochs
    if epoch < start:
        return 0.0
    if end <= start:
        return config.weight
    return config.weight * min((epoch + 1 - start) / (end - start), 1.0)


def ema_decay(step: int, decay: float) -> float:
    """Decay of step `step` (from 1): short at first, so that the start is forgotten, `decay` in the end."""
    return min(decay, (1 + step) / (10 + step))
