"""SIGKILL and SIGTERM of real training processes: the same weights and the same curves as without them."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.runs import RUN, assert_same_run, assert_same_state, has_kind, has_step, manifest, start, train, wait_until

SAVE_SOMETIMES = ("--set", "checkpoint.save_every_s=0.15")
"""Several steps between two saves, so that a kill loses some."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody killed."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace, *SAVE_SOMETIMES)
    assert code == 0, output
    return workspace / RUN


def test_three_sigkills_leave_no_trace(tmp_path: Path, uninterrupted: Path) -> None:
    """Killed in the middle of an epoch, between two stages, and in the last stage; restarted by the same command."""
    run = tmp_path / RUN
    moments = [has_step(run, "stage_8", 2), has_kind(run, "stage_8", "final"), has_step(run, "stage_32", 1)]
    source = random.Random(0)
    for reached in moments:
        process = start(tmp_path, *SAVE_SOMETIMES)
        wait_until(reached, process)
        time.sleep(source.uniform(0, 0.1))
        process.kill()
        process.communicate()
    code, output = train(tmp_path, *SAVE_SOMETIMES)
    assert code == 0, output
    assert "resuming stage_32 at epoch" in output
    assert_same_run(run, uninterrupted)


def test_sigkills_at_random_moments(tmp_path: Path, uninterrupted: Path) -> None:
    """Five kills at random times after the start, wherever they hit: preparation, save, validation, hand-over."""
    source = random.Random(1)
    for _ in range(5):
        process = start(tmp_path, *SAVE_SOMETIMES)
        time.sleep(source.uniform(3.0, 8.0))
        process.kill()
        process.communicate()
    code, output = train(tmp_path, *SAVE_SOMETIMES)
    assert code == 0, output
    assert_same_run(tmp_path / RUN, uninterrupted)


def test_sigterm_saves_the_last_step_and_exits_143(tmp_path: Path, uninterrupted: Path) -> None:
    """Twice TERM, in two stages: exit code 143 each time, nothing is lost, and the end is the same."""
    run = tmp_path / RUN
    for reached in (has_step(run, "stage_8", 3), has_step(run, "stage_16", 2)):
        process = start(tmp_path, *SAVE_SOMETIMES)
        wait_until(reached, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 143, output
        assert "the state is saved" in output
        newest = max(manifest(run), key=lambda line: line["time"])
        assert f"step {newest['step']}; the state is saved" in output
    code, output = train(tmp_path, *SAVE_SOMETIMES)
    assert code == 0, output
    assert_same_run(run, uninterrupted)


def test_workers_do_not_change_the_result(tmp_path: Path, uninterrupted: Path) -> None:
    """Four loading processes, then none, then four again, across two SIGTERMs: workers only load."""
    run = tmp_path / RUN
    four = ("--set", "compute.workers=4")
    for workers, reached in ((four, has_step(run, "stage_8", 2)), ((), has_step(run, "stage_16", 2))):
        process = start(tmp_path, *SAVE_SOMETIMES, *workers)
        wait_until(reached, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 143, output
    code, output = train(tmp_path, *SAVE_SOMETIMES, *four)
    assert code == 0, output
    assert "compute.workers" in output
    assert_same_run(run, uninterrupted)


def test_the_comparison_can_fail(tmp_path: Path, uninterrupted: Path) -> None:
    """A run with another seed is not the same run: the criterion of this file tells them apart."""
    code, output = train(tmp_path, *SAVE_SOMETIMES, "--set", "seed=1", "--stages", "stage_8")
    assert code == 0, output
    with pytest.raises(AssertionError, match="val_loss"):
        assert_same_state(tmp_path / RUN / "stage_8_epoch_1.pt", uninterrupted / "stage_8_epoch_1.pt")
