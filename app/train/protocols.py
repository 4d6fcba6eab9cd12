"""What training asks of the world around it; `app.cascade` passes the real things in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Stop = Callable[[], bool]
"""True once the process was asked to stop."""


class Grace(Protocol):
    """How long a process that was asked to stop may still take."""

    def seconds_left(self) -> float:
        """Until the process will be gone; infinite while nobody asked for it."""

    def at_the_last_moment(self, work: Callable[[float], None] | None) -> None:
        """What a thread does before it leaves in the place of a main thread that does not answer."""


class RunLog(Protocol):
    """Where curves and pictures go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points at `step` of the tags' axis."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (H, W, 3)."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in Markdown."""

    def write(self) -> None:
        """Everything logged so far is in the files when this returns, if they can be written; it never fails."""

    def flush(self) -> None:
        """The same, durable.

        Raises:
            OSError: the files cannot be written; what was logged waits in memory.
        """


@dataclass(frozen=True)
class CasePicture:
    """One held-out case, for people to look at. Volumes (D, H, W) in HU, radiographs (2, N, N) line integrals."""

    title: str
    truth: NDArray[np.float32]
    prediction: NDArray[np.float32]
    condition: NDArray[np.float32]
    xrays: NDArray[np.float32]
    drr: NDArray[np.float32]


class Draw(Protocol):
    """Turns a case into a picture (H, W, 3)."""

    def __call__(self, case: CasePicture) -> NDArray[np.uint8]:
        """Render."""


class Telemetry(Protocol):
    """What the machine does beside the steps, read by a thread of its own."""

    def waits(self, for_samples: bool) -> None:
        """The training thread begins, or ends, to wait for samples."""

    def step(self, global_step: int, seconds: float, waited_s: float) -> None:
        """A step was completed, the `global_step`-th over all stages, and waited so long for its samples."""

    def scalars(self) -> dict[str, float]:
        """Points of the `gpu/` and `host/` curves from what was read since the last call; empty if nothing was."""


class Status(Protocol):
    """Tells people and probes how far the run is."""

    def __call__(self, **fields: Any) -> None:
        """Merge `fields` into the status."""
