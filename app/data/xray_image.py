"""A radiograph as its file gives it, and its place on the detector that a cascade was trained for.

Only the plane through the isocentre is brought to the right size; a source elsewhere sees other planes at other
magnifications, which no resampling of an image can undo.

Shapes: image (rows, columns) with row 0 superior, column 0 the patient's right (frontal) or front (lateral);
detector (N, N) with row 0 inferior.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.data.radiograph import MIN_EDGE, Array, read_as
from app.errors import DataError
from app.physics.geometry import Geometry

log = logging.getLogger(__name__)

LEAST_COVERED = 0.2
"""Share of the detector that an image must cover; less is a wrong pixel size."""
NOT_WHOLE = 0.98
"""Share of the detector below which the user is told how much an image covers."""


@dataclass(frozen=True)
class XrayImage:
    """The values of a radiograph and what is known of them."""

    path: Path
    values: Array
    """(rows, columns)."""
    reading: str | None = None
    """One of `radiograph.READINGS`; None where it is not known."""
    white: float | None = None
    """What an inverted image was subtracted from; None where it is not known."""
    pixel_mm: tuple[float, float] | None = None
    """Height and width of a pixel; None where it is not known, or the image shows the whole detector."""
    in_patient: bool = False
    """Whether `pixel_mm` is a length in the patient, at the isocentre, and not on the detector."""
    is_dicom: bool = False
    source_to_detector_mm: float | None = None
    """As the file states it."""


@dataclass(frozen=True)
class PlacedXray:
    """A reading of a radiograph on the detector that the cascade was trained for."""

    t: Array
    """(N, N); beyond the edge of the image its border goes on."""
    covered: NDArray[np.bool_]
    """(N, N): inside the image."""


def place(image: XrayImage, trained: Geometry, taken: Geometry, edge: int) -> PlacedXray:
    """Bring an image onto a detector of (edge, edge) pixels, centre on centre, cropped or continued.

    A pixel of the size d on the detector of `taken` is d SOD'/SDD' wide at the isocentre, and d SOD'/SDD' SDD/SOD on
    the detector of `trained`.

    Args:
        image: with its reading; without a pixel size it shows the whole detector of `taken`.
        trained: of the cascade.
        taken: of the radiograph.
        edge: N.

    Raises:
        DataError: the image covers too little of the detector, or far more than it.
    """
    if image.reading is None:
        raise ValueError("how the values are to be understood must be known")
    if image.reading == "intensity" and image.values.min() < 0:
        raise DataError(
            f"{image.path}: expected intensities from 0 up, found {image.values.min():g}; are they line integrals "
            "(--intensity line-integrals)?"
        )
    shape = image.values.shape
    pixel_mm = _on_detector(image, taken)
    scale = trained.magnification / taken.magnification
    # Edge of the trained detector in pixels of the image, along rows and columns.
    spans = [trained.detector_mm / (size * scale) for size in pixel_mm]
    covered = math.prod(min(1.0, count / span) for count, span in zip(shape, spans, strict=True))
    described = f"{shape[1]} x {shape[0]} pixels of {pixel_mm[1]:.4g} x {pixel_mm[0]:.4g} mm"
    if covered < LEAST_COVERED:
        raise DataError(
            f"{image.path}: {described} cover only {100 * covered:.2g} % of the trained detector "
            f"({trained.detector_mm:.0f} mm, at least {100 * LEAST_COVERED:.0f} % are expected); check the pixel size "
            "(--pixel-mm), or give --whole-detector if the image shows the whole detector"
        )
    if min(spans) < MIN_EDGE:
        raise DataError(
            f"{image.path}: the trained detector ({trained.detector_mm:.0f} mm) spans only {min(spans):.2g} of its "
            f"{described}; check the pixel size (--pixel-mm)"
        )
    if covered < NOT_WHOLE:
        log.warning(
            "%s: %s cover %.0f %% of the trained detector (%.0f mm); the border goes on outside",
            image.path, described, 100 * covered, trained.detector_mm,
        )  # fmt: skip
    t = read_as(image.values, image.reading, image.white)
    inside = [_inside(count, span, edge) for count, span in zip(shape, spans, strict=True)]
    return PlacedXray(_resample(t, spans, edge), inside[0][:, None] & inside[1])


def _on_detector(image: XrayImage, taken: Geometry) -> tuple[float, float]:
    """Height and width in mm of a pixel on the detector of `taken`."""
    if image.pixel_mm is None:
        rows, columns = image.values.shape
        return taken.detector_mm / rows, taken.detector_mm / columns
    scale = taken.magnification if image.in_patient else 1.0
    height, width = image.pixel_mm
    return height * scale, width * scale


def _resample(t: Array, spans: list[float], edge: int) -> Array:
    """The central box of `spans` pixels of t (rows, columns), row 0 superior, as (edge, edge), row 0 inferior."""
    margins = [max(0, math.ceil((span - count) / 2)) for count, span in zip(t.shape, spans, strict=True)]
    wide = np.pad(t, [(margin, margin) for margin in margins], mode="edge")
    (top, bottom), (left, right) = (
        ((count - span) / 2, (count + span) / 2) for count, span in zip(wide.shape, spans, strict=True)
    )
    # Pillow's bilinear filter widens with the reduction, so that it averages instead of picking pixels.
    image = Image.fromarray(wide.astype(np.float32))
    placed = image.resize((edge, edge), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.ascontiguousarray(np.asarray(placed, dtype=np.float32)[::-1])


def _inside(count: int, span: float, edge: int) -> NDArray[np.bool_]:
    """(edge,): which detector pixels have their whole width within an image of `count` pixels; symmetric."""
    outer = np.abs(np.arange(edge) + 0.5 - edge / 2) + 0.5
    return np.asarray(outer * (span / edge) <= count / 2 * (1 + 1e-6))
