"""`manifest.jsonl`: a line for everything that happened to a checkpoint file of a run; lines are only added."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.workspace import atomic_write

log = logging.getLogger(__name__)

LINES_AT_MOST = 2000
"""A longer manifest is cut at the next start to the lines that still say something."""
LINES_PER_FILE = 4
"""`pending` and `committed` of a file and of the one that had its name before: `_last` becomes `_last_previous`."""

Line = dict[str, Any]
"""file, stage, kind, epochs, step, sha256, state, and more that is for people."""


class Manifest:
    """The lines of one run.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line) -> None:
        """Add a line, durably, and after a torn one on a line of its own."""
        with self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
                file.write(b"\n" if torn else b"")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[Line]:
        """All whole lines, the oldest first."""
        return list(self._read())

    def shorten(self, lines: Sequence[Line]) -> None:
        """Where there are too many, keep the newest ones of each file; `lines` are all of them."""
        if len(lines) <= LINES_AT_MOST:
            return
        newest: dict[str, list[Line]] = {}
        for line in lines:
            newest.setdefault(line["file"], []).append(line)
        kept = {id(line) for group in newest.values() for line in group[-LINES_PER_FILE:]}
        text = "".join(json.dumps(line) + "\n" for line in lines if id(line) in kept)
        atomic_write(self.path, text.encode())

    def _read(self) -> Iterator[Line]:
        if not self.path.exists():
            return
        for number, text in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                line = json.loads(text)
                line["file"], line["sha256"], line["stage"], line["kind"], line["epochs"], line["step"], line["state"]
            except (ValueError, KeyError, TypeError):
                log.warning("%s:%d is torn and was skipped", self.path, number)
                continue
            yield line
