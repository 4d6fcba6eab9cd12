"""The `perf/` curves: how fast steps are, what they wait for, and how much of the card they use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from app.tags import DATA_WAIT, MFU, SAMPLES_PER_S, STEP_TIME, TFLOP_PER_S
from app.train.samples import Batch


class Waited(Iterator[Batch]):
    """Batches, and how long whoever asked for them waited.

    Args:
        batches: the real ones.
        waits: told when a wait begins and when it ends.
    """

    def __init__(self, batches: Iterator[Batch], waits: Callable[[bool], None]) -> None:
        self._batches, self._waits = batches, waits
        self._seconds = 0.0

    def __next__(self) -> Batch:
        """The next batch."""
        started = time.monotonic()
        self._waits(True)
        try:
            return next(self._batches)
        finally:
            self._waits(False)
            self._seconds += time.monotonic() - started

    def take_s(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Speed:
    """Steps since the last point of the curves.

    Args:
        samples: of an optimizer step, over all processes.
        tflop: of an optimizer step, over all processes.
        peak_tflop_per_s: of all cards together; None where it is not known.
    """

    def __init__(self, samples: int, tflop: float, peak_tflop_per_s: float | None) -> None:
        self._samples, self._tflop, self._peak = samples, tflop, peak_tflop_per_s
        self._last = 0.0
        self._start_over()

    def step(self, seconds: float, waited_s: float) -> None:
        """A step took so long, the wait for its samples included."""
        self._last = seconds
        self._steps += 1
        self._seconds += seconds
        self._waited += waited_s

    def scalars(self) -> dict[str, float]:
        """The points since the last call: time and samples/s of the newest step, the rest over all steps."""
        tflop_per_s = self._tflop * self._steps / self._seconds
        values = {
            STEP_TIME: self._last,
            SAMPLES_PER_S: self._samples / self._last,
            DATA_WAIT: self._waited / self._seconds,
            TFLOP_PER_S: tflop_per_s,
        }
        if self._peak is not None:
            values[MFU] = tflop_per_s / self._peak
        self._start_over()
        return values

    def _start_over(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
