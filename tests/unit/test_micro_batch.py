"""A micro-batch that does not fit: half of it at a time from then on, the same step, remembered for cards like this."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import app.train.micro_batch
from app.config import Config
from app.errors import MachineError
from app.train.micro_batch import MicroBatches, memory_errors, refused_when_full
from app.train.parallel import ALONE
from app.train.stage import train_stage
from app.train.state import StageState
from tests.conftest import tiny_config
from tests.unit.test_stage import set_up

CPU = torch.device("cpu")
BATCH = "stages.*.batch=4"


def micro_batches(config: Config, folder: Path, said: list[str] | None = None) -> MicroBatches:
    """Of a run in `folder`."""
    return MicroBatches(config, folder / "micro_batches.json", CPU, "fp32", ALONE, (said or []).append)


@contextmanager
def room_for(state: StageState, count: int) -> Iterator[None]:
    """Forward passes of more than `count` samples meet the error of a full card, half-way through the network."""

    def full(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if state.model.training and len(inputs[0]) > count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = list(state.model.backbone.children())[-1].register_forward_pre_hook(full)
    yield
    hook.remove()


def test_the_curves_are_those_of_a_run_that_began_with_the_smaller_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for 2 of 4 samples: after one halving, every loss and weight is that of `micro_batch: 2`, bit for bit."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    small, run, expected = set_up(tmp_path / "small", BATCH, "stages.*.micro_batch=2")
    train_stage(small, run)
    state, run, found = set_up(tmp_path / "large", BATCH)
    with room_for(state, 2), caplog.at_level(logging.WARNING):
        train_stage(state, run)
    assert [text for text in caplog.messages if "did not fit" in text] == [
        text for text in caplog.messages if "stage_8: 4 samples at a time" in text and "it takes 2 at a time" in text
    ]
    losses = ("stage_8/train_loss_step", "stage_8/val_loss", "stage_8/train_physics_step")
    for tag in losses:
        assert [point for point in found.points if point[0] == tag] == [
            point for point in expected.points if point[0] == tag
        ]
    assert len(found.steps("stage_8/train_loss_step")) == state.progress.step
    for name, tensor in small.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name


def test_it_halves_as_often_as_needed_and_remembers(tmp_path: Path) -> None:
    """Room for 1 of 4: the file says 1, the next attempt begins with it, and the user is told of each halving."""
    state, run, _ = set_up(tmp_path, BATCH)
    said: list[str] = []
    run.micro_batches._say = said.append
    with room_for(state, 1):
        train_stage(state, run)
    assert ["at a time did not fit" in text for text in said] == [True, True]
    config, stage = state.config, state.stage
    assert json.loads((tmp_path / "micro_batches.json").read_text())["fits"] == {"stage_8": 1}
    assert micro_batches(config, tmp_path).size(stage) == 1
    assert micro_batches(config, tmp_path / "another").size(stage) == 4


def test_a_larger_card_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not fit into this memory may fit into more of it; into less it did not, either."""
    config = tiny_config(BATCH)
    stage, here = config.stages[0], app.train.micro_batch.memory_of(CPU)
    micro_batches(config, tmp_path)._halve(stage)
    for memory, size in ((here, 2), (here // 2, 2), (here + 1, 4)):
        monkeypatch.setattr(app.train.micro_batch, "memory_of", lambda device, memory=memory: memory)
        assert micro_batches(config, tmp_path).size(stage) == size


@pytest.mark.parametrize("content", ["", "[]", '{"device_bytes": 1e99}', '{"device_bytes": 1e99, "fits": 3}'])
def test_a_damaged_file_is_warned_of_and_not_used(tmp_path: Path, caplog: Any, content: str) -> None:
    """The sizes are found out again."""
    config = tiny_config(BATCH)
    (tmp_path / "micro_batches.json").write_text(content)
    assert micro_batches(config, tmp_path).size(config.stages[0]) == 4
    assert "micro_batches.json cannot be read" in caplog.text


def test_one_sample_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    """The message names the device's memory and the keys, and has the table."""
    state, run, _ = set_up(tmp_path, BATCH)
    with room_for(state, 0), pytest.raises(MachineError) as caught:
        train_stage(state, run)
    assert caught.value.exit_code == 69
    text = str(caught.value)
    assert "stage_8 did not fit into the device's" in text
    assert "stages.stage_8.backbone.checkpoint_activations=true" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["micro_batch", "4", "2", "1"]


def test_the_cpu_s_own_allocator_is_understood() -> None:
    """A real request for an exbibyte; another RuntimeError stays what it is."""
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"), memory_errors():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        torch.zeros(3).reshape(2)


def test_memory_that_ends_outside_of_a_micro_batch_is_refused() -> None:
    """In a validation, say."""
    config = tiny_config()
    with pytest.raises(MachineError, match="Predicted GiB"), refused_when_full(config, config.stages[0], "fp32", CPU):
        torch.empty(2**60, dtype=torch.uint8)
