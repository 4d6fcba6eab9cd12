"""`train` on two processes, which it starts itself: the curves of one, its exit codes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.ops.crash_budget import read_lines
from tests.runs import (
    RUN,
    SHORT,
    assert_same_curves,
    has_step,
    manifest,
    marked_step,
    refused,
    start,
    train,
    wait_until,
)
from tests.supervised import Container, processes

TWO = ("--set", "compute.processes=2")
GONE_WITHIN_S = 4.0
HANG_AFTER_S = 30.0
"""Longer than two processes take to import torch on a busy machine."""
LIMIT_S = 180.0

Start = Callable[..., Container]


@pytest.fixture
def supervised(start: Start) -> Start:
    """A trainer under supervision; `start` of `tests.runs` is one by itself."""
    return start


def workers(launcher: int) -> list[int]:
    """The process numbers of a launcher's processes, by rank."""
    ranks = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for text in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if text.startswith(b"RANK="):
                ranks[int(text.removeprefix(b"RANK="))] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def running(workspace: Path, stage: str, step: int, *arguments: str) -> subprocess.Popen[str]:
    """A launcher whose processes have come to a step."""
    process = start(workspace, *TWO, *SHORT, *arguments)
    wait_until(has_step(workspace / RUN, stage, step), process)
    assert len(workers(process.pid)) == 2
    return process


def test_two_processes_draw_the_curves_of_one(tmp_path: Path, alone: Path) -> None:
    """The same command with compute.processes=2: exit code 0, the same files, every point of every curve."""
    code, output = train(tmp_path, *TWO, *SHORT)
    assert code == 0, output
    assert "processes: 2 on this machine, 2 in the run" in output
    assert "rank 1" not in output
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == sorted(path.name for path in alone.iterdir())
    assert len(list((tmp_path / RUN / "tensorboard").iterdir())) == 1
    assert_same_curves(tmp_path / RUN, alone)


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(tmp_path: Path, alone: Path) -> None:
    """143 within 4 s and nothing left; the next start goes on at the very next step, on one process."""
    process = running(tmp_path, "stage_16", 1)
    both = workers(process.pid)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    seconds = time.monotonic() - begin
    assert process.returncode == 143, output
    assert seconds < GONE_WITHIN_S
    assert not set(both) & set(processes())
    newest = max(manifest(tmp_path / RUN), key=lambda line: line["time"])
    assert output.count("the state is saved") == output.count(f"step {newest['step']}; the state is saved") == 1
    assert "Traceback" not in output
    assert "is gone" not in output
    code, output = train(tmp_path, *SHORT)
    assert code == 0, output
    assert "cost 0 steps" in output
    assert_same_curves(tmp_path / RUN, alone)


def test_processes_in_a_call_that_does_not_return_are_left_in_time(tmp_path: Path) -> None:
    """Both sleep in C for minutes: 143 within 4 s all the same."""
    reached = tmp_path / "reached"
    process = start(tmp_path, *TWO, fault="in_native_call:9", env={"REACHED": str(reached)})
    wait_until(reached.exists, process)
    both, begin = workers(process.pid), time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    seconds = time.monotonic() - begin
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert 2.5 < seconds < GONE_WITHIN_S
    assert not set(both) & set(processes())
    assert marked_step(tmp_path / RUN) == 8


def test_a_refusal_keeps_its_code_and_is_said_once(tmp_path: Path) -> None:
    """78 for a batch that cannot be divided, 69 for GPUs that are not there; REASON says so."""
    for code, arguments, text in (
        (78, ("--set", "stages.*.batch=3"), "stage_8.batch: 3 samples cannot be divided equally among 2 processes"),
        (69, ("--set", "compute.device=cuda"), "compute.device is cuda and torch finds no GPU here"),
    ):
        output = refused(tmp_path, code, *TWO, *arguments, env={"CUDA_VISIBLE_DEVICES": ""})
        assert output.count(text) == 1
        assert output.count("ERROR") == 1
    (tmp_path / RUN).mkdir(parents=True)
    refused(tmp_path, 78, *TWO, "--set", "stages.*.batch=3")
    assert (tmp_path / RUN / "REASON").read_text().startswith("exit code 78\n")


def test_a_crash_of_the_second_process_is_on_record(tmp_path: Path) -> None:
    """Exit code 1 and one traceback; the supervisor will see whether the same error comes again at the same step."""
    process = start(tmp_path, *TWO, fault="crash_in_the_second_process:3")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, output
    assert output.count("Traceback") == 1
    errors = [line for line in read_lines(tmp_path / RUN / "attempts.jsonl") if line["event"] == "error"]
    assert [(line["error"].split(":")[0], line["global_step"]) for line in errors] == [
        ("RuntimeError at app/train/step.py", 2)
    ]


def test_a_killed_launcher_leaves_nobody(tmp_path: Path, alone: Path) -> None:
    """SIGKILL: its processes leave by themselves, as after SIGTERM, and the run goes on."""
    process = running(tmp_path, "stage_8", 1)
    both, begin = workers(process.pid), time.monotonic()
    process.kill()
    process.wait(10)
    while set(both) & {pid for pid, (state, _) in processes().items() if state != "Z"}:
        assert time.monotonic() - begin < GONE_WITHIN_S
        time.sleep(0.02)
    process.communicate(timeout=30)
    code, output = train(tmp_path, *TWO, *SHORT)
    assert code == 0, output
    assert "resuming stage_8" in output
    assert_same_curves(tmp_path / RUN, alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_is_one_crash_and_the_curves_have_no_seam(supervised: Start, alone: Path, rank: int) -> None:
    """SIGKILL of one of two under supervision: 137, counted once; the group goes on from its last checkpoint."""
    container = supervised(*TWO, *SHORT, command="supervise-trainer")
    run = container.workspace / RUN
    container.until(has_step(run, "stage_16", 3), LIMIT_S)
    os.kill(workers(container.trainer())[rank], signal.SIGKILL)
    container.says("ended unexpectedly (SIGKILL of a process): crash 1 without progress, 5 are borne; started again")
    assert container.process.wait(LIMIT_S) == 0, container.output
    container.close()
    assert f"process {rank} of the run (pid" in container.output
    assert container.output.count("crash 1 without progress") == 1
    ends = [line for line in read_lines(run / "attempts.jsonl") if line["event"] in ("crash", "end")]
    assert [(line["event"], line["code"]) for line in ends] == [("crash", 137), ("end", 0)]
    assert "Traceback" not in container.output
    assert_same_curves(run, alone)


def test_a_process_that_hangs_is_found_and_the_run_goes_on(supervised: Start, alone: Path) -> None:
    """SIGSTOP of the second of two: the first waits for it, silently; both stacks in the log, and a crash by a hang."""
    container = supervised(*TWO, "--set", f"compute.hang_after_s={HANG_AFTER_S}", *SHORT, command="supervise-trainer")
    run = container.workspace / RUN
    container.until(has_step(run, "stage_8", 2), LIMIT_S)
    both = workers(container.trainer())
    os.kill(both[1], signal.SIGSTOP)
    container.until(lambda: "ended unexpectedly (it hung): crash 1 without progress" in container.output, LIMIT_S)
    assert not set(both) & set(processes())
    log = (container.workspace / "hybrid_vit_cascade/logs/train.log").read_text()
    assert f"process 1 of the run (pid {both[1]}): it is stopped (SIGSTOP)" in log
    stacks = log[log.index("where it hangs, all threads:") :]
    assert "app/train/stage.py" in stacks
    assert stacks.count("Current thread") + stacks.count("most recent call first") >= 4
    assert container.process.wait(LIMIT_S) == 0, container.output
    container.close()
    crashes = [line for line in read_lines(run / "attempts.jsonl") if line["event"] == "crash"]
    assert [line["hang"] for line in crashes] == [True]
    assert_same_curves(run, alone)
