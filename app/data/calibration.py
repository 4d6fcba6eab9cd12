"""Gain and offset that turn a radiograph's reading t into line integrals: p = a t + b, a > 0.

The exposure of a radiograph is not known, so a and b are fitted, per image, to the projection of the training cases'
mean volume, over the pixels that the image covers:

    min_{a, b} sum_i rho((a t_i + b - p_i) / s),   s = 1.4826 median |a t_i + b - p_i|

with Tukey's biweight rho (c = 4.685), by reweighted least squares that starts from Huber's (k = 1.345; Holland and
Welsch 1977), so that where the patient's outline differs from the mean's, pixels count little. A person is not the
mean: the fitted offset is off by some tenths, so whoever knows better should say so. Where the beam reaches the
detector beside the patient, p = 0 there fixes the offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.data.radiograph import Array
from app.errors import DataError

HUBER, TUKEY = 1.345, 4.685
ROUNDS = 30
SMALLEST_SCALE = 1e-6
AIR_QUANTILE = 0.01
"""Of t: the pixels beside the patient, less a few that are damaged."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What is known beforehand of p = a t + b; None is fitted."""

    gain: float | None = None
    offset: float | None = None
    air: bool = False
    """Whether the brightest part of the image saw no patient: p = 0 there, in place of an offset."""


@dataclass(frozen=True)
class Calibration:
    """p = gain t + offset."""

    gain: float
    offset: float

    def line_integrals(self, t: Array) -> Array:
        """p of t, of the same shape; noise below zero is 0."""
        p: Array = np.maximum(self.gain * t + self.offset, 0).astype(np.float32)
        return p


def calibrate(path: Path, t: Array, mean: Array, covered: NDArray[np.bool_], known: Known) -> Calibration:
    """Fit what is not known of gain and offset.

    Args:
        path: for the message.
        t: (N, N) a reading of the radiograph.
        mean: (N, N) line integrals of the mean volume.
        covered: (N, N), where the image is.
        known: gain, offset or both.

    Raises:
        DataError: the image is bright where the mean is dark.
    """
    values, p = t[covered].astype(np.float64), mean[covered].astype(np.float64)
    zero = float(np.quantile(values, AIR_QUANTILE)) if known.air else 0.0
    offset = 0.0 if known.air else known.offset
    gain, offset = _robust_fit(values - zero, p, known.gain, offset)
    if not gain > 0:
        raise DataError(
            f"{path}: expected values that rise with the attenuation, found that they fall (fitted gain {gain:.3g}); "
            "give the other polarity by --intensity, and see that the image is upright and of the view that it is "
            "given as"
        )
    return Calibration(gain, offset - gain * zero)


def _robust_fit(t: Doubles, p: Doubles, gain: float | None, offset: float | None) -> tuple[float, float]:
    weights = np.ones_like(t)
    for index in range(2 * ROUNDS):
        fitted = _least_squares(t, p, weights, gain, offset)
        residual = np.abs(fitted[0] * t + fitted[1] - p)
        scale = max(1.4826 * float(np.median(residual)), SMALLEST_SCALE)
        if index < ROUNDS:
            weights = np.minimum(1.0, HUBER * scale / np.maximum(residual, SMALLEST_SCALE))
        else:
            weights = np.maximum(1.0 - (residual / (TUKEY * scale)) ** 2, 0.0) ** 2
    return fitted


def _least_squares(t: Doubles, p: Doubles, w: Doubles, gain: float | None, offset: float | None) -> tuple[float, float]:
    """Weighted least squares for what is None of the two."""
    if gain is not None and offset is not None:
        return gain, offset
    mean_t, mean_p = float((w * t).sum() / w.sum()), float((w * p).sum() / w.sum())
    if gain is not None:
        return gain, mean_p - gain * mean_t
    if offset is not None:
        return float((w * t * (p - offset)).sum() / max((w * t * t).sum(), 1e-30)), offset
    spread = float((w * (t - mean_t) ** 2).sum())
    found = float((w * (t - mean_t) * (p - mean_p)).sum()) / max(spread, 1e-30)
    return found, mean_p - found * mean_t
