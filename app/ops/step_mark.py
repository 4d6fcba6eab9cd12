"""How far a process came, whether or not its state was saved: what a kill costs is the difference."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

WIDTH = 20
"""Digits of the number; of constant length, so that overwriting it needs no room on a full volume."""


class StepMark:
    """The number of optimizer steps over all stages that were completed, kept in a file of one line.

    Not synced: it outlives a killed process, which is what it is for, and costs a step two microseconds.
    """

    def __init__(self, path: Path, at: int) -> None:
        """Open the mark and set it to `at`, where this attempt begins."""
        self._path = path
        self._failed = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self(at)

    def __call__(self, global_step: int) -> None:
        """This many steps are completed."""
        try:
            os.pwrite(self._file, f"{global_step:{WIDTH}d}\n".encode(), 0)
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s): lost steps are not counted", self._path, error.strerror)
            self._failed = True

    def close(self) -> None:
        """Close the file; the number stays."""
        os.close(self._file)


def marked(path: Path) -> int | None:
    """The number in the file; None where there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
