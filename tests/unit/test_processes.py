"""How many processes a machine starts for a run."""

from __future__ import annotations

import pytest
import torch

from app.errors import MachineError
from app.train.parallel import processes_here
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("overrides", "gpus", "machines", "count"),
    [
        ([], 0, 1, 1),
        ([], 1, 1, 1),
        (["stages.*.batch=8"], 8, 1, 8),
        (["stages.*.batch=8"], 8, 2, 4),
        (["stages.*.batch=8"], 6, 1, 4),
        (["stages.*.batch=8", "stages.0.batch=12"], 8, 1, 4),
        (["stages.*.batch=8", "compute.device=cpu"], 8, 1, 1),
        (["compute.processes=3"], 0, 1, 3),
        (["stages.*.batch=8", "compute.processes=2"], 8, 1, 2),
        (["stages.*.batch=3"], 2, 2, 2),
    ],
)
def test_a_process_per_gpu_as_far_as_the_batch_can_be_divided(
    overrides: list[str], gpus: int, machines: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch cannot be divided at all, which the processes refuse."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    auto = "compute.device=auto"
    assert processes_here(tiny_config(auto, *overrides), (), machines) == count


def test_gpus_that_are_left_over_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With the reason; of the stages that are trained, only."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = tiny_config("compute.device=auto", "stages.*.batch=4", "stages.stage_32.batch=2")
    assert processes_here(config, ("stage_8",), 1) == 4
    assert processes_here(config, (), 1) == 2
    assert "2 of 4 GPUs are used: the samples of a step cannot be divided equally among more" in caplog.text
    assert "stages.stage_32.batch is 2" in caplog.text


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, by the launcher."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match=r"compute\.processes is 3, and torch finds 2 GPUs here"):
        processes_here(tiny_config("compute.device=auto", "compute.processes=3"), (), 1)
