"""What saving costs, measured while training, and how often that allows it (CheckFreq, Mohan et al., FAST 2021)."""

from __future__ import annotations

from collections import deque
from statistics import median

from app.config import CheckpointConfig

REMEMBERED = 7
"""Saves, whose medians count: one slow answer of a network volume is not a trend."""
STEPS_REMEMBERED = 64
MIB = 2**20


class Pace:
    """Durations of saves and steps.

    Args:
        mib_per_s: write speed of the volume, measured at the start.
    """

    def __init__(self, mib_per_s: float) -> None:
        self._blocked: deque[float] = deque(maxlen=REMEMBERED)
        self._speeds: deque[float] = deque([mib_per_s], maxlen=REMEMBERED)
        self._quiet: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._disturbed: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._mib = 0.0

    def blocked(self, seconds: float, size: int) -> None:
        """A save of `size` bytes kept the training thread for so long."""
        self._blocked.append(seconds)
        self._mib = size / MIB

    def wrote(self, seconds: float, size: int) -> None:
        """The writing thread took so long for a file of `size` bytes."""
        self._speeds.append(size / MIB / max(seconds, 1e-6))

    def step(self, seconds: float, disturbed: bool) -> None:
        """A training step took so long, beside a write or not."""
        (self._disturbed if disturbed else self._quiet).append(seconds)

    @property
    def blocked_s(self) -> float:
        """Seconds in which a save keeps the training thread."""
        return median(self._blocked) if self._blocked else 0.0

    @property
    def write_s(self) -> float:
        """Seconds that writing one file of the state takes, by the slower half of what was seen."""
        return self._mib / median(self._speeds)

    @property
    def save_s(self) -> float:
        """Seconds from the wish to save to the file on the volume."""
        return self.blocked_s + self.write_s

    @property
    def cost_s(self) -> float:
        """Seconds of training that a save costs: while it is blocked, and while steps beside the write take longer."""
        slower = 0.0
        if self._quiet and self._disturbed:
            slower = max(0.0, 1.0 - median(self._quiet) / median(self._disturbed))
        return self.blocked_s + slower * self.write_s

    def interval_s(self, config: CheckpointConfig) -> float:
        """Seconds between two rolling saves: as asked for, or more where they would cost more than they may."""
        return max(config.save_every_s, self.cost_s / config.max_overhead, self.write_s)

    def overhead(self, config: CheckpointConfig) -> float:
        """Share of the training time that rolling saves cost at that interval."""
        return self.cost_s / self.interval_s(config)
