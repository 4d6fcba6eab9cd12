"""One process per run folder, on one machine and on several that mount the same volume.

Within one kernel an flock on `run.lock` decides, which a dead process cannot hold. Between machines it may not reach,
so the file also carries a lease (`app.ops.lease`) that a heartbeat renews; whoever's token stands there is the holder.
A successor takes it

at once                       nobody was there, it was released, or its holder is dead for certain
after the rest of the lease   the holder was on another machine and its heartbeat stays out
never                         the heartbeat goes on: LockError

Two who take it at the same moment: the token written last counts. A holder that was frozen or cut off for longer than
its lease finds another token, and `check` keeps it from writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import LockError, MachineError, Stopped
from app.ops.lease import Reading, age_s, own_lease, read_lease, write_lease

log = logging.getLogger(__name__)

LEASE_S, BEAT_S = 20.0, 5.0
"""Three heartbeats may be lost to a slow volume; all holders of one volume must agree on these."""
SETTLE_S = 1.0
"""For a record to be seen by another machine that writes its own at the same moment."""
ORPHANS_S = 5.0
"""For a killed process's children to be gone, and for a new holder to write who it is."""
LONG_AGO = 10
"""Leases: beyond so many, clocks that differ are no reason to look for a heartbeat."""
POLL_S = 0.1
RELEASE_S = 1.0
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Goes on while the machine is suspended, as the lease does."""

ADVICE = "Wait for it, stop it, or start a run of another name (RUN_NAME=...)"


class RunLock:
    """The right to write in a run folder, from `with` to its end; `run.lock` names the holder and is never deleted."""

    def __init__(
        self, path: Path, stop: Callable[[], bool], *, lease_s: float = LEASE_S, beat_s: float = BEAT_S
    ) -> None:
        """Nothing happens before `with`.

        Args:
            path: `run.lock` of the run folder.
            stop: polled while waiting.
            lease_s: how long a holder that does not answer is believed to be alive.
            beat_s: between two heartbeats.
        """
        self.path, self.stop, self.lease_s, self.beat_s = path, stop, lease_s, beat_s
        self._descriptor: int | None = None
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._signed = False
        self._lost = ""
        self._writes_fail = False

    def __enter__(self) -> Self:
        """Take the lock, waiting where that is promising.

        Raises:
            LockError: another process holds it; the message names it.
            Stopped: `stop` said so while waiting.
            MachineError: the file cannot be opened.
        """
        self._descriptor, created = self._open()
        self._lease = own_lease(os.fstat(self._descriptor).st_dev)
        self._renewed = _now()
        _held.add(self)
        try:
            self._acquire(self._descriptor, created)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def check(self) -> None:
        """The fence: call it right before each commit of a file. Reads one small file.

        Raises:
            LockError: the lease is no longer this process's, or nobody can know.
        """
        if self._descriptor is None:
            raise LockError(f"{self.path}: not held by this process")
        if _now() - self._renewed > self.lease_s and self._renewing.acquire(blocking=False):
            try:
                self._renew()
            finally:
                self._renewing.release()
        if not self._is_mine() and not self._lost and _now() - self._renewed > self.lease_s:
            raise LockError(
                f"{self.path}: cannot be read for {_now() - self._renewed:.0f} s, so another machine may have taken "
                "the run over. Nothing more is written; look after the volume, then run the same command"
            )
        if self._lost:
            raise LockError(self._lost)

    def release(self) -> None:
        """Mark the lease as released, so that the next one need not wait, and let go. Any thread; twice is once."""
        self._ended.set()
        if not self._renewing.acquire(timeout=RELEASE_S):
            # The heartbeat hangs in the volume, and its descriptor must not become another file's under it.
            return
        try:
            descriptor, self._descriptor = self._descriptor, None
            _held.discard(self)
            if descriptor is None:
                return
            try:
                if self._signed and not self._lost and self._is_mine():
                    write_lease(descriptor, replace(self._lease, time=time.time(), released=True))
            except OSError as error:
                log.warning("%s: could not be marked as released (%s); the next one waits", self.path, error.strerror)
            finally:
                os.close(descriptor)
        finally:
            self._renewing.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go."""
        self.release()

    def leave_to_the_parent(self) -> None:
        """In a forked child: the lock is its parent's, and must end with it."""
        descriptor, self._descriptor = self._descriptor, None
        # The parent's heartbeat may have been at work, and in this process nobody ends it.
        self._renewing = threading.Lock()
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _open(self) -> tuple[int, bool]:
        """The descriptor, and whether the file is new: of all machines, one creates it."""
        try:
            with contextlib.suppress(FileExistsError):
                return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), False
        except OSError as error:
            raise MachineError(
                f"cannot open {self.path}: {error.strerror}. This user (uid {os.getuid()}) must be able to write it"
            ) from error

    def _acquire(self, descriptor: int, created: bool) -> None:
        flocked = self._flock(descriptor)
        found = read_lease(self.path)
        lease = found.lease
        # One machine at most is in one of these two positions, so it need not look whether another is as fast.
        first = created and found.blank
        heir = (
            flocked
            and lease is not None
            and lease.same_mount(self._lease)
            and (lease.released or lease.runs(self._lease) is not True)
        )
        if not (first or heir):
            self._outwait(found)
        self._signed = True
        write_lease(descriptor, self._lease)
        self._renewed = _now()
        if not (first or heir):
            self._pause(SETTLE_S)
            self.check()

    def _flock(self, descriptor: int) -> bool:
        """False where the volume has no flock; True once it is taken."""
        deadline = _now() + ORPHANS_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                log.warning("%s: this volume has no flock (%s); only the lease counts", self.path, error.strerror)
                return False
            else:
                return True
            found = read_lease(self.path)
            lease = found.lease
            # Nobody alive is named: a killed trainer's children are still there, or its successor has yet to sign.
            unnamed = lease is None or lease.released or lease.runs(self._lease) is False
            if not unnamed or _now() > deadline:
                raise self._refusal(found)
            self._pause(POLL_S)

    def _outwait(self, found: Reading) -> None:
        """Return when the lease that was found can be taken.

        Raises:
            LockError: its holder lives.
        """
        seconds = self._to_wait(found)
        if seconds > SETTLE_S:
            log.info("%s: another process may train here (%s); waiting for at most %.0f s", self.path, found, seconds)
        deadline = _now() + seconds
        while _now() < deadline:
            self._pause(POLL_S)
            now = read_lease(self.path)
            if now.raw == found.raw:
                continue
            if now.lease is not None and not now.lease.released:
                raise self._refusal(now)
            found, deadline = now, _now() + self._to_wait(now)

    def _to_wait(self, found: Reading) -> float:
        """For how long the record must stay as it is before it can be taken."""
        lease = found.lease
        # An older format had no heartbeat, only the flock.
        gone = found.blank or (
            lease is not None and (lease.released or not lease.token or lease.runs(self._lease) is False)
        )
        if gone:
            return SETTLE_S
        age = age_s(self.path, found.modified)
        if age is None:
            return max(SETTLE_S, self.lease_s)
        if age >= LONG_AGO * self.lease_s:
            return SETTLE_S
        # Some volumes stamp files by the clocks of their clients, which may differ, so a heartbeat's time is the least.
        return max(SETTLE_S, min(self.lease_s, max(self.lease_s - age, 2 * self.beat_s)))

    def _refusal(self, found: Reading) -> LockError:
        return LockError(f"{self.path}: another process trains in this run folder ({found}). {ADVICE}")

    def _pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            Stopped: `stop` says so.
        """
        deadline = _now() + seconds
        while True:
            if self.stop():
                raise Stopped("stopped while waiting for the run lock")
            left = deadline - _now()
            if left <= 0:
                return
            time.sleep(min(POLL_S, left))

    def _beat(self) -> None:
        """The heartbeat's thread."""
        # A signal is for the main thread, which may be asleep and would not wake up for one that arrives here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while not self._ended.wait(self.beat_s) and not self._lost:
            with self._renewing:
                self._renew()

    def _renew(self) -> None:
        """Write the next heartbeat, unless another holder's stands there; a failure is tried again, not raised."""
        if self._descriptor is None or (not self._is_mine() and self._lost):
            return
        beat = replace(self._lease, beat=self._lease.beat + 1, time=time.time())
        try:
            write_lease(self._descriptor, beat)
        except OSError as error:
            if not self._writes_fail:
                log.warning("%s: heartbeat not written (%s); tried again", self.path, error.strerror)
            self._writes_fail = True
            return
        if self._writes_fail:
            log.info("%s: heartbeats are written again", self.path)
        self._lease, self._renewed, self._writes_fail = beat, _now(), False

    def _is_mine(self) -> bool:
        """Whether the file says so; False also where it says nothing. That another has it is remembered for good."""
        try:
            found = read_lease(self.path)
        except OSError:
            return False
        if found.lease is not None and found.lease.token == self._lease.token:
            return True
        if (found.missing or found.lease is not None) and not self._lost:
            what = "it was deleted" if found.missing else f"another process has it now ({found})"
            self._lost = (
                f"{self.path}: the lock is lost: {what}. This process was frozen or cut off for longer than "
                f"{self.lease_s:.0f} s, or lost a race. It writes nothing more; the same command goes on when the lock "
                "is free"
            )
            log.error("%s", self._lost)
        return False


def _now() -> float:
    return time.clock_gettime(CLOCK)


_held: set[RunLock] = set()


def _leave_all_to_the_parent() -> None:
    for lock in _held:
        lock.leave_to_the_parent()
    _held.clear()


# A loading process that outlives its killed trainer would keep the lock, because it shares the descriptor.
os.register_at_fork(after_in_child=_leave_all_to_the_parent)
