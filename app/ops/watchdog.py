"""A trainer that hangs is ended with its stack traces in the log; a crash then, so it is started again.

The trainer asks `stop()` wherever it works. Under supervision each question leaves a byte in a pipe, and where none
comes for long enough, nothing works any more: a deadlock, a disk that does not answer, a stopped process.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import Stopped
from app.ops.supervise import descendants, living

log = logging.getLogger(__name__)

BEAT = b"\0"
"""A sign of life; everything else in the pipe is stack traces."""
BEAT_EVERY_S = 0.5
POLL_S = 0.1
ABSENT_S = 2.0
"""A listener that was away for this long, stopped or frozen with its container, has not heard a silence."""
PIPE_BYTES = 1 << 20
"""Room for the traces of all threads, of which the main one comes last."""
TRACES_TAKE_S = 1.0
SAVING_TAKES_S = 5.0
"""A trainer that still can saves its state on SIGTERM, within four seconds."""
KILLING_NOTICE_S = 60.0
STATES = {
    "R": "it computes",
    "S": "it sleeps",
    "D": "it waits for a disk or a network that does not answer",
    "T": "it is stopped (SIGSTOP)",
    "t": "a debugger holds it",
}


class Beat:
    """The question whether to stop, which leaves a sign of life each time that it is asked."""

    def __init__(self, stop: Callable[[], bool], pipe: int) -> None:
        """Write into the descriptor `pipe`; SIGUSR1 writes the stacks of all threads there."""
        self._stop, self._pipe = stop, pipe
        self._last = -BEAT_EVERY_S
        os.set_blocking(pipe, False)
        os.set_inheritable(pipe, False)
        faulthandler.register(signal.SIGUSR1, file=pipe, all_threads=True, chain=False)

    def __call__(self) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        if now - self._last >= BEAT_EVERY_S:
            self._last = now
            # Nobody may be there to listen, or have had the time to.
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe, BEAT)
        return self._stop()


class Silence:
    """How long nothing was heard, as far as somebody listened."""

    def __init__(self, now: float) -> None:
        self._since = self._listened = now

    def seconds(self, heard: bool, now: float) -> float:
        """The silence until `now`, where this is called again and again with whether something was heard."""
        if heard or now - self._listened > ABSENT_S:
            self._since = now
        self._listened = now
        return now - self._since


class Watchdog:
    """Waits for a trainer and ends it where it hangs; a context that owns the pipe."""

    def __init__(
        self, limit_s: float, stop: Callable[[], bool], in_log_file: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Open the pipe.

        Args:
            limit_s: a silence as long as this is a hang.
            stop: once somebody wants to stop, ending the trainer in time is others' business.
            in_log_file: a context in which log lines reach the log file too.
        """
        self._limit_s, self._stop, self._in_log_file = limit_s, stop, in_log_file
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        # Some machines grant less; then the traces may be cut short.
        with suppress(OSError):
            fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def start(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """The trainer, told where its signs of life go."""
        told = [*command, "--beat-fd", str(self._writer)]
        return subprocess.Popen(told, env=environment, pass_fds=(self._writer,))

    def wait(self, child: subprocess.Popen[bytes], over: Callable[[], bool] = lambda: False) -> tuple[int, bool]:
        """The exit code of the trainer, and whether it hung and ended by what was done about it.

        Args:
            child: the trainer.
            over: whether it must save and end; asked again and again.
        """
        silence = Silence(time.monotonic())
        told_at: float | None = None
        while (code := _ended(child, POLL_S)) is None:
            if told_at is None and over():
                told_at = time.monotonic()
                child.terminate()
            if told_at is not None and time.monotonic() - told_at > SAVING_TAKES_S and not self._stop():
                log.error("the trainer did not end within %.0f s of SIGTERM: it is killed", SAVING_TAKES_S)
                return self._kill(child, descendants()), False
            quiet_s = silence.seconds(heard=BEAT in self._read(), now=time.monotonic())
            if quiet_s > self._limit_s and not self._stop():
                with self._in_log_file():
                    code = self._end(child, quiet_s)
                # Its own verdict, where it came to one after all, counts more than that it took long.
                return code, code < 0 or code == Stopped.exit_code
        return code, False

    def _end(self, child: subprocess.Popen[bytes], quiet_s: float) -> int:
        """Traces first; then the chance to save; then the end of the trainer and all of its processes."""
        log.error(
            "the trainer hangs: no sign of life for %.0f s (compute.hang_after_s is %g); %s. It is ended and started "
            "again from its last checkpoint",
            quiet_s,
            self._limit_s,
            STATES.get(process_state(child.pid), "its state is unknown"),
        )
        family = descendants()
        child.send_signal(signal.SIGUSR1)
        child.send_signal(signal.SIGCONT)
        # The handler answers at once or, in a process that waits for a disk, not at all.
        code = _ended(child, TRACES_TAKE_S)
        traces = self._read().replace(BEAT, b"").decode(errors="replace").strip()
        log.error("where it hangs, all threads:\n%s", traces or "(it does not say)")
        if code is None:
            child.terminate()
            _ended(child, SAVING_TAKES_S)
        return self._kill(child, family)

    def _kill(self, child: subprocess.Popen[bytes], family: set[int]) -> int:
        child.kill()
        # Its workers too: one that is left would hold the run lock. They are nobody's children once it has ended.
        for pid in (family | descendants()) & set(living()) - {child.pid}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while (code := _ended(child, KILLING_NOTICE_S)) is None:
            log.error("the trainer cannot be killed while the kernel waits for a disk or a network; waiting, too")
        return code

    def _read(self) -> bytes:
        """What is in the pipe."""
        found = b""
        while True:
            try:
                part = os.read(self._reader, PIPE_BYTES)
            except BlockingIOError:
                return found
            found += part


def process_state(pid: int) -> str:
    """The letter in `/proc`, see proc(5); empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _ended(child: subprocess.Popen[bytes], within_s: float) -> int | None:
    try:
        return child.wait(within_s)
    except subprocess.TimeoutExpired:
        return None
