"""SIGTERM and SIGINT as a question that long work asks itself."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Callable: True once SIGTERM or SIGINT arrived. A second signal changes nothing."""

    def __init__(self) -> None:
        """Install the handlers; main thread only."""
        self.number: int | None = None
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.number is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number
