"""The crash budget: how often the trainer may crash without progress, counted on the volume across containers.

Two budgets: any crashes, `BUDGET` of them; and the same error at the same step, which does not go away by trying again.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.errors import LockError, MachineError
from app.ops.step_mark import marked
from app.workspace import RunDir

log = logging.getLogger(__name__)

BUDGET = 5
"""Crashes in a row, none of which came further than the one before."""
TRIES_BEFORE_FALL_BACK = 2
"""Once may be the machine; twice the same error at the same step is the state or what it is trained on."""
CODE = Path(__file__).resolve().parents[1]

Progress = tuple[int, int, int]
"""(edge of the stage, completed epochs, completed steps) of the furthest checkpoint; (0, 0, 0) before the first."""


def progress(run_dir: RunDir) -> Progress:
    """How far the checkpoints of a run are, by its manifest."""
    furthest = (0, 0, 0)
    for line in read_lines(run_dir.manifest):
        if line.get("state") == "committed":
            edge = int(line["stage"].removeprefix("stage_"))
            furthest = max(furthest, (edge, int(line["epochs"]), int(line["step"])))
    return furthest


def error_place(error: BaseException) -> str:
    """The kind of an error and the innermost line of this application that it passed: `ValueError at app/x.py:88`.

    It is the same each time that the error comes again, and unlike the message it never holds a name or a path.
    """
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(CODE):
            place = f"{path.relative_to(CODE.parent)}:{frame.lineno}"
    return f"{type(error).__name__} at {place}"


@dataclass(frozen=True)
class Repetition:
    """An error that ended the trainer, and what was done about it."""

    error: str
    """See `error_place`."""
    global_step: int
    """Completed steps of the run when it came first."""
    times: int = 1
    fell_back: bool = False
    """A trainer was told to go on from the state before."""
    older_state: str | None = None
    """Name of that state's file; None where there was none."""
    final: bool = False
    """It came again after that."""

    @property
    def wants_fall_back(self) -> bool:
        """Whether the next attempt should begin at the state before."""
        return self.times >= TRIES_BEFORE_FALL_BACK and not self.fell_back

    def again(self, error: str, global_step: int) -> Repetition:
        """After one more error: this one once more, or another one for the first time."""
        # From an older state it may come earlier; whatever comes later than it did has passed it.
        at_same_step = global_step <= self.global_step if self.fell_back else global_step == self.global_step
        if error != self.error or not at_same_step:
            return Repetition(error, global_step)
        return replace(self, times=self.times + 1, final=self.fell_back)


class Attempts:
    """Starts and ends of the trainer in `attempts.jsonl`: the supervisor writes them, and the trainer where it goes on.

    A start without an end was seen by nobody, because the machine went with it: an interruption, not a crash.
    """

    def __init__(self, run_dir: RunDir) -> None:
        """Open the ledger of a run; nothing is read or written yet."""
        self._run_dir = run_dir

    def started(self, pid: int) -> None:
        """A trainer was started."""
        self._append({"event": "start", "pid": pid})

    def ended(self, code: int, crashed: bool, hung: bool = False) -> None:
        """The trainer was seen to end; a negative code is the number of the signal that killed it."""
        how = {"hang": True} if hung else {}
        self._append({"event": "crash" if crashed else "end", "code": code, **how, "progress": progress(self._run_dir)})

    def failed(self, error: BaseException, global_step: int | None) -> None:
        """The trainer ends by an error that nobody foresaw, with this many steps of the run completed."""
        self._append({"event": "error", "error": error_place(error), "global_step": global_step or 0})

    def fell_back(self, older_state: str | None) -> None:
        """The newest state was set aside and the run goes on from this file; None: there was no older state."""
        self._append({"event": "fell_back", "to": older_state})

    def trains(self, stage: str, step: int, global_step: int, lost_steps: int) -> None:
        """A trainer goes on in `stage` after `step`; the one before had come `lost_steps` further than was saved."""
        self._append(
            {"event": "train", "stage": stage, "step": step, "global_step": global_step, "lost_steps": lost_steps}
        )

    def trained(self) -> list[int]:
        """Lost steps of each time that a trainer began or went on, the first of which is 0."""
        return [line["lost_steps"] for line in read_lines(self._run_dir.attempts) if line.get("event") == "train"]

    def seen_end(self) -> tuple[int, bool] | None:
        """Exit code of the trainer that went on last and whether it hung; None where no supervisor saw it end."""
        found = None
        for line in read_lines(self._run_dir.attempts):
            match line.get("event"):
                case "train":
                    found = None
                # Whoever was turned away meanwhile by the run lock is another one.
                case "crash" | "end" if found is None and line["code"] != LockError.exit_code:
                    found = (int(line["code"]), bool(line.get("hang")))
        return found

    def forgive(self) -> None:
        """Somebody changed what crashed: counting begins anew."""
        self._append({"event": "forgiven"})

    def crashes(self) -> list[int | None]:
        """Exit codes of the crashes since the last progress, the first of which stands at that progress.

        None is a trainer that hung and was ended.
        """
        codes: list[int | None] = []
        reached: Progress = (-1, -1, -1)
        for line in read_lines(self._run_dir.attempts):
            if line.get("event") == "forgiven":
                codes = []
            elif line.get("event") == "crash":
                here = tuple(line["progress"])
                if here > reached:
                    codes = []
                reached = max(reached, here)
                codes.append(None if line.get("hang") else line["code"])
        return codes if progress(self._run_dir) <= reached else []

    def repetition(self) -> Repetition | None:
        """The error of the last crash that left one, with how often it came; crashes by a signal leave none."""
        found: Repetition | None = None
        error: tuple[str, int] | None = None
        for line in read_lines(self._run_dir.attempts):
            match line.get("event"):
                case "start":
                    error = None
                case "error":
                    error = line["error"], line["global_step"]
                case "crash" if error is not None:
                    found = Repetition(*error) if found is None else found.again(*error)
                    error = None
                case "fell_back" if found is not None:
                    found = replace(found, fell_back=True, older_state=line["to"])
                case "forgiven":
                    found = None
        return found

    def exhausted(self) -> bool:
        """Whether a budget is used up."""
        repeated = self.repetition()
        return len(self.crashes()) > BUDGET or (repeated is not None and repeated.final)

    def _append(self, line: dict[str, object]) -> None:
        path = self._run_dir.attempts
        try:
            with path.open("ab") as file:
                # The line break comes first: what a kill tore stays alone on its line.
                file.write(b"\n" + json.dumps({**line, "time": time.time()}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"cannot write {path}: {error.strerror}") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file; torn ones, which a killed writer leaves, are passed over."""
    if not path.exists():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def record_crash(error: Exception, run_dir: RunDir) -> None:
    """For the supervisor to see whether the same error comes again at the same step."""
    try:
        Attempts(run_dir).failed(error, marked(run_dir.step_mark))
    except (MachineError, OSError) as problem:
        log.error("the crash cannot be recorded: %s", problem)
