"""Holders of a run lock for tests: real processes; another machine is a record with another kernel's name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from app.ops.lease import Lease, own_lease, read_lease
from app.ops.run_lock import SETTLE_S, RunLock
from tests.conftest import ROOT

LEASE_S, BEAT_S = 3.0, 0.3
LONG_AGO_S = 3600.0
SETTLING_S = 2 * SETTLE_S + 0.3
"""Where there is no lease to wait for, but other machines that may come at the same moment."""

HOLDER = """
import errno, os, sys, time
from pathlib import Path
from app.ops import lease, run_lock

path, machine, lease_s, beat_s, at = sys.argv[1:]
if machine:
    # A machine of its own: another kernel, and an flock that reaches no other.
    lease._boot_id = lambda: machine
    lease.socket.gethostname = lambda: machine
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks")
    run_lock.fcntl.flock = flock
while time.time() < float(at):
    pass
try:
    with run_lock.RunLock(Path(path), lambda: False, lease_s=float(lease_s), beat_s=float(beat_s)) as lock:
        print("held", flush=True)
        for word in sys.stdin:
            if word == "fork\\n":
                child = os.fork()
                if not child:
                    time.sleep(60)
                print(child, flush=True)
                continue
            lock.check()
            print("mine", flush=True)
except run_lock.LockError as error:
    print(error, flush=True)
    sys.exit(75)
"""


class Holder:
    """A process that holds the lock until it is told otherwise."""

    def __init__(self, path: Path, machine: str = "", at: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), machine, str(LEASE_S), str(BEAT_S), str(at)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str = "check") -> str:
        """What it answers: `mine`, or why not."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.line()

    def kill(self) -> None:
        """As a pod goes."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> int:
        """Leave the `with` block."""
        self.process.communicate(timeout=10)
        return self.process.returncode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run's lock file, not there yet."""
    return tmp_path / "run.lock"


@pytest.fixture
def hold(path: Path) -> Iterator[Callable[..., Holder]]:
    """Holders on that file."""
    made: list[Holder] = []

    def begin(machine: str = "", at: float = 0.0) -> Holder:
        made.append(Holder(path, machine, at))
        return made[-1]

    yield begin
    for holder in made:
        holder.kill()
        for pipe in (holder.process.stdin, holder.process.stdout):
            if pipe is not None:
                pipe.close()


class OwnLock(RunLock):
    """A lock of this process, which counts the seconds that it deliberately waits."""

    def __init__(self, path: Path, stop: Callable[[], bool] = lambda: False) -> None:
        super().__init__(path, stop, lease_s=LEASE_S, beat_s=BEAT_S)
        self.waited = 0.0

    def _pause(self, seconds: float) -> None:
        start = time.monotonic()
        super()._pause(seconds)
        self.waited += time.monotonic() - start


def foreign(path: Path, **changes: object) -> Lease:
    """Write the record of a trainer on another machine."""
    other = replace(own_lease(1), boot="another kernel", host="pod-b", pid=4711, **changes)
    path.write_bytes(other.encode())
    return other


def age(path: Path, seconds: float) -> None:
    """As if the last heartbeat had been so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def seconds_waited(path: Path) -> float:
    """Take the lock: how long this process waits for it, its own reading and writing left out."""
    with OwnLock(path) as lock:
        lock.check()
        lease = read_lease(path).lease
        assert lease is not None
        assert lease.pid == os.getpid()
    return lock.waited
