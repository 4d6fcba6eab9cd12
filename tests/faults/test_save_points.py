"""SIGKILL at every point of a save: the run goes on and ends with the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs import RUN, assert_same_run, start, train

KEEP_ONE = ("--set", "checkpoint.keep_last_n_checkpoints=1")
POINTS = (
    "kill_before_write:4",
    "kill_mid_write:400",
    "kill_after_fsync:5",
    "kill_before_the_line:6",
    "kill_in_the_line:7",
    "kill_after_the_line:3",
    "kill_after_the_rotation:2",
    "kill_after_the_rename:4",
    "kill_before_the_committed_line:9",
    "kill_after_the_committed_line:8",
    "kill_in_retention:1",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody killed."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace, *KEEP_ONE)
    assert code == 0, output
    return workspace / RUN


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_inside_a_save_leaves_no_trace(tmp_path: Path, uninterrupted: Path, point: str) -> None:
    """Killed there, started again by the same command: weights, curves and files are those of the quiet run."""
    victim = start(tmp_path, *KEEP_ONE, fault=point)
    output, _ = victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL, f"{point} was never reached:\n{output}"
    code, output = train(tmp_path, *KEEP_ONE)
    assert code == 0, output
    assert "quarantine" not in output
    assert_same_run(tmp_path / RUN, uninterrupted)
    assert not list((tmp_path / RUN).glob(".*.tmp"))
