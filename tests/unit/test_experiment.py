"""The experiments' own parts: what they change of a model, their budgets and verdicts."""

from __future__ import annotations

import pytest
import torch

from app.model.denoiser import StageModel
from app.model.diffusion import add_noise, alpha_sigma
from tests.bench.ablations import error_withheld, lateral_as_frontal, v_prediction, verdict
from tests.bench.experiment import fresh_state, with_steps
from tests.conftest import tiny_config


def condition_of(model: StageModel, xrays: torch.Tensor):
    """Both views shown, from the prior."""
    return model.condition(xrays, torch.ones(len(xrays), 2))


@pytest.mark.parametrize("steps", [{"stage_8": 3, "stage_16": 40, "stage_32": 207}])
def test_a_budget_of_steps_becomes_epochs(steps: dict[str, int]) -> None:
    """Ten epochs, or one per step where there are fewer; rounded to whole epochs."""
    config = with_steps(tiny_config(), steps)
    assert [(stage.epochs, stage.steps_per_epoch) for stage in config.stages] == [(3, 1), (10, 4), (10, 21)]


def test_a_v_network_of_zeros_predicts_alpha_x_t_and_one_that_is_right_predicts_x_0() -> None:
    """x_0 = alpha x_t - sigma v, whatever c is; the averaged model is of the same kind."""
    config = tiny_config()
    state = fresh_state(config, config.stages[0])
    v_prediction(state)
    x_0, noise, snr = torch.rand(2, 1, 8, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8, 8), torch.tensor([-2.0, 3.0])
    x_t, (alpha, sigma) = add_noise(x_0, noise, snr), alpha_sigma(snr)
    condition = condition_of(state.model, torch.rand(2, 2, 8, 8))
    assert torch.allclose(state.model(x_t, snr, condition), alpha * x_t, atol=1e-6)
    state.model.backbone.forward = lambda *_: alpha * noise - sigma * x_0
    assert torch.allclose(state.model(x_t, snr, condition), x_0, atol=1e-5)


def test_a_lateral_view_as_frontal_changes_the_network_s_rays_and_nothing_else() -> None:
    """The lateral rays are those of the frontal view for the same image; prior and projection are as before."""
    config = tiny_config()
    state, other = (fresh_state(config, config.stages[0]) for _ in range(2))
    lateral_as_frontal(state)
    xrays = torch.rand(1, 1, 8, 8).expand(1, 2, 8, 8)
    wrong, right = condition_of(state.model, xrays), condition_of(other.model, xrays)
    assert torch.equal(wrong.rays[:, 1], wrong.rays[:, 0])
    assert not torch.equal(right.rays[:, 1], right.rays[:, 0])
    assert torch.equal(wrong.rays[:, 3], wrong.rays[:, 2])
    assert not torch.equal(right.rays[:, 3], right.rays[:, 2])
    assert torch.equal(wrong.rays[:, [0, 2]], right.rays[:, [0, 2]])
    assert torch.equal(wrong.volume, right.volume)
    mu = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(state.model.projector(mu), other.model.projector(mu))


def test_what_is_wrong_with_c_can_be_withheld() -> None:
    """The last two channels are zero, the others as before."""
    config = tiny_config()
    state, other = (fresh_state(config, config.stages[0]) for _ in range(2))
    error_withheld(state)
    xrays = torch.rand(2, 2, 8, 8)
    without, right = condition_of(state.model, xrays), condition_of(other.model, xrays)
    assert torch.equal(without.rays[:, :2], right.rays[:, :2])
    assert without.rays[:, 2:].abs().max() == 0 < right.rays[:, 2:].abs().max()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1], "-1.05 +- 0.07 dB, worse beyond seed spread"),
        ([2.1, 2.2], "+0.05 +- 0.07 dB, within seed spread"),
        ([1.0, 2.1], "-0.55 +- 0.64 dB, within seed spread"),
        ([3.0, 3.2], "+1.00 +- 0.00 dB, better beyond seed spread"),
        ([1.0], "-1.00 dB, one seed has no spread"),
    ],
)
def test_a_verdict_needs_seeds_that_lie_apart(values: list[float], expected: str) -> None:
    """Against a baseline of 2.0 and 2.2 dB with the same seeds."""
    assert verdict(values, [2.0, 2.2][: len(values)]) == expected
