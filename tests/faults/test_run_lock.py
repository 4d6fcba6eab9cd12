"""Two trainers on one workspace, as real processes of the tiny cascade."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from app.ops.lease import own_lease, read_lease
from tests.runs import RUN, assert_same_run, has_step, manifest, start, train, wait_until

SAVE_SOMETIMES = ("--set", "checkpoint.save_every_s=0.15")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a trainer that was alone."""
    workspace = tmp_path_factory.mktemp("undisturbed")
    code, output = train(workspace, *SAVE_SOMETIMES)
    assert code == 0, output
    return workspace / RUN


def test_of_two_trainers_that_start_at_once_one_trains(tmp_path: Path, undisturbed: Path) -> None:
    """The other ends with 75, names the first one's process and writes nothing: the run is that of one trainer."""
    both = [start(tmp_path, *SAVE_SOMETIMES) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], outputs
    loser = 0 if both[0].returncode == 75 else 1
    assert f"pid {both[1 - loser].pid}, since " in outputs[loser]
    assert "another process trains in this run folder" in outputs[loser]
    assert "finished: all stages are trained" in outputs[1 - loser]
    assert not (tmp_path / RUN / "REASON").exists()
    assert_same_run(tmp_path / RUN, undisturbed)
    lease = read_lease(tmp_path / RUN / "run.lock").lease
    assert lease is not None
    assert (lease.released, lease.pid) == (True, both[1 - loser].pid)


def test_the_successor_of_a_killed_trainer_does_not_wait(tmp_path: Path, undisturbed: Path) -> None:
    """With loading processes that the killed one leaves behind: no lease is waited for, and the run has no seam."""
    run = tmp_path / RUN
    first = start(tmp_path, *SAVE_SOMETIMES, "--set", "compute.workers=2")
    wait_until(has_step(run, "stage_8", 2), first)
    first.kill()
    # Whoever still holds the pipe would keep `communicate` waiting: the workers are gone with their trainer.
    first.communicate(timeout=10)
    lease = read_lease(run / "run.lock").lease
    assert lease is not None
    assert (lease.released, lease.pid) == (False, first.pid)
    code, output = train(tmp_path, *SAVE_SOMETIMES)
    assert code == 0, output
    assert "waiting for at most" not in output
    assert_same_run(run, undisturbed)


def test_a_trainer_waits_for_the_lease_of_another_machine_and_leaves_when_told(tmp_path: Path) -> None:
    """Its log says for whom; SIGTERM ends the waiting with 143, and nothing was written."""
    (tmp_path / RUN).mkdir(parents=True)
    path = tmp_path / RUN / "run.lock"
    record = replace(own_lease(1), boot="another kernel", host="pod-b", pid=4711).encode()
    path.write_bytes(record)
    os.utime(path)
    process = start(tmp_path)
    log = tmp_path / "hybrid_vit_cascade/logs/train.log"
    waits = "another process may train here (host pod-b, pid 4711"
    wait_until(lambda: log.exists() and waits in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert time.monotonic() - began < 5
    assert path.read_bytes() == record
    assert [each.name for each in (tmp_path / RUN).iterdir()] == ["run.lock"]
    assert not manifest(tmp_path / RUN)
