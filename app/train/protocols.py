"""What training asks of the world around it; `app.cascade` passes the real things in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Stop = Callable[[], bool]
"""True once the process was asked to stop."""


class RunLog(Protocol):
    """Where curves and pictures go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points at `step` of the tags' axis."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """A picture (H, W, 3)."""

    def flush(self) -> None:
        """Everything logged so far is in the files when this returns."""


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


class Status(Protocol):
    """Tells people and probes how far the run is."""

    def __call__(self, **fields: Any) -> None:
        """Merge `fields` into the status."""
