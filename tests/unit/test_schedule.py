"""Learning rate, physics weight and EMA decay at points where their values are known."""

import pytest

from app.config import OptimizerConfig, PhysicsConfig, StageConfig
from app.train.schedule import ema_decay, learning_rate, physics_weight

STAGE = StageConfig(resolution=64, epochs=10, samples_per_epoch=800, batch=8, learning_rate=1e-3)  # 1000 steps


def test_learning_rate_warms_up_and_decays_to_its_floor() -> None:
    """Half the rate in the middle of the warm-up, all of it at its end, the middle of the cosine, the floor."""
    config = OptimizerConfig(warmup_steps=100, final_learning_rate_ratio=0.1)
    rates = [learning_rate(step, STAGE, config) for step in (50, 100, 550, 1000)]
    assert rates == pytest.approx([5e-4, 1e-3, 5.5e-4, 1e-4])


def test_constant_schedule_does_not_know_the_end() -> None:
    """With `constant`, more epochs change no earlier rate: that is what lets a run be prolonged."""
    config = OptimizerConfig(warmup_steps=150, schedule="constant")
    longer = STAGE.model_copy(update={"epochs": 20})
    assert all(learning_rate(s, STAGE, config) == learning_rate(s, longer, config) for s in (1, 100, 150, 151, 1000))


def test_no_warm_up_starts_at_the_full_rate() -> None:
    """warmup_steps 0 is allowed and divides nothing by zero."""
    assert learning_rate(1, STAGE, OptimizerConfig(warmup_steps=0)) == pytest.approx(1e-3, rel=1e-4)


def test_physics_weight_is_zero_then_ramps_then_final() -> None:
    """Epochs of a stage of 10, ramp from 50 % to 90 %: zero in the first five, the final weight in the last."""
    weights = [physics_weight(epoch, STAGE, PhysicsConfig(weight=0.02)) for epoch in range(10)]
    assert weights[:5] == [0.0] * 5
    assert weights[5:] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])


def test_a_stage_of_one_epoch_has_the_final_weight() -> None:
    """The last epoch always trains with what validation measures."""
    short = STAGE.model_copy(update={"epochs": 1})
    assert physics_weight(0, short, PhysicsConfig(weight=0.02)) == 0.02


def test_ema_forgets_its_start_and_then_holds_its_decay() -> None:
    """Decay 2/11 at the first step, the configured one from then on when it is smaller than (1 + n) / (10 + n)."""
    assert ema_decay(1, 0.999) == pytest.approx(2 / 11)
    assert ema_decay(10**6, 0.999) == 0.999
