"""What a volume takes: its write speed, a forecast before each save, and the errors of one that takes no more."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
from pathlib import Path

from app.errors import MachineError

log = logging.getLogger(__name__)
MIB, GIB = 2**20, 2**30
TEST_BLOCKS = 16
"""Of a MiB each."""


def write_speed(folder: Path) -> float:
    """Write speed in MiB/s, by a test file that is written durably and deleted; it meets quotas too.

    Raises:
        OSError: the volume does not take the file.
    """
    block = os.urandom(MIB)
    path = folder / f".probe.{secrets.token_hex(4)}.tmp"
    started = time.monotonic()
    try:
        with path.open("xb", buffering=0) as file:
            for _ in range(TEST_BLOCKS):
                file.write(block)
            os.fsync(file.fileno())
        return TEST_BLOCKS / (time.monotonic() - started)
    finally:
        path.unlink(missing_ok=True)


def expect_writable(folder: Path) -> float:
    """As `write_speed`, before a run begins.

    Raises:
        MachineError: nothing can be written at all.
    """
    try:
        speed = write_speed(folder)
    except OSError as error:
        raise MachineError(
            f"{folder} does not take a test file of {TEST_BLOCKS} MiB: {error.strerror}. The checkpoints so far are "
            "whole. Make room or mount a larger volume, then run the same command"
        ) from error
    log.info("the volume writes %.0f MiB/s", speed)
    return speed


def expect_room(folder: Path, size: int, spare_gib: float) -> None:
    """Forecast whether a file of `size` bytes fits and leaves `spare_gib` free.

    Raises:
        OSError: it does not (ENOSPC).
    """
    free = shutil.disk_usage(folder).free
    if free - size < spare_gib * GIB:
        found = f"{free / GIB:.2f} GiB are free, a save takes {size / GIB:.2f}"
        raise OSError(errno.ENOSPC, f"{found}, and {spare_gib:g} stay free (checkpoint.min_free_gib)")


def volume_error(error: BaseException | None) -> OSError | None:
    """The error of a full or read-only volume that is behind `error`; torch wraps it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
