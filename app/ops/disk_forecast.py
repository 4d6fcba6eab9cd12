"""Whether the volume takes the run to its end: what its checkpoints still need, and what else is written there.

The checkpoints are known beforehand, as many files of as many bytes; what others write is a trend of the last hours.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from app.config import CheckpointConfig, Config, StageConfig
from app.workspace import RunDir

log = logging.getLogger(__name__)

GIB, HOUR_S = 2**30, 3600.0
READ_EVERY_S = 60.0
TREND_S, TREND_AT_LEAST_S = 6 * HOUR_S, 600.0
"""The trend is over so many hours, and there is none before so many seconds."""
PERIODIC = re.compile(r"epoch_(\d+)")
BESIDE_PERIODIC = ("best", "final", "last", "last_previous")


class DiskForecast:
    """Free space of a run's volume, now and later.

    Args:
        run_dir: the run.
        config: how many checkpoints it writes and keeps.
        clock: seconds, monotonic.
    """

    def __init__(self, run_dir: RunDir, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._config, self._clock = run_dir, config, clock
        self._left_by_others: deque[tuple[float, float]] = deque()
        """(time, bytes): free space, had this run written nothing."""
        self._next_at = clock()
        self._warned = False

    def read(self, run_takes_s: float | None) -> dict[str, float]:
        """The `host/disk_...` figures; empty where the last ones are not old enough.

        Args:
            run_takes_s: estimated seconds to the end of the run; None while nobody knows.
        """
        now = self._clock()
        if now < self._next_at:
            return {}
        self._next_at = now + READ_EVERY_S
        free = float(shutil.disk_usage(self._run_dir.path).free)
        found = {"disk_free_gib": free / GIB}
        others_per_s = self._trend(now, free + self._written())
        kept = self._kept()
        if kept:
            needed = needed_bytes(self._config, kept)
            found["disk_needed_gib"] = needed / GIB
            if run_takes_s:
                room = max(0.0, free - self._config.checkpoint.min_free_gib * GIB)
                per_s = needed / run_takes_s + others_per_s
                if per_s > 0:
                    found["disk_full_in_h"] = room / per_s / HOUR_S
                if room < per_s * run_takes_s:
                    self._warn(
                        room, needed, room / per_s, run_takes_s, max(max(sizes.values()) for sizes in kept.values())
                    )
        return found

    def _trend(self, now: float, left: float) -> float:
        """Bytes/s that others write; 0 where they free space."""
        points = self._left_by_others
        points.append((now, left))
        while now - points[0][0] > TREND_S:
            points.popleft()
        seconds = now - points[0][0]
        return max(0.0, (points[0][1] - left) / seconds) if seconds >= TREND_AT_LEAST_S else 0.0

    def _written(self) -> int:
        """Bytes of the run's own files, a checkpoint that is being written among them."""
        sizes = (_size(entry) for entry in self._run_dir.path.iterdir() if entry.is_file())
        return sum(size for size in sizes if size is not None)

    def _kept(self) -> dict[str, dict[str, int]]:
        """Bytes of the checkpoints of each stage that has some, by kind."""
        kept: dict[str, dict[str, int]] = {}
        for stage, kind, path in self._run_dir.checkpoints():
            size = _size(path)
            if size:
                kept.setdefault(stage, {})[kind] = size
        return kept

    def _warn(self, room: float, needed: float, full_in_s: float, run_takes_s: float, largest: int) -> None:
        if not self._warned:
            log.warning(
                "the volume will be full in about %.1f h, and the run needs %.1f h more at this pace: %.2f GiB are "
                "left, room for %d checkpoints, and the run's checkpoints take about %.2f GiB more. Make room, or set "
                "checkpoint.keep_last_n_checkpoints",
                full_in_s / HOUR_S,
                run_takes_s / HOUR_S,
                room / GIB,
                room // largest,
                needed / GIB,
            )
        self._warned = True


def needed_bytes(config: Config, kept: Mapping[str, Mapping[str, int]]) -> float:
    """Bytes of the checkpoints that a run will add to those that are there.

    Args:
        config: of the run.
        kept: bytes of the files of each stage by kind; a stage without any is taken to be like the last one with some.
    """
    size, needed = 0, 0.0
    for stage in config.stages:
        own = kept.get(stage.name, {})
        size = max(own.values(), default=size)
        needed += size * files_to_come(stage, config.checkpoint, own)
    return needed


def files_to_come(stage: StageConfig, config: CheckpointConfig, kinds: Collection[str]) -> int:
    """How many checkpoints a stage will add to those of these kinds; none once it has its final one."""
    if "final" in kinds:
        return 0
    periodic = [match for match in map(PERIODIC.fullmatch, kinds) if match]
    every = config.save_every_n_epochs
    to_come = stage.epochs // every - max((int(match[1]) for match in periodic), default=0) // every
    if config.keep_last_n_checkpoints is not None:
        to_come = min(to_come, max(0, config.keep_last_n_checkpoints - len(periodic)))
    return to_come + len(set(BESIDE_PERIODIC) - set(kinds))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        # Replaced or deleted since the folder was read.
        return None
