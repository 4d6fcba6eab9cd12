"""What is said aloud about GPUs: one that does nothing for minutes, one that is throttled, one whose memory fails."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from app.ops.nvml import GpuReading

log = logging.getLogger(__name__)

IDLE_AFTER_S = 180.0
IDLE_PERCENT = 5.0
"""Mean utilisation over that time below which a GPU counts as idle; from twice as much on it counts as busy again."""
MOSTLY = 0.5
"""A share of the time from which on a wait for data is the likely cause."""
AGAIN_AFTER_S = 600.0
"""A reason for throttling that was away for so long is news again."""


class Steps(NamedTuple):
    """What the training thread did since its start."""

    completed: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0
    """Of these, for samples."""
    waiting: bool = False
    """Whether it is waiting for samples at this moment."""


class IdleAlarm:
    """Warns once for each time that a GPU of the run idles, and says what the trainer does meanwhile.

    Args:
        trains_on: how many GPUs the run uses, from number 0 on; others may idle.
        workers: `compute.workers`, for the hint.
    """

    def __init__(self, trains_on: int, workers: int) -> None:
        self._hint = f"Raise compute.workers ({workers} now), or put the workspace's cache on a faster volume"
        self._seen: dict[int, deque[tuple[float, float, Steps]]] = {number: deque() for number in range(trains_on)}
        """(time, utilisation in %, steps so far) of the last minutes."""
        self._idle: set[int] = set()

    def __call__(self, now: float, readings: Mapping[int, GpuReading], steps: Steps) -> None:
        """Look at one reading of all GPUs, at `now` in seconds."""
        for number, seen in self._seen.items():
            utilization = readings[number].utilization_percent if number in readings else None
            if utilization is None or steps.completed == 0:
                # Before the first step there may be hours of preparing data.
                seen.clear()
                continue
            seen.append((now, utilization, steps))
            while len(seen) > 1 and now - seen[1][0] >= IDLE_AFTER_S:
                seen.popleft()
            mean = sum(entry[1] for entry in seen) / len(seen)
            if now - seen[0][0] >= IDLE_AFTER_S and mean < IDLE_PERCENT and number not in self._idle:
                self._idle.add(number)
                log.warning(
                    "gpu/%d is at %.0f %% for %.0f minutes: %s",
                    number,
                    mean,
                    (now - seen[0][0]) / 60,
                    self._cause(seen[0][2], steps),
                )
            elif mean >= 2 * IDLE_PERCENT and number in self._idle:
                self._idle.remove(number)
                log.info("gpu/%d works again, at %.0f %%", number, mean)

    def _cause(self, before: Steps, now: Steps) -> str:
        if now.completed == before.completed and now.waiting:
            return f"the trainer waits for data, and for nothing else since its last step. {self._hint}"
        if now.completed == before.completed:
            return (
                "no step was completed meanwhile. The trainer validates, saves or hands over on the CPU, or it hangs, "
                "and then compute.hang_after_s ends it"
            )
        share = (now.waited_s - before.waited_s) / (now.seconds - before.seconds)
        if share >= MOSTLY:
            return f"the trainer waits for data {100 * share:.0f} % of the time. {self._hint}"
        return (
            f"data is there (the wait for it is {100 * share:.0f} % of the time). The steps may be too small for the "
            "GPU (raise micro_batch), or the CPU too slow (host/cpu_percent, host/container_cpu_cores)"
        )


class ThrottleAlarm:
    """Warns where a GPU begins to be slowed down by heat or for want of power."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, str], float] = {}

    def __call__(self, now: float, readings: Mapping[int, GpuReading]) -> None:
        """Look at one reading of all GPUs, at `now` in seconds."""
        for number, reading in readings.items():
            for reason in sorted(reading.throttled or ()):
                last = self._last.get((number, reason))
                if last is None or now - last > AGAIN_AFTER_S:
                    log.warning("gpu/%d is throttled: %s. Steps take longer meanwhile", number, reason)
                self._last[number, reason] = now


class MemoryErrorAlarm:
    """Warns each time that a GPU's memory had more errors that could not be corrected."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def __call__(self, readings: Mapping[int, GpuReading]) -> None:
        """Look at one reading of all GPUs."""
        for number, reading in readings.items():
            count = reading.uncorrected_errors
            if count is None:
                continue
            before = self._counts.get(number)
            self._counts[number] = count
            if before is None and count > 0:
                log.warning("gpu/%d had %d uncorrected memory errors before this run", number, count)
            elif before is not None and count > before:
                log.error(
                    "gpu/%d: %d NEW UNCORRECTED MEMORY ERRORS, %d in all. What it computes cannot be trusted: stop, "
                    "and go on from the last checkpoint on another machine",
                    number,
                    count - before,
                    count,
                )
