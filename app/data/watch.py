"""Progress of `prepare` on a terminal, and the wish to stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from app.errors import Stopped

Item = TypeVar("Item")


class Watch:
    """Polls `stop` between files and shows a bar where stderr is a terminal."""

    def __init__(self, stop: Callable[[], bool], progress: bool) -> None:
        self._stop = stop
        self._bar = progress and sys.stderr.isatty()

    def check(self) -> None:
        """Raise Stopped where somebody asked to stop."""
        if self._stop():
            raise Stopped("stopped while preparing the data; finished cases are kept and the next start goes on")

    def over(self, items: Sequence[Item], unit: str) -> Iterator[Item]:
        """The items, checked one by one."""
        for item in tqdm(items, desc="prepare", unit=unit, disable=not self._bar):
            self.check()
            yield item
