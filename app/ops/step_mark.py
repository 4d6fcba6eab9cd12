"""How far a process came, whether or not its state was saved: what a kill costs is the difference."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

WIDTH = 20
"""Characters of each number; of constant length, so that overwriting them needs no room on a full volume."""


@dataclass(frozen=True)
class Mark:
    """What a process left of its newest step."""

    global_step: int
    """Completed optimizer steps over all stages."""
    run_seconds: float | None = None
    """Spent on these steps and their validations, in all attempts; None where an older version wrote the file."""
    time: float | None = None
    """Seconds since 1970 when the step was completed."""


class StepMark:
    """The number of optimizer steps over all stages that were completed, kept in a file of one line.

    Not synced: it outlives a killed process, which is what it is for, and costs a step about ten microseconds.
    """

    def __init__(self, path: Path, at: int, run_seconds: float = 0.0) -> None:
        """Open the mark and set it to `at`, where this attempt begins."""
        self._path = path
        self._failed = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self(at, run_seconds)

    def __call__(self, global_step: int, run_seconds: float) -> None:
        """This many steps are completed, and this long it took."""
        try:
            line = f"{global_step:{WIDTH}d}{run_seconds:{WIDTH}.3f}{time.time():{WIDTH}.3f}\n"
            os.pwrite(self._file, line.encode(), 0)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s): lost steps are not counted", self._path, error.strerror)
            self._failed = True

    def close(self) -> None:
        """Close the file; the numbers stay."""
        os.close(self._file)


def read_mark(path: Path) -> Mark | None:
    """The numbers in the file; None where there are none."""
    try:
        step, *seconds = path.read_text().split()
        return Mark(int(step), *map(float, seconds))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def marked(path: Path) -> int | None:
    """The number of steps in the file; None where there is none."""
    mark = read_mark(path)
    return None if mark is None else mark.global_step
