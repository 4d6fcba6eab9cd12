"""The crash budget: how often the trainer may crash without progress, counted on the volume across containers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.errors import MachineError
from app.workspace import RunDir

BUDGET = 5
"""Crashes in a row, none of which came further than the one before."""

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

    def ended(self, code: int, crashed: bool) -> None:
        """The trainer was seen to end; a negative code is the number of the signal that killed it."""
        self._append({"event": "crash" if crashed else "end", "code": code, "progress": progress(self._run_dir)})

    def trains(self, stage: str, step: int, global_step: int, lost_steps: int) -> None:
        """A trainer goes on in `stage` after `step`; the one before had come `lost_steps` further than was saved."""
        self._append(
            {"event": "train", "stage": stage, "step": step, "global_step": global_step, "lost_steps": lost_steps}
        )

    def trained(self) -> list[int]:
        """Lost steps of each time that a trainer began or went on, the first of which is 0."""
        return [line["lost_steps"] for line in read_lines(self._run_dir.attempts) if line.get("event") == "train"]

    def forgive(self) -> None:
        """Somebody changed what crashed: counting begins anew."""
        self._append({"event": "forgiven"})

    def crashes(self) -> list[int]:
        """Exit codes of the crashes since the last progress, the first of which stands at that progress."""
        codes: list[int] = []
        reached: Progress = (-1, -1, -1)
        for line in read_lines(self._run_dir.attempts):
            if line.get("event") == "forgiven":
                codes = []
            elif line.get("event") == "crash":
                here = tuple(line["progress"])
                if here > reached:
                    codes = []
                reached = max(reached, here)
                codes.append(line["code"])
        return codes if progress(self._run_dir) <= reached else []

    def exhausted(self) -> bool:
        """Whether the budget is used up."""
        return len(self.crashes()) > BUDGET

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
