"""A stand-in for the grace period of a stopped process, which tests and benchmarks of the trainer share."""

from __future__ import annotations

import math
from typing import Any


class NoHurry:
    """Nobody asks when the process leaves."""

    def seconds_left(self) -> float:
        """For ever."""
        return math.inf

    def at_the_last_moment(self, work: Any) -> None:
        """Nobody does."""
