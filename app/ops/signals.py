"""SIGTERM and SIGINT as a question that long work asks itself, and a thread that leaves when nobody answers."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)

ANSWER_WITHIN_S = 3.0
"""After a signal the process leaves by itself; if it has not by then, its watching thread leaves."""
GONE_AFTER_S = 3.7
"""A pod gives five seconds in all, and PID 1 needs the last of them."""
LISTENED = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1


def stop_with(parent: int) -> None:
    """Be asked to stop when the process that started this one is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        # It was gone before that could be noticed.
        os.kill(os.getpid(), signal.SIGTERM)


class StopSignal:
    """Callable: True once SIGTERM or SIGINT arrived. A second signal changes nothing.

    Args:
        leave: ends the process at once; called from a thread ANSWER_WITHIN_S after the signal. With None the process
            has all the time that it wants.
    """

    def __init__(self, leave: Callable[[], None] | None = None) -> None:
        """Install the handlers; main thread only."""
        self._asked_at: float | None = None
        self._first_work: Callable[[], None] | None = None
        self._last_work: Callable[[float], None] | None = None
        for number in LISTENED:
            signal.signal(number, self._remember)
        if leave is not None:
            # Python's handlers run between two bytecodes of the main thread, which may be in a native call for minutes.
            # What the interpreter writes into this pipe does not wait for that.
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader, leave), name="signals", daemon=True).start()

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._asked_at is not None

    def seconds_left(self) -> float:
        """Until the process will be gone; infinite while nobody asked for it."""
        return math.inf if self._asked_at is None else max(0.0, self._asked_at + GONE_AFTER_S - time.monotonic())

    def at_once(self, work: Callable[[], None]) -> None:
        """What the watching thread does as soon as the signal is there; now, where it has been."""
        self._first_work = work
        if self():
            work()

    def at_the_last_moment(self, work: Callable[[float], None] | None) -> None:
        """What the watching thread does before it leaves, given the seconds that it may take; None is nothing."""
        self._last_work = work

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def _watch(self, reader: int, leave: Callable[[], None]) -> None:
        # Other signals with a handler, such as SIGCHLD, stand in the pipe too.
        while not set(os.read(reader, 512)) & set(LISTENED):
            continue
        self._remember(0, None)
        if self._first_work is not None:
            self._first_work()
        while (left := self.seconds_left() - (GONE_AFTER_S - ANSWER_WITHIN_S)) > 0:
            time.sleep(left)
        if self._last_work is not None:
            self._last_work(self.seconds_left())
        log.error("left %.1f s after the signal, in the middle of a call that did not return", ANSWER_WITHIN_S)
        leave()
