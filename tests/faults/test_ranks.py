"""The same run on one process and on two under torchrun, called by hand: the same curves, also across a stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY
from tests.runs import (
    RUN,
    assert_close,
    assert_close_state,
    assert_same_state,
    has_step,
    manifest,
    series,
    start,
    train,
    wait_until,
)

FOREIGN = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
"""What a cluster sets for every process of a machine."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that nobody stopped."""
    workspace = tmp_path_factory.mktemp("alone")
    code, output = train(workspace)
    assert code == 0, output
    return workspace / RUN


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes that nobody stopped."""
    workspace = tmp_path_factory.mktemp("together")
    process = start_two(workspace)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "rank 1" not in output
    return workspace / RUN


def start_two(workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two processes of `python -m app train` on the tiny cascade, under torch's launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "app", "train", "--config", str(TINY), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WORKSPACE": str(workspace)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def second(launcher: subprocess.Popen[str]) -> int:
    """The process number of rank 1."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("the launcher has no such child")


def test_two_processes_draw_the_curves_of_one(together: Path, alone: Path) -> None:
    """Every loss of every step, every validation, every epoch; and the checkpoints at the ends of the stages."""
    assert_close(series(together), series(alone))
    for stage in ("stage_8", "stage_16", "stage_32"):
        assert_close_state(together / f"{stage}_final.pt", alone / f"{stage}_final.pt")


def test_only_the_first_process_writes(together: Path, alone: Path) -> None:
    """The files of a run, and one line per saved file in the manifest."""

    def names(run: Path) -> list[str]:
        return sorted(path.name for path in run.iterdir())

    def lines(run: Path) -> list[tuple[str, int]]:
        periodic = [line for line in manifest(run) if not line["kind"].startswith(("last", "best"))]
        return [(line["file"], line["step"]) for line in periodic]

    assert names(together) == names(alone)
    assert lines(together) == lines(alone)
    assert len(list((together / "tensorboard").iterdir())) == 1


def test_one_two_two_one(tmp_path: Path, alone: Path) -> None:
    """A run that is stopped three times and changes its processes goes on each time at the very next step.

    First one process; then two, of which only the second is told to stop; then two by a signal to the launcher.
    """
    run = tmp_path / RUN
    process = start(tmp_path)
    wait_until(has_step(run, "stage_8", 2), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    for stage, reached in (("stage_8", 5), ("stage_16", 1)):
        process = start_two(tmp_path)
        wait_until(has_step(run, stage, reached), process)
        os.kill(second(process) if stage == "stage_8" else process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
        newest = max(manifest(run), key=lambda line: line["time"])
        assert f"step {newest['step']}; the state is saved" in output
        assert "is gone" not in output
    code, output = train(tmp_path)
    assert code == 0, output
    assert "resuming stage_" in output
    assert_close(series(run), series(alone))
    for stage in ("stage_8", "stage_16", "stage_32"):
        assert_close_state(run / f"{stage}_final.pt", alone / f"{stage}_final.pt")


def test_a_process_that_dies_takes_the_other_with_it(tmp_path: Path) -> None:
    """Killed in the middle of a stage: the first process says so and leaves, and nobody waits for ever."""
    process = start_two(tmp_path)
    wait_until(has_step(tmp_path / RUN, "stage_8", 2), process)
    os.kill(second(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "another process of this run is gone" in output


def test_a_batch_that_cannot_be_divided_ends_all_processes(tmp_path: Path) -> None:
    """Exit code 78, the reason once. The launcher may kill the second process before it has left by itself."""
    process = start_two(tmp_path, "--set", "stages.*.batch=3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.count("stages.stage_8.batch: 3 samples cannot be divided equally among 2 processes") == 1
    assert "exitcode  : 78" in output[output.index("Root Cause") :], output
    assert "is gone" not in output


def test_variables_of_a_cluster_do_not_make_a_process_wait(tmp_path: Path, alone: Path) -> None:
    """WORLD_SIZE=8 and an address that nobody answers at, without the launcher: one process, the same run."""
    code, output = train(tmp_path, "--stages", "stage_8", env=FOREIGN)
    assert code == 0, output
    assert_same_state(tmp_path / RUN / "stage_8_final.pt", alone / "stage_8_final.pt")
