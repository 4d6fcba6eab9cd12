"""One process per run folder."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import LockError


class RunLock:
    """An flock on `run.lock`, held from `with` to the end of the process; the file names the holder."""

    def __init__(self, path: Path) -> None:
        """`path` is created where it is missing and never deleted: deleting would let two holders in."""
        self.path = path

    def __enter__(self) -> Self:
        """Take the lock at once.

        Raises:
            LockError: another process holds it.
        """
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise LockError(
                f"{self.path}: another process trains in this run folder ({holder}). Wait for it, stop it, or start "
                "a run of another name (RUN_NAME=...)"
            ) from error
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid()}))
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go."""
        self._file.close()
