"""Claims about the lease: what another machine leaves in the lock file, heartbeats, and who wins."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.errors import LockError
from app.ops import lease as lease_module
from app.ops import run_lock
from app.ops.lease import WIDTH, Lease, age_s, decode, own_lease, read_lease
from app.ops.run_lock import SETTLE_S, RunLock
from tests.locks import (
    BEAT_S,
    LEASE_S,
    LONG_AGO_S,
    SETTLING_S,
    Holder,
    OwnLock,
    age,
    foreign,
    hold,
    path,
    seconds_waited,
)

__all__ = ["hold", "path"]  # fixtures


def test_a_live_holder_on_another_machine_is_found_by_its_heartbeat(path: Path) -> None:
    """Its flock does not reach here; the one heartbeat that is seen names it."""
    other = foreign(path)
    gone = threading.Event()

    def live() -> None:
        beat = 0
        while not gone.wait(BEAT_S):
            beat += 1
            path.write_bytes(replace(other, beat=beat).encode())

    heart = threading.Thread(target=live)
    heart.start()
    try:
        with pytest.raises(LockError, match=r"host pod-b, pid 4711, since "):
            OwnLock(path).__enter__()
    finally:
        gone.set()
        heart.join()
    lease = read_lease(path).lease
    assert lease is not None
    assert lease.token == other.token


def test_a_dead_holder_on_another_machine_is_outwaited(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not before the end of its lease; the log says for whom and how long, once."""
    foreign(path)
    with caplog.at_level(logging.INFO):
        taken = seconds_waited(path)
    assert LEASE_S - 0.5 < taken < LEASE_S + SETTLE_S + 1.0
    waits = [record.getMessage() for record in caplog.records if "waiting for at most" in record.getMessage()]
    assert len(waits) == 1
    assert "host pod-b, pid 4711" in waits[0]
    assert "waiting for at most 3 s" in waits[0]


def test_a_lease_that_ended_long_ago_costs_no_lease(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the volume's clock; only the moment passes in which another machine could do the same."""
    foreign(path)
    age(path, LONG_AGO_S)
    with caplog.at_level(logging.INFO):
        assert seconds_waited(path) < SETTLING_S
    assert "waiting" not in caplog.text


def test_the_age_is_that_of_the_volumes_clock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock may be wrong by an hour: the other one's lease lasts as long."""
    foreign(path)
    age(path, 2.0)
    wrong = time.time() + LONG_AGO_S
    monkeypatch.setattr(lease_module.time, "time", lambda: wrong)
    found = age_s(path, path.stat().st_mtime)
    assert found is not None
    assert 1.9 < found < 4.0
    assert list(path.parent.iterdir()) == [path]


def test_a_released_lock_of_another_machine_costs_no_lease(path: Path) -> None:
    """Same as one that ended long ago."""
    foreign(path, released=True)
    assert seconds_waited(path) < SETTLING_S


def test_the_lock_of_an_older_version_is_taken(path: Path) -> None:
    """It knew nothing but a process number, and no lease."""
    path.write_text('{"pid": 17}')
    assert seconds_waited(path) < SETTLING_S


def test_the_live_lock_of_an_older_version_is_respected(path: Path) -> None:
    """Its flock holds; the number is named."""
    path.write_text('{"pid": 17}')
    with path.open("r+") as older:
        fcntl.flock(older, fcntl.LOCK_EX)
        with pytest.raises(LockError, match=r"\(pid 17\)"):
            OwnLock(path).__enter__()


def test_a_torn_record_is_a_holder_of_unknown_name(path: Path) -> None:
    """Its lease is waited for, then it is overwritten."""
    path.write_bytes(own_lease(1).encode()[:300])
    assert LEASE_S - 0.5 < seconds_waited(path) < LEASE_S + SETTLE_S + 1.0


def test_half_of_a_new_record_over_an_old_one_is_torn(path: Path) -> None:
    """The checksum covers the record, so that no mixture passes for a holder; a whole one is read as it was."""
    old, new = own_lease(1), own_lease(1)
    assert decode(new.encode()) == new
    assert len(new.encode()) == WIDTH
    assert decode(new.encode()[:200] + old.encode()[200:]) is None
    for torn in (new.encode()[:-1], b"\x00garbage" * 40, b'{"pid": 12, "tok', b"[1]", b"{}", b'{"pid": "x"}', b"\xff"):
        assert decode(torn) is None


def test_a_record_that_is_read_half_written_is_read_again(path: Path) -> None:
    """What is whole a moment later counts."""
    whole = own_lease(1)
    path.write_bytes(b"half")
    timer = threading.Timer(0.03, lambda: path.write_bytes(whole.encode()))
    timer.start()
    assert read_lease(path).lease == whole
    timer.join()


def test_the_heartbeat_notices_the_loss_by_itself(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once in the log, remembered although the file says otherwise again, and the other's record untouched."""
    with OwnLock(path) as lock:
        mine = path.read_bytes()
        other = foreign(path)
        until(lambda: "the lock is lost" in caplog.text)
        assert path.read_bytes() == other.encode()
        path.write_bytes(mine)
        with pytest.raises(LockError, match="the lock is lost"):
            lock.check()
    assert caplog.text.count("the lock is lost") == 1
    assert path.read_bytes() == mine


def test_the_heartbeat_beats(path: Path) -> None:
    """The counter goes up, without a change of length."""
    with OwnLock(path):
        first = read_lease(path).lease
        assert first is not None
        until(lambda: beat_of(path) >= first.beat + 3)
        assert path.stat().st_size == WIDTH


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_failing_heartbeats_are_survived(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """Said once; the holder writes on as long as its token stands there; they go on when the volume does."""

    def fail(_descriptor: int, _lease: Lease) -> None:
        raise OSError(number, os.strerror(number))

    with caplog.at_level(logging.INFO), RunLock(path, lambda: False, lease_s=0.6, beat_s=0.1) as lock:
        with monkeypatch.context() as failing:
            failing.setattr(run_lock, "write_lease", fail)
            until(lambda: "heartbeat not written" in caplog.text)
            time.sleep(0.8)
            lock.check()
            before = beat_of(path)
        until(lambda: beat_of(path) > before)
        until(lambda: "heartbeats are written again" in caplog.text)
        lock.check()
    assert caplog.text.count(f"heartbeat not written ({os.strerror(number)})") == 1


def test_a_volume_that_cannot_be_read_stops_the_writing_after_a_lease(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For so long nobody can have taken it over; after that nobody knows."""

    def fail(_path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with RunLock(path, lambda: False, lease_s=0.6, beat_s=0.1) as lock:
        with monkeypatch.context() as failing:
            failing.setattr(run_lock, "read_lease", fail)
            failing.setattr(run_lock, "write_lease", lambda _descriptor, _lease: fail(path))
            lock.check()
            time.sleep(0.8)
            with pytest.raises(LockError, match="cannot be read for 1 s, so another machine may have taken the run"):
                lock.check()
        until(lambda: lock.check() is None)


def test_no_process_number_of_another_namespace_proves_a_death(path: Path) -> None:
    """Two containers of one machine: a number that does not exist here may live there."""
    here = own_lease(1)
    dead = replace(here, pid=2**22 + 1)
    assert dead.runs(here) is False
    assert replace(dead, pid_namespace="pid:[1]").runs(here) is None
    assert here.runs(here) is True
    assert replace(here, started=here.started - 1).runs(here) is False


@pytest.mark.parametrize("before", ["nothing", "blank", "released", "killed"])
def test_of_machines_that_come_at_the_same_moment_one_stays(
    path: Path, hold: Callable[..., Holder], before: str
) -> None:
    """No flock between them; whatever was there, one can write, the others end with 75 and a name."""
    if before == "blank":
        path.touch()
    elif before == "released":
        foreign(path, released=True)
    elif before == "killed":
        first = hold("pod-0")
        assert first.line() == "held"
        first.kill()
        age(path, LONG_AGO_S)
    at = time.time() + 1.0
    machines = [hold(f"pod-{number}", at) for number in range(4)]
    lines = [machine.line() for machine in machines]
    answers = [machine.ask() if line == "held" else line for machine, line in zip(machines, lines, strict=True)]
    staying = [number for number, answer in enumerate(answers) if answer == "mine"]
    assert lines.count("held") == len(staying) == 1, (lines, answers)
    # One that had signed and was overwritten a moment later may be named, too.
    names = {f"host pod-{number}, pid {machine.pid}" for number, machine in enumerate(machines)}
    for number in {*range(len(machines))} - {*staying}:
        assert any(name in answers[number] for name in names - {f"host pod-{number}, pid {machines[number].pid}"})
        assert machines[number].process.wait(10) == 75
    assert machines[staying[0]].ask() == "mine"


def test_whoever_signs_last_has_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine saw the same old record and wrote a moment later: this one is not let in."""
    foreign(path, released=True)
    write = run_lock.write_lease

    def write_and_be_overwritten(descriptor: int, lease: Lease) -> None:
        write(descriptor, lease)
        foreign(path)

    monkeypatch.setattr(run_lock, "write_lease", write_and_be_overwritten)
    with pytest.raises(LockError, match=r"another process has it now \(host pod-b, pid 4711"):
        OwnLock(path).__enter__()
    lease = read_lease(path).lease
    assert lease is not None
    assert (lease.host, lease.released) == ("pod-b", False)


def test_the_record_names_no_one_but_the_machine(path: Path) -> None:
    """What stands in the file, for people who look."""
    with OwnLock(path):
        fields = json.loads(path.read_bytes()[: WIDTH - 10])
    assert set(fields) == set(Lease.__dataclass_fields__)


def beat_of(path: Path) -> int:
    """The counter in the file."""
    lease = read_lease(path).lease
    return -1 if lease is None else lease.beat


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Poll."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
