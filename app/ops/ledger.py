"""The ledger of a run: what each attempt at it did and what the end of the one before had cost, in `ledger.jsonl`.

start   where the attempt goes on and on what machine; how the attempt before ended, and what was lost with it
step    its first step is completed: everything before was start-up
end     exit code and steps done; without a number, the attempt ended before it knew where to go on

Lines are only ever appended, and only by the process that holds the run lock. An attempt without an end was killed with
its machine: what came of it stands in the start of the next one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from app.errors import LockError
from app.ops.ledger_history import HUNG, VANISHED, Attempt, End, History, Place, kind_of, read_history
from app.ops.step_mark import Mark
from app.workspace import RunDir

log = logging.getLogger(__name__)

LATER = ("first_step", "end")
"""Fields of an attempt that come with lines of their own."""


class Ledger:
    """This attempt's lines; a context whose end is the attempt's, with the run lock held.

    A volume that takes no line costs the line and nothing else.
    """

    def __init__(
        self,
        run_dir: RunDir,
        fence: Callable[[], None],
        exit_code: Callable[[BaseException], int],
        *,
        began: float,
        pod: str | None,
        usd_per_hour: float | None = None,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            run_dir: the run.
            fence: asked before each line; raises where the run is no longer ours.
            exit_code: of the process that ends by this error.
            began: start of the process, in seconds since 1970.
            pod: id of the pod at RunPod; None elsewhere.
            usd_per_hour: price of the machine; None where it is not known.
        """
        self._path, self._fence, self._exit_code = run_dir.ledger, fence, exit_code
        self._began, self._pod, self._usd_per_hour = began, pod, usd_per_hour
        self._number: int | None = None
        self._stepped = False
        self._reached: int | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LockError) or (error is None and self._number is None):
            # Another process's run now; or all stages were finished before.
            return
        code = 0 if error is None else self._exit_code(error)
        end = {"kind": kind_of(code), "code": code, "global_step": self._reached}
        try:
            self._append({"event": "end", "attempt": self._number, "time": time.time(), **end})
        except LockError:
            log.warning("%s gets no line for the end of this attempt: the run is another process's", self._path)

    def start(self, place: Place, lost_steps: int, mark: Mark | None, seen: tuple[int, bool] | None) -> History:
        """The state is loaded: what came before stands in the line.

        Args:
            place: where this attempt goes on.
            lost_steps: completed by the attempt before beyond that place.
            mark: what the attempt before left of its newest step.
            seen: its exit code, and whether it hung, if a supervisor saw it end.

        Returns:
            All attempts, this one the last; none where the volume does not answer.

        Raises:
            LockError: the run is no longer ours.
        """
        try:
            history = read_history(self._path)
        except OSError as error:
            log.warning("%s cannot be read (%s): this attempt is missing in it", self._path, error.strerror)
            self._failed = True
            return History()
        if history.torn:
            log.warning("%s: torn lines were passed over: %d", self._path, history.torn)
        before = history.attempts[-1] if history.attempts else None
        repeated_s = down_s = 0.0
        if mark is not None and mark.run_seconds is not None:
            repeated_s = max(0.0, mark.run_seconds - place.run_seconds)
        if before is not None:
            signs = [before.last_sign, (mark and mark.time) or 0.0]
            down_s = max(0.0, self._began - max(signs))
        attempt = Attempt(
            number=1 if before is None else before.number + 1,
            began=self._began,
            time=time.time(),
            host=socket.gethostname(),
            pod=self._pod,
            place=place,
            previous=None if before is None else _found(before, mark, seen),
            lost_steps=lost_steps,
            repeated_s=round(repeated_s, 3),
            down_s=round(down_s, 3),
            usd_per_hour=self._usd_per_hour,
        )
        self._number, self._reached = attempt.number, place.global_step
        self._append({"event": "start", **{key: value for key, value in asdict(attempt).items() if key not in LATER}})
        history.attempts.append(attempt)
        return history

    def stepped(self, global_step: int) -> None:
        """This many steps of the run are completed.

        Raises:
            LockError: the run is no longer ours.
        """
        self._reached = global_step
        if not self._stepped:
            self._stepped = True
            self._append({"event": "step", "attempt": self._number, "time": time.time()})

    def _append(self, line: dict[str, Any]) -> None:
        self._fence()
        try:
            with self._path.open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                # What a killed write or a full volume tore stays alone on its line.
                torn = size > 0 and file.read(1) != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s): this attempt is missing in it", self._path, error.strerror)
            self._failed = True


def _found(before: Attempt, mark: Mark | None, seen: tuple[int, bool] | None) -> End:
    """How the attempt before ended: its own word, else the supervisor's, else nobody's."""
    reached = None if mark is None else mark.global_step
    code, hung = seen or (None, False)
    if hung:
        # One that hung may have come to itself when it was told to stop, and have said so.
        return End(HUNG, code, reached, None if before.end is None else before.end.time)
    if before.end is not None:
        return before.end
    return End(VANISHED if code is None else kind_of(code), code, reached, None)
