"""SIGTERM in every phase: exit code 143 in under four seconds, and nothing torn."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from app.train.checkpoint import CheckpointFolder
from app.workspace import RunDir
from tests.runs import RUN, assert_same_run, marked_step, start, train, wait_until

GONE_WITHIN_S = 4.0
PHASES = ("in_step:7", "in_validation:3", "in_save:5", "in_preparation:3", "in_hand_over:1")


def workers(count: int) -> tuple[str, ...]:
    """The option for so many loading processes."""
    return ("--set", f"compute.workers={count}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody stopped."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace)
    assert code == 0, output
    return workspace / RUN


def stop(workspace: Path, fault: str, *arguments: str, group: bool, again: bool = False) -> tuple[int, float, str]:
    """Signal the trainer when it has reached a place: exit code, seconds until it was gone, output."""
    reached = workspace / "reached"
    process = start(workspace, *arguments, fault=fault, env={"REACHED": str(reached)})
    wait_until(reached.exists, process)
    begin = time.monotonic()
    send = os.killpg if group else os.kill
    send(process.pid, signal.SIGTERM)
    if again:
        time.sleep(0.05)
        send(process.pid, signal.SIGTERM)
    process.wait(30)
    seconds = time.monotonic() - begin
    output, _ = process.communicate(timeout=30)
    return process.returncode, seconds, output


def assert_nothing_torn(run: Path) -> None:
    """Every checkpoint is what was written."""
    folder = CheckpointFolder(RunDir(run))
    assert [(entry.path.name, folder.damage(entry)) for entry in folder.entries() if folder.damage(entry)] == []


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("count", [0, 2, 4])
@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_is_quick_and_clean(tmp_path: Path, phase: str, count: int, group: bool) -> None:
    """To the process and to the group, which includes its loading workers."""
    code, seconds, output = stop(tmp_path, phase, *workers(count), group=group)
    assert code == 143, output
    assert seconds < GONE_WITHIN_S
    assert "Traceback" not in output
    if (tmp_path / RUN).exists():
        assert_nothing_torn(tmp_path / RUN)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_was_stopped_twice_ends_as_if_it_had_not_been(
    tmp_path: Path, uninterrupted: Path, phase: str
) -> None:
    """A second SIGTERM in the middle of the first one's work is harmless; no step is lost; the end is the same."""
    code, seconds, output = stop(tmp_path, phase, group=True, again=True)
    assert code == 143, output
    assert seconds < GONE_WITHIN_S
    code, output = train(tmp_path)
    assert code == 0, output
    assert "cost 0 steps" in output or "fresh start" in output
    assert_same_run(tmp_path / RUN, uninterrupted)


def test_a_native_call_that_does_not_return_is_left(tmp_path: Path, uninterrupted: Path) -> None:
    """The main thread sleeps in C for minutes: another thread leaves with 143 in time, and staged states are whole."""
    code, seconds, output = stop(tmp_path, "in_native_call:9", group=False)
    assert code == 143, output
    assert 2.5 < seconds < GONE_WITHIN_S
    assert "in the middle of a call that did not return" in output
    assert_nothing_torn(tmp_path / RUN)
    assert marked_step(tmp_path / RUN) == 8
    code, output = train(tmp_path)
    assert code == 0, output
    assert_same_run(tmp_path / RUN, uninterrupted)


def test_a_save_that_takes_too_long_is_not_begun(tmp_path: Path, uninterrupted: Path) -> None:
    """The volume writes 0.1 MiB/s by what was measured: what was staged before stands, and it is said."""
    code, seconds, output = stop(tmp_path, "on_a_slow_volume:9", "--set", "checkpoint.save_every_s=600", group=False)
    assert code == 143, output
    assert seconds < GONE_WITHIN_S
    assert "s are left: what was staged before stands" in output
    assert "an earlier state is saved, and some steps are repeated" in output
    code, output = train(tmp_path)
    assert code == 0, output
    assert_same_run(tmp_path / RUN, uninterrupted)
