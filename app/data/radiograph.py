"""Radiograph files to line integrals: read, bring onto the detector, fit to the scan's own projection.

An image file has row 0 superior and shows the whole square detector; arrays have row 0 inferior. Neither the gain of
an image nor its polarity is known, so each of four readings t of its values v is fitted, p = a t + b, to the line
integrals p of our own projection of the scan; the reading with the smallest residual is taken:

    line integrals            t = v             inverted line integrals   t = -v            (a > 0)
    intensity I0 exp(-p)      t = -log v        inverted intensity        t = -log(max - v)

Shapes: N pixels along the detector's edge.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from app.errors import DataError
from app.physics.geometry import VIEWS

Array = NDArray[np.float32]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")
MAX_PIXELS = 64 * 2**20
MIN_EDGE = 16
GRAY_MODES = ("L", "I;16", "I;16B", "I;16L", "I")
COLOR_MODES = ("RGB", "RGBA", "LA", "P", "PA")
SMALLEST_INTENSITY = 1e-4
"""Share of the brightest value below which -log is not trusted: p stays under 9.2."""
CLEARLY_BETTER = 0.8
"""Another orientation is the right one where its residual is below this share of the given one's."""


@dataclass(frozen=True)
class Fit:
    """A radiograph as line integrals."""

    line_integrals: Array
    """(N, N), not negative."""
    difference: float
    """Relative L2 to the projection that it was fitted to."""
    reading: str
    """How its values were understood."""


def read_radiograph(path: Path) -> Array:
    """The values of a gray image (rows, columns), row 0 inferior; square, between 16 and 8192 pixels wide.

    Raises:
        DataError: the file cannot be used; the message says why.
    """
    values = _read_npy(path) if path.suffix.lower() == ".npy" else _read_image(path)
    rows, columns = values.shape
    if rows != columns:
        raise DataError(f"{path}: expected a square image of the whole detector, found {columns} x {rows} pixels")
    if not np.isfinite(values).all():
        raise DataError(f"{path}: holds values that are NaN or infinite")
    if np.ptp(values) == 0:
        raise DataError(f"{path}: all pixels have the same value")
    return np.ascontiguousarray(values[::-1], dtype=np.float32)


def fit_radiographs(given: Mapping[str, Array], rendered: Array) -> dict[str, Fit]:
    """Fit each given view to our projection (2, N, N).

    Raises:
        DataError: an image fits clearly better mirrored, upside down, or as the other view.
    """
    fits = {}
    for view, values in given.items():
        pixels = resize(values, rendered.shape[-1])
        own = rendered[VIEWS.index(view)]
        fits[view] = fit(pixels, own)
        _check_orientation(view, pixels, rendered, fits[view])
    return fits


def fit(values: Array, rendered: Array) -> Fit:
    """The reading, gain and offset of an image (N, N) that bring it closest to line integrals (N, N)."""
    fits = [
        _least_squares(transform(values), rendered, reading)
        for reading, transform in READINGS.items()
        # An intensity is never negative.
        if reading != "intensity" or values.min() >= 0
    ]
    return min(fits, key=lambda found: found.difference)


def resize(values: Array, edge: int) -> Array:
    """An image (n, n) on a grid of (edge, edge) pixels of the same detector: averaged down, or interpolated up."""
    # Pillow's bilinear filter widens with the reduction, so that it averages instead of picking pixels.
    image = Image.fromarray(values.astype(np.float32)).resize((edge, edge), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)


def _least_squares(t: Array, p: Array, reading: str) -> Fit:
    """min_{a >= 0, b} ||a t + b - p||, relative to ||p||."""
    t64, p64 = t.astype(np.float64), p.astype(np.float64)
    centred = t64 - t64.mean()
    gain = max(float((centred * (p64 - p64.mean())).sum() / max((centred**2).sum(), 1e-30)), 0.0)
    fitted = gain * centred + p64.mean()
    difference = float(np.linalg.norm(fitted - p64)) / max(float(np.linalg.norm(p64)), 1e-30)
    return Fit(np.maximum(fitted, 0).astype(np.float32), difference, reading)


def _negative_log(values: Array) -> Array:
    return np.asarray(-np.log(np.maximum(values, SMALLEST_INTENSITY * values.max())))


READINGS: dict[str, Callable[[Array], Array]] = {
    "line integrals": lambda v: v,
    "inverted line integrals": lambda v: -v,
    "intensity": _negative_log,
    "inverted intensity": lambda v: _negative_log(v.max() - v),
}


def _check_orientation(view: str, pixels: Array, rendered: Array, as_given: Fit) -> None:
    """Refuse an image that is clearly another orientation or view: a chest is nearly symmetric, so a residual alone
    would let a mirrored image pass."""
    other = VIEWS[1 - VIEWS.index(view)]
    own, swapped = rendered[VIEWS.index(view)], rendered[VIEWS.index(other)]
    sideways = "left to right" if view == "frontal" else "front to back"
    hypotheses = {
        f"mirrored {sideways}": fit(pixels[:, ::-1], own),
        "upside down": fit(pixels[::-1], own),
        "rotated by 180 degrees": fit(pixels[::-1, ::-1], own),
        f"as the {other} view": fit(pixels, swapped),
    }
    best = min(hypotheses, key=lambda name: hypotheses[name].difference)
    if hypotheses[best].difference < CLEARLY_BETTER * as_given.difference:
        raise DataError(
            f"misaligned radiographs: the {view} image fits the scan better {best} (relative L2 "
            f"{hypotheses[best].difference:.3f}) than as it is ({as_given.difference:.3f}); image row 0 is superior, "
            "column 0 is the patient's right (frontal) or front (lateral)"
        )


def _read_npy(path: Path) -> Array:
    try:
        # A memory map reads the header alone and fails where the file is shorter than that declares.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise DataError(f"{path}: not a complete NumPy array of numbers; save it with numpy.save") from None
    if mapped.dtype.kind not in "iuf" or mapped.ndim != 2:
        raise DataError(f"{path}: expected a 2D array of numbers, found {mapped.dtype} {mapped.shape}")
    _check_size(path, mapped.shape[1], mapped.shape[0])
    return np.asarray(mapped, dtype=np.float32)


def _read_image(path: Path) -> Array:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                _check_size(path, *image.size)
                return _gray(image, path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: declares too many pixels, the limit is {MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a PNG or JPEG image") from None
    except (OSError, SyntaxError, ValueError):
        # Pillow says SyntaxError for a damaged PNG.
        raise DataError(f"{path}: cannot be decoded (damaged or truncated image)") from None


def _check_size(path: Path, columns: int, rows: int) -> None:
    if columns * rows > MAX_PIXELS:
        raise DataError(f"{path}: declares too many pixels, {columns} x {rows}, the limit is {MAX_PIXELS}")
    if min(columns, rows) < MIN_EDGE:
        raise DataError(f"{path}: expected at least {MIN_EDGE} pixels along each edge, found {columns} x {rows}")


def _gray(image: Image.Image, path: Path) -> Array:
    if image.mode in GRAY_MODES:
        return np.asarray(image).astype(np.float32)
    if image.mode not in COLOR_MODES:
        raise DataError(f"{path}: expected an 8- or 16-bit gray image, found mode {image.mode}")
    channels = np.asarray(image.convert("RGB"))
    if not (np.array_equal(channels[..., 0], channels[..., 1]) and np.array_equal(channels[..., 0], channels[..., 2])):
        raise DataError(f"{path}: expected a gray image, found colour")
    return channels[..., 0].astype(np.float32)
