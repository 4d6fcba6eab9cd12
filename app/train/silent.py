"""What a process that is not the first of its run gets in place of everything that writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.config import StageConfig
from app.train.checkpoint import CheckpointFolder, Counters, FoundCheckpoint
from app.train.saver import Saver, SaveReport
from app.train.state import Progress, StageState


class SilentLog:
    """A `RunLog` that keeps nothing."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Nothing."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Nothing."""

    def write(self) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self, limit_s: float = 0.0) -> None:
        """Nothing."""


class SilentStatus:
    """A `Status` that tells nobody."""

    def __call__(self, **fields: Any) -> None:
        """Nothing."""

    def close(self, state: str) -> None:
        """Nothing."""


class SilentTelemetry:
    """Reads nothing: the first process sees all GPUs of its machine."""

    def waits(self, for_samples: bool) -> None:
        """Nothing."""

    def step(self, global_step: int, seconds: float, waited_s: float) -> None:
        """Nothing."""

    def scalars(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing."""


class SilentRecord:
    """Marks no step and tells nobody."""

    def __call__(self, global_step: int, run_seconds: float) -> None:
        """Nothing."""

    def stage_ended(self, stage: StageConfig, progress: Progress, global_step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class SilentCheckpoints(CheckpointFolder):
    """Publishes and deletes nothing, and looks at no file: the first process writes meanwhile."""

    def publish(self, stage: str, kinds: Sequence[str], payload: dict[str, Any], counters: Counters) -> None:
        """Nothing."""

    def retain(self, stage: str, keep: int | None) -> None:
        """Nothing."""

    def entries(self, stage: str | None = None) -> list[FoundCheckpoint]:
        """None."""
        return []


class SilentSaver(Saver):
    """Copies and writes nothing."""

    def __init__(self) -> None:
        """No thread."""

    def save(self, state: StageState, kinds: Sequence[str]) -> None:
        """Nothing."""

    def save_if_due(self, state: StageState, epoch_ends_in_s: float) -> bool:
        """Never."""
        return False

    def report(self) -> SaveReport | None:
        """None."""
        return None

    def writing(self) -> bool:
        """Never."""
        return False

    def drain(self) -> None:
        """Nothing."""

    def save_before_leaving(self, state: StageState) -> bool:
        """The first process does."""
        return True

    def close(self) -> None:
        """Nothing."""
