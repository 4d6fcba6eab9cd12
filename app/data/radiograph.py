"""Radiograph files to line integrals: read, bring onto the detector, fit to the scan's own projection.

An image file has row 0 superior and shows the whole square detector; arrays have row 0 inferior. Neither the gain of
an image nor its polarity is known, so each of four readings t of its values v is fitted, p = a t + b, to the line
integrals p of our own projection of the scan; the reading with the smallest residual is taken:

    line integrals            t = v             inverted line integrals   t = -v            (a > 0)
    intensity I0 exp(-p)      t = -log v        inverted intensity        t = -log(white - v)

Shapes: N pixels along the detector's edge.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from app.errors import DataError
from app.physics.geometry import VIEWS

Array = NDArray[np.float32]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")
MAX_PIXELS = 2**25
MIN_EDGE = 16
GRAY_MODES = ("L", "I;16", "I;16B", "I;16L", "I")
COLOR_MODES = ("RGB", "RGBA", "LA", "P", "PA")
READINGS = ("line integrals", "inverted line integrals", "inverted intensity", "intensity")
FULL_SCALES = (1.0, 255.0, 4095.0, 65535.0)
"""White of images that are inverted."""
SMALLEST_INTENSITY = 1e-4
"""Share of the brightest value below which -log of a float is not trusted: p stays under 9.2."""
CLEARLY_BETTER = 0.8
"""Another orientation or place is the right one where its difference is below this share of the given one's."""


@dataclass(frozen=True)
class Fit:
    """A radiograph as line integrals."""

    line_integrals: Array
    """(N, N), not negative."""
    difference: float
    """Relative L2 to the projection that it was fitted to."""
    reading: str
    """How its values were understood."""


@dataclass(frozen=True)
class Alignment:
    """How a radiograph fits as it is, and how it would fit turned or as the other view."""

    view: str
    fit: Fit
    turn: str
    """The best of the other orientations."""
    turned_difference: float

    @property
    def best_difference(self) -> float:
        """The smallest difference in any orientation."""
        return min(self.fit.difference, self.turned_difference)

    def refusal(self) -> str | None:
        """Why the image cannot be used as it is, or None.

        A chest is nearly symmetric: a limit on the difference alone would let a mirrored image pass.
        """
        if self.turned_difference >= CLEARLY_BETTER * self.fit.difference:
            return None
        return (
            f"misaligned radiographs: the {self.view} image fits the scan better {self.turn} (relative L2 "
            f"{self.turned_difference:.3f}) than as it is ({self.fit.difference:.3f}); image row 0 is superior, "
            "column 0 is the patient's right (frontal) or front (lateral)"
        )


def read_radiograph(path: Path) -> Array:
    """The values of a gray image (rows, columns), row 0 inferior; square, at least 16 pixels wide.

    Raises:
        DataError: the file cannot be used; the message says why.
    """
    values = read_pixels(path)
    check_square(path, values)
    return np.ascontiguousarray(values[::-1])


def read_pixels(path: Path) -> Array:
    """The values of a gray image (rows, columns) as the file has them, row 0 superior.

    Raises:
        DataError: the file cannot be used; the message says why.
    """
    values = _read_npy(path) if path.suffix.lower() == ".npy" else _read_image(path)
    check_values(path, values)
    return values


def check_square(path: Path, values: Array) -> None:
    """Refuse an image that cannot show the whole detector."""
    rows, columns = values.shape
    if rows != columns:
        raise DataError(f"{path}: expected a square image of the whole detector, found {columns} x {rows} pixels")


def check_values(path: Path, values: Array) -> None:
    """Refuse an image without content."""
    if not np.isfinite(values).all():
        raise DataError(f"{path}: holds values that are NaN or infinite")
    if np.ptp(values) == 0:
        raise DataError(f"{path}: all pixels have the same value")


def check_size(path: Path, columns: int, rows: int) -> None:
    """Refuse an image that declares too many pixels, or has too few."""
    if columns * rows > MAX_PIXELS:
        raise DataError(f"{path}: declares too many pixels, {columns} x {rows}, the limit is {MAX_PIXELS}")
    if min(columns, rows) < MIN_EDGE:
        raise DataError(f"{path}: expected at least {MIN_EDGE} pixels along each edge, found {columns} x {rows}")


def align(given: Mapping[str, Array], rendered: Array) -> dict[str, Alignment]:
    """Fit each given view (n, n) to our projection (2, N, N), as it is and turned."""
    return {view: align_view(view, read_values(values, rendered.shape[-1]), rendered) for view, values in given.items()}


def align_view(view: str, readings: Mapping[str, Array], rendered: Array) -> Alignment:
    """Fit the readings (N, N) of one view to our projection (2, N, N), as they are and turned."""
    other = VIEWS[1 - VIEWS.index(view)]
    own, swapped = rendered[VIEWS.index(view)], rendered[VIEWS.index(other)]
    sideways = "left to right" if view == "frontal" else "front to back"
    turned = {
        f"mirrored {sideways}": fit({name: t[:, ::-1] for name, t in readings.items()}, own),
        "upside down": fit({name: t[::-1] for name, t in readings.items()}, own),
        "rotated by 180 degrees": fit({name: t[::-1, ::-1] for name, t in readings.items()}, own),
        f"as the {other} view": fit(readings, swapped),
    }
    best = min(turned, key=lambda name: turned[name].difference)
    return Alignment(view, fit(readings, own), best, turned[best].difference)


def read_values(values: Array, edge: int) -> dict[str, Array]:
    """Each reading t of an image (n, n) on a grid of (edge, edge) pixels of the same detector."""
    possible = READINGS if values.min() >= 0 else READINGS[:-1]
    return {reading: resize(read_as(values, reading), edge) for reading in possible}


def read_as(values: Array, reading: str, white: float | None = None) -> Array:
    """One of READINGS: t of the values of an image, of the same shape.

    Args:
        values: of the image; not negative where they are intensities.
        reading: how to understand them.
        white: what an inverted image was subtracted from; None guesses it from the largest value.
    """
    if reading == "line integrals":
        return values
    if reading == "inverted line integrals":
        return -values
    top = float(values.max())
    is_integer = top > 1 and bool(np.array_equal(values, np.rint(values)))
    # Half a gray level is the best guess for what was rounded to zero.
    dark = 0.5 if is_integer else SMALLEST_INTENSITY * max(top, 1e-30)
    if white is None:
        white = next((scale for scale in FULL_SCALES if top <= scale), top)
    t: Array = -np.log(np.maximum(values if reading == "intensity" else white - values, dark))
    return t


def fit(readings: Mapping[str, Array], rendered: Array) -> Fit:
    """The reading (N, N), gain and offset that come closest to line integrals (N, N)."""
    fits = [_least_squares(t, rendered, name) for name, t in readings.items()]
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


def _read_npy(path: Path) -> Array:
    try:
        # A memory map reads the header alone and fails where the file is shorter than that declares.
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise DataError(f"{path}: not a complete NumPy array of numbers; save it with numpy.save") from None
    if mapped.dtype.kind not in "iuf" or mapped.ndim != 2:
        raise DataError(f"{path}: expected a 2D array of numbers, found {mapped.dtype} {mapped.shape}")
    check_size(path, mapped.shape[1], mapped.shape[0])
    return np.asarray(mapped, dtype=np.float32)


def _read_image(path: Path) -> Array:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                check_size(path, *image.size)
                return _gray(image, path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: declares too many pixels, the limit is {MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a PNG or JPEG image") from None
    except (OSError, SyntaxError, ValueError):
        # Pillow says SyntaxError for a damaged PNG.
        raise DataError(f"{path}: cannot be decoded (damaged or truncated image)") from None


def _gray(image: Image.Image, path: Path) -> Array:
    if image.mode in GRAY_MODES:
        return np.asarray(image).astype(np.float32)
    if image.mode not in COLOR_MODES:
        raise DataError(f"{path}: expected an 8- or 16-bit gray image, found mode {image.mode}")
    channels = np.asarray(image.convert("RGB"))
    if not (np.array_equal(channels[..., 0], channels[..., 1]) and np.array_equal(channels[..., 0], channels[..., 2])):
        raise DataError(f"{path}: expected a gray image, found colour")
    return channels[..., 0].astype(np.float32)
