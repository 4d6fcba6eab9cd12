"""The predicted memory of a training step, against closed forms and against what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from app.config import Config
from app.train.handover import new_state
from app.train.loss import sample_losses
from app.train.memory import StepMemory, checkpoint_bytes, step_memory
from app.train.precision import Precision
from app.train.state import StageState
from tests.conftest import tiny_config

CPU = torch.device("cpu")
WIDE = ("stages.stage_32.backbone.patch=2", "stages.stage_32.backbone.widths=[32]", "stages.stage_32.backbone.blocks=2")
"""A network whose activations outweigh the volumes around it, as those of the real stages do."""


def predicted(config: Config, micro_batch: int, precision: str = "fp32") -> StepMemory:
    """For the finest tiny stage."""
    return step_memory(config, config.stages[-1], precision, micro_batch)


def state_of(config: Config) -> StageState:
    """A real one."""
    return new_state(config, config.stages[-1], CPU, Precision("fp32", CPU), "", None)


def kept_by_autograd(config: Config, micro_batch: int) -> int:
    """Bytes that a real forward pass saves for its backward pass, weights and buffers left out."""
    state, edge = state_of(config), config.stages[-1].resolution
    own = {tensor.untyped_storage().data_ptr() for tensor in (*state.model.parameters(), *state.model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x_0, noise = torch.rand(2, micro_batch, 1, edge, edge, edge).unbind()
    xrays, views, level = torch.rand(micro_batch, 2, edge, edge), torch.ones(micro_batch, 2), torch.zeros(micro_batch)
    lowres = torch.rand(micro_batch, 1, *[config.stages[-2].resolution] * 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        condition = state.model.condition(xrays, views, lowres, level, torch.zeros_like(lowres))
        losses = sample_losses(state.model, x_0, noise, torch.zeros(micro_batch), condition, xrays)
        (losses.diffusion + losses.physics).sum()
    return sum(storage.nbytes() for storage in kept.values())


def test_weights_and_moments_are_those_of_a_real_state() -> None:
    """Two models with their buffers, and two moments of each parameter."""
    config = tiny_config()
    state, found = state_of(config), predicted(config, 1)
    tensors = [*state.model.parameters(), *state.model.buffers(), *state.ema.model.parameters()]
    tensors += state.ema.model.buffers()
    whole = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert found.weights == pytest.approx(sum(whole.values()), rel=0.01)
    moments = 2 * sum(parameter.nbytes for parameter in state.model.parameters())
    assert found.optimizer == pytest.approx(moments, rel=0.01)


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_activations_hold_what_a_real_pass_keeps(micro_batch: int) -> None:
    """All of it, the gradients, and no more than a third again for what comes and goes."""
    config = tiny_config(*WIDE)
    kept = kept_by_autograd(config, micro_batch)
    gradients = sum(parameter.nbytes for parameter in state_of(config).model.parameters())
    found = predicted(config, micro_batch).activations
    assert kept <= found <= 1.34 * (kept + gradients)


def test_each_sample_costs_the_same_and_checkpointing_saves() -> None:
    """Linear in the micro-batch; recomputed activations are not kept."""
    config = tiny_config(*WIDE)
    one, two, three = (predicted(config, count).activations for count in (2, 4, 6))
    assert three - two == pytest.approx(two - one, rel=0.02)
    checkpointed = tiny_config(*WIDE, "stages.*.backbone.checkpoint_activations=true")
    assert predicted(checkpointed, 6).activations < 0.8 * three
    assert predicted(config, 6, "bf16").activations < three


def test_a_checkpoint_has_the_size_that_was_counted(tmp_path: Path) -> None:
    """The file of a real state after a step, to 2 % and the 200 KiB of names and structure."""
    config = tiny_config()
    state = state_of(config)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    torch.save(state.payload(), tmp_path / "stage.pt")
    assert (tmp_path / "stage.pt").stat().st_size == pytest.approx(
        checkpoint_bytes(config, config.stages[-1]), rel=0.02, abs=200 * 2**10
    )


def test_counting_draws_nothing() -> None:
    """The global generator stays where it was, and a real state made afterwards is the same."""
    before: Any = torch.random.get_rng_state()
    predicted(tiny_config(), 1)
    checkpoint_bytes(tiny_config(), tiny_config().stages[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(not isinstance(p, torch._subclasses.FakeTensor) for p in state_of(tiny_config()).model.parameters())
