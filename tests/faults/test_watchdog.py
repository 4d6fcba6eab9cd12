"""Claims about a trainer that hangs, and about one that crashes at the same place each time: real processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.ops.crash_budget import read_lines
from app.ops.ledger_history import read_history
from app.ops.step_mark import marked
from tests.runs import RUN, assert_same_run, has_step, train
from tests.supervised import Container, processes

HANG_AFTER_S = 10.0
"""Longer than importing torch takes on a busy machine."""
WATCHED = ("--set", f"compute.hang_after_s={HANG_AFTER_S}")
STEPS_OF_AN_EPOCH, STEPS_OF_STAGE_8 = 4, 12
LOG = Path("hybrid_vit_cascade/logs/train.log")

Start = Callable[..., Container]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happened to."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace)
    assert code == 0, output
    return workspace / RUN


def events(run: Path, kind: str) -> list[dict[str, object]]:
    """Lines of the ledger."""
    return [line for line in read_lines(run / "attempts.jsonl") if line["event"] == kind]


def stopped_in_stage_16(start: Start) -> tuple[Path, dict[Path, bytes]]:
    """A run that was stopped in the second epoch of its second stage: its folder, and files that each step reads."""
    container = start(*WATCHED, command="supervise-trainer")
    run = container.workspace / RUN
    container.until(lambda: (marked(run / "steps") or 0) >= STEPS_OF_STAGE_8 + STEPS_OF_AN_EPOCH + 1)
    assert container.stop()[0] == 143
    assert not (run / "stage_16_final.pt").exists()
    cases = [case["id"] for case in json.loads((run / "split.json").read_text())["train"]]
    files = [path for path in container.workspace.glob("cache/lowres/stage_8-*/*.npy") if path.stem in cases]
    assert len(files) == len(cases)
    return run, {path: path.read_bytes() for path in files}


def finish(container: Container) -> None:
    """Wait for the end of a run."""
    assert container.process.wait(90) == 0, container.output
    container.close()


def test_a_stopped_trainer_is_ended_with_its_stacks_in_the_log_and_the_run_goes_on(
    start: Start, uninterrupted: Path
) -> None:
    """SIGSTOP: ended, counted as a crash, started again; the end is the same, bit for bit."""
    container = start(*WATCHED, command="supervise-trainer")
    run = container.workspace / RUN
    container.until(has_step(run, "stage_8", 2))
    trainer = container.trainer()
    os.kill(trainer, signal.SIGSTOP)
    container.says("ended unexpectedly (it hung): crash 1 without progress")
    assert trainer not in processes()
    for text in (container.output, (container.workspace / LOG).read_text()):
        report = text[text.index("the trainer hangs: no sign of life for") :]
        assert "it is stopped (SIGSTOP). It is ended and started again" in report
        assert "most recent call first" in report
        assert "app/train/" in report
    finish(container)
    assert [line["hang"] for line in events(run, "crash")] == [True]
    _, second = read_history(run / "ledger.jsonl").attempts
    assert second.previous is not None
    assert second.previous.kind == "hung"
    assert_same_run(run, uninterrupted)


def test_a_trainer_that_waits_in_the_kernel_is_ended_and_the_run_goes_on(start: Start, uninterrupted: Path) -> None:
    """A file that never answers: a named pipe stands in for a disk that is gone."""
    run, files = stopped_in_stage_16(start)
    for file in files:
        file.unlink()
        os.mkfifo(file)
    container = start(*WATCHED, command="supervise-trainer")
    container.says("where it hangs, all threads:")
    for file, content in files.items():
        file.unlink()
        file.write_bytes(content)
    container.says("ended unexpectedly (it hung): crash 1 without progress")
    for text in (container.output, (container.workspace / LOG).read_text()):
        report = text[text.index("where it hangs, all threads:") :]
        assert "app/train/samples.py" in report
        assert "in _train_stage" in report
    finish(container)
    assert [line["hang"] for line in events(run, "crash")] == [True]
    assert_same_run(run, uninterrupted)


def test_the_same_crash_again_falls_back_once_and_stops_and_a_repaired_run_goes_on(
    start: Start, uninterrupted: Path
) -> None:
    """Twice, from the state before, then 71 across containers; with the files put right the end is the same."""
    run, files = stopped_in_stage_16(start)
    for file in files:
        np.save(file, np.array(["whole, and no volume"]))
    container = start(*WATCHED, command="supervise-trainer")
    container.says("crash 1 without progress")
    container.stop()
    container.close()

    container = start(*WATCHED, command="supervise-trainer")
    assert container.process.wait(240) == 71, container.output
    container.close()
    assert "from its last checkpoint but one, because the same error came at the same step" in container.output
    assert container.output.count("resuming stage_16") == 2
    errors = events(run, "error")
    assert len({line["error"] for line in errors}) == 1
    assert errors[0]["global_step"] == errors[1]["global_step"]
    assert len(errors) == len(events(run, "crash")) == 3
    (fell_back,) = events(run, "fell_back")
    older = str(fell_back["to"])
    assert older.startswith("stage_16_")
    reason = (run / "REASON").read_text()
    assert reason.startswith(
        "exit code 71\nthe same error ended the trainer 3 times: TypeError at app/train/samples.py:"
    )
    assert f"it came from the state before, too ({older}; newer files:" in reason
    assert "Put right what it is about" in reason
    (text,) = run.glob("quarantine/*_stage_16_last.txt")
    assert text.read_text().startswith("set aside after 2 crashes of the same kind (TypeError at app/train/samples.py:")

    again = start(*WATCHED, command="supervise-trainer")
    assert again.process.wait(30) == 71
    again.close()
    assert "not started, because the last attempt was refused and nothing has changed" in again.output

    for file, content in files.items():
        file.write_bytes(content)
    (run / "REASON").unlink()
    repaired = start(*WATCHED, command="supervise-trainer")
    finish(repaired)
    assert "--fall-back" not in repaired.output
    assert_same_run(run, uninterrupted)
