"""Claims about the container's first process and its programs, run as normal processes on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.ops.crash_budget import BUDGET, Attempts
from app.workspace import RunDir
from tests.runs import RUN, manifest
from tests.scans import write_scan
from tests.supervised import Container, below, processes

LONG = ("--set", "stages.*.epochs=100000", "--set", "checkpoint.save_every_s=0.2")
LEAVES_WITHIN_S = 5.0


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_sigterm_saves_and_ends_all_in_time_and_a_finished_run_stays_finished(
    start: Callable[..., Container], tmp_path: Path
) -> None:
    """143 within 5 s and nothing left; a run that ends keeps its dashboard, and its next start needs no GPU."""
    first = start(*LONG)
    run = first.workspace / RUN
    first.until(lambda: len(manifest(run)) > 2)
    first.until(first.healthy)
    family = below(first.process.pid)
    assert len(family) >= 4
    code, seconds = first.stop()
    assert code == 143
    assert seconds < LEAVES_WITHIN_S
    assert not set(family) & set(processes())
    assert "the state is saved" in first.output
    assert "killing" not in first.output
    saved = max(manifest(run), key=lambda line: line["time"])
    stopped_at = next(line for line in first.lines if "the state is saved" in line)
    assert f"step {saved['step']};" in stopped_at

    # The length of a stage is a scientific setting, so the short run is another one.
    short = ("--set", "run_name=short", "--set", "stages.*.epochs=1")
    second = start(*short)
    second.says("exit code 0. The dashboard stays up.")
    assert "finished: all stages are trained" in second.output
    second.until(lambda: "exited: trainer (exit status 0; expected)" in second.output)
    assert second.healthy()
    assert second.stop()[0] == 143

    third = start(*short, "--set", "compute.device=cuda", command="supervise-trainer")
    assert third.process.wait(30) == 0
    third.close()
    assert "finished before: all stages are trained; not started again" in third.output
    assert "app.cascade" not in third.output
    shell = (tmp_path / "run/hybrid_vit_cascade.env").read_text()
    assert f"export WORKSPACE={third.workspace}\n" in shell
    assert (tmp_path / "run/hybrid_vit_cascade.env").stat().st_mode & 0o777 == 0o600


def test_the_trainer_hears_of_it_at_once_even_if_supervisord_hangs(start: Callable[..., Container]) -> None:
    """Under 0.2 s with supervisord frozen; the state is saved, and the frozen rest is killed in time."""
    container = start(*LONG)
    run = container.workspace / RUN
    container.until(lambda: len(manifest(run)) > 2)
    trainer = container.trainer()
    supervisord = int((container.runtime / "supervisord.pid").read_text())
    os.kill(supervisord, signal.SIGSTOP)
    os.kill(trainer, signal.SIGSTOP)
    # Signals that wait together are taken in the order of their numbers.
    container.until(lambda: processes()[trainer][0] == "T")
    begin = time.monotonic()
    container.process.send_signal(signal.SIGTERM)
    container.until(lambda: pending(trainer, signal.SIGTERM), limit_s=3)
    heard = time.monotonic() - begin
    os.kill(trainer, signal.SIGCONT)
    assert heard < 0.2
    assert container.process.wait(10) == 143
    assert time.monotonic() - begin < LEAVES_WITHIN_S
    assert "killing" in container.output
    assert not below(container.process.pid)
    log = (container.workspace / "hybrid_vit_cascade/logs/train.log").read_text()
    assert "the state is saved" in log


def test_orphans_are_adopted_reaped_and_stopped(start: Callable[..., Container]) -> None:
    """The process that watches over the trainer is killed: its successor waits for the lock; SIGTERM reaches both."""
    container = start(*LONG)
    container.until(lambda: len(manifest(container.workspace / RUN)) > 2)
    orphan = container.trainer()
    os.kill(processes()[orphan][1], signal.SIGKILL)
    container.says("another process trains this run; trying again in 5 s")
    assert processes()[orphan][1] == container.process.pid
    assert not (container.workspace / RUN / "REASON").exists()
    code, seconds = container.stop()
    assert code == 143
    assert seconds < LEAVES_WITHIN_S
    assert orphan not in processes()
    log = (container.workspace / "hybrid_vit_cascade/logs/train.log").read_text()
    assert "the state is saved" in log


def test_a_bad_config_is_said_once_and_the_dashboard_is_up(start: Callable[..., Container]) -> None:
    """No loop; the message in the log and in REASON."""
    container = start("--set", "sed=1")
    container.says("exited: trainer (exit status 78; expected)")
    container.until(container.healthy)
    assert "sed: unknown key" in container.output
    assert "exit code 78. The dashboard stays up. Correct the configuration and restart" in container.output
    reason = container.workspace / "hybrid_vit_cascade/checkpoints/REASON"
    assert reason.read_text().startswith("exit code 78\n")
    time.sleep(2)
    assert container.output.count("spawned: 'trainer'") == 1
    assert container.stop()[0] == 143


def test_a_workspace_that_cannot_be_written_is_said_once(start: Callable[..., Container], tmp_path: Path) -> None:
    """Exit code 69 and what to do, instead of a loop."""
    (tmp_path / "workspace").write_text("a file where the folder should be")
    container = start(command="supervise-trainer")
    assert container.process.wait(30) == 69
    container.close()
    assert "cannot write in" in container.output
    assert "Mount a writable volume there" in container.output
    assert "exit code 69. The dashboard stays up. Restart when the machine has what is asked for" in container.output
    assert "Traceback" not in container.output


def test_a_container_that_cannot_start_is_parked(
    start: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong variable: said once; the process stays until it is stopped, so that nothing restarts it for ever."""
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    container = start()
    container.says("this container waits to be stopped")
    assert (
        "environment variable LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR, found 'LOUD'" in container.output
    )
    assert below(container.process.pid) == []
    assert container.stop()[0] == 143


def test_wrong_arguments_park_the_container(start: Callable[..., Container]) -> None:
    """An unknown option is said once, with the usage."""
    container = start("--epoch", "3")
    container.says("unrecognized arguments: --epoch 3")
    container.says("this container waits to be stopped")
    assert container.stop()[0] == 143


def test_without_supervisord_the_state_is_saved_and_the_container_leaves(start: Callable[..., Container]) -> None:
    """It was killed: its orphans are stopped in order, and the exit code asks for another start."""
    container = start(*LONG)
    container.until(lambda: len(manifest(container.workspace / RUN)) > 2)
    trainer = container.trainer()
    os.kill(int((container.runtime / "supervisord.pid").read_text()), signal.SIGKILL)
    assert container.process.wait(10) == 69
    container.close()
    assert "supervisord ended with -9, which it never should" in container.output
    assert trainer not in processes()
    log = (container.workspace / "hybrid_vit_cascade/logs/train.log").read_text()
    assert "the state is saved" in log


def test_crashes_without_progress_end_in_a_refusal_that_stands(start: Callable[..., Container]) -> None:
    """Counted across containers; 71 with REASON; refused again until REASON goes, then the budget is whole again."""
    container = start(*LONG, command="supervise-trainer")
    os.kill(container.trainer(), signal.SIGSEGV)
    container.says("ended unexpectedly (SIGSEGV): crash 1 without progress, 5 are borne; started again")
    assert container.stop()[0] == 143

    run = container.workspace / RUN
    for _ in range(BUDGET - 1):
        Attempts(RunDir(run)).started(1)
        Attempts(RunDir(run)).ended(-signal.SIGSEGV, crashed=True)
    last = start(*LONG, command="supervise-trainer")
    os.kill(last.trainer(), signal.SIGSEGV)
    assert last.process.wait(30) == 71
    last.close()
    assert f"crashed {BUDGET + 1} times without coming further" in last.output
    assert (run / "REASON").read_text().startswith("exit code 71\nthe trainer crashed 6 times")
    assert "deleting" in last.output

    again = start(*LONG, command="supervise-trainer")
    assert again.process.wait(30) == 71
    again.close()
    assert "not started, because the last attempt was refused and nothing has changed" in again.output
    assert Attempts(RunDir(run)).exhausted()

    (run / "REASON").unlink()
    free = start(*LONG, command="supervise-trainer")
    os.kill(free.trainer(), signal.SIGSEGV)
    free.says("crash 1 without progress")
    assert free.stop()[0] == 143


def test_an_empty_data_folder_waits_until_a_ct_arrives(start: Callable[..., Container]) -> None:
    """Said in the log and in status.json; training begins when the copying has ended."""
    container = start("--set", "data.source=ct", "--set", "run_name=ct", command="supervise-trainer")
    container.says("waiting for data: no CT in")
    status = container.workspace / "hybrid_vit_cascade/checkpoints/ct/status.json"
    container.until(status.exists)
    assert json.loads(status.read_text())["state"] == "waiting for data"
    assert not container.pid_file.exists()
    for index in range(4):
        write_scan(container.workspace / f"data/patient{index}.nii.gz", index)
    container.says("data arrived in")
    container.says("data: 4 cases of 4 patients are ready")
    assert container.stop()[0] == 143
