"""Claims about the run lock between processes of one machine, with real processes."""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from app.errors import LockError, Stopped
from app.ops import run_lock
from app.ops.lease import read_lease
from tests.locks import (
    LEASE_S,
    Holder,
    OwnLock,
    foreign,
    hold,
    path,
    seconds_waited,
)

__all__ = ["hold", "path"]  # fixtures


def test_the_second_is_refused_at_once_and_told_who_holds_it(path: Path, hold: Callable[..., Holder]) -> None:
    """Host, process, since when, last heartbeat, what to do; and the first one does not notice."""
    first = hold()
    assert first.line() == "held"
    second = OwnLock(path)
    with pytest.raises(LockError, match=r"another process trains in this run folder \(host \S+, pid \d+, ") as refused:
        second.__enter__()
    assert second.waited == 0
    text = str(refused.value)
    assert f"host {os.uname().nodename[:64]}, pid {first.pid}, since 20" in text
    assert re.search(r"last heartbeat \d s ago", text)
    assert text.endswith("Wait for it, stop it, or start a run of another name (RUN_NAME=...)")
    assert first.ask() == "mine"


def test_a_released_lock_is_taken_at_once(path: Path, hold: Callable[..., Holder]) -> None:
    """The file stays, and says so."""
    first = hold()
    assert first.line() == "held"
    assert first.end() == 0
    lease = read_lease(path).lease
    assert lease is not None
    assert (lease.released, lease.pid) == (True, first.pid)
    assert seconds_waited(path) == 0


def test_a_killed_holders_lock_is_taken_at_once(path: Path, hold: Callable[..., Holder]) -> None:
    """On the same machine there is no lease to wait for."""
    first = hold()
    assert first.line() == "held"
    first.kill()
    lease = read_lease(path).lease
    assert lease is not None
    assert not lease.released
    assert seconds_waited(path) == 0


def test_a_worker_that_outlives_its_killed_trainer_does_not_keep_the_lock(
    path: Path, hold: Callable[..., Holder]
) -> None:
    """A forked child lets go of the descriptor that it shares, as soon as it runs."""
    first = hold()
    assert first.line() == "held"
    child = int(first.ask("fork"))
    first.kill()
    try:
        assert seconds_waited(path) < 1
        os.kill(child, 0)
    finally:
        os.kill(child, SIGKILL)


def test_what_a_killed_trainer_left_is_waited_for(path: Path, hold: Callable[..., Holder]) -> None:
    """A process that keeps the descriptor for a moment, though the holder is dead for certain."""
    first = hold()
    assert first.line() == "held"
    first.kill()
    with path.open("r+") as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        timer = threading.Timer(1.0, lambda: fcntl.flock(left, fcntl.LOCK_UN))
        timer.start()
        taken = seconds_waited(path)
        timer.join()
    assert 0.8 < taken < run_lock.ORPHANS_S


def test_a_frozen_holder_finds_that_it_was_overtaken(path: Path, hold: Callable[..., Holder]) -> None:
    """Another machine signed while it was stopped: the first check after it refuses to write."""
    first = hold("pod-a")
    assert first.line() == "held"
    assert first.ask() == "mine"
    os.kill(first.pid, SIGSTOP)
    other = foreign(path)
    os.kill(first.pid, SIGCONT)
    answer = first.ask()
    assert "the lock is lost: another process has it now (host pod-b, pid 4711" in answer
    assert first.process.wait(10) == 75
    lease = read_lease(path).lease
    assert lease is not None
    assert lease.token == other.token
    assert not lease.released


def test_a_frozen_holder_that_nobody_overtook_goes_on(path: Path, hold: Callable[..., Holder]) -> None:
    """Its token still stands there."""
    first = hold("pod-a")
    assert first.line() == "held"
    os.kill(first.pid, SIGSTOP)
    time.sleep(LEASE_S + 0.5)
    os.kill(first.pid, SIGCONT)
    assert first.ask() == "mine"


def test_a_deleted_lock_is_a_lost_lock(path: Path) -> None:
    """Whoever deletes it lets another one in."""
    with OwnLock(path) as lock:
        path.unlink()
        with pytest.raises(LockError, match="the lock is lost: it was deleted"):
            lock.check()


def test_a_stop_ends_the_waiting(path: Path) -> None:
    """A pod that is taken away while it waits leaves at once, and the lease stays the other's."""
    other = foreign(path)
    start = time.monotonic()
    with pytest.raises(Stopped):
        OwnLock(path, stop=lambda: time.monotonic() - start > 0.3).__enter__()
    assert time.monotonic() - start < LEASE_S
    assert path.read_bytes() == other.encode()


def test_release_is_final(path: Path) -> None:
    """After it nothing may be written, though the `with` block goes on; a second one changes nothing."""
    with OwnLock(path) as lock:
        lock.release()
        after = path.read_bytes()
        with pytest.raises(LockError, match="not held by this process"):
            lock.check()
        assert seconds_waited(path) == 0
        later = path.read_bytes()
    assert later != after
    assert path.read_bytes() == later


def test_of_processes_that_come_at_the_same_moment_one_stays(path: Path, hold: Callable[..., Holder]) -> None:
    """On one machine, where flock decides."""
    at = time.time() + 1.0
    processes = [hold("", at) for _ in range(4)]
    lines = [process.line() for process in processes]
    assert lines.count("held") == 1, lines
    winner = processes[lines.index("held")]
    assert all(f"pid {winner.pid}," in line for line in lines if line != "held")
