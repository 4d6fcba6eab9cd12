"""Radiograph files of any format to images whose values and size are understood; nothing is guessed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from app.data.dicom_layout import file_meta
from app.data.dicom_radiograph import read_dicom_radiograph
from app.data.radiograph import IMAGE_SUFFIXES, check_square, read_pixels
from app.data.xray_image import XrayImage
from app.errors import DataError

log = logging.getLogger(__name__)

INTENSITIES = {
    "line-integrals": "line integrals",
    "inverted-line-integrals": "inverted line integrals",
    "linear": "intensity",
    "inverted-linear": "inverted intensity",
}
"""Values of --intensity, and the reading that each means."""


@dataclass(frozen=True)
class Stated:
    """What the user says of a radiograph; it goes before what the file says."""

    intensity: str | None = None
    """One of INTENSITIES."""
    pixel_mm: float | None = None
    """Edge of a pixel on the detector."""
    whole_detector: bool = False
    """Whether the image shows the whole square detector."""


def read_xray(path: Path, view: str, stated: Stated) -> XrayImage:
    """Read a radiograph, with its reading, and its pixel size unless it shows the whole detector.

    Raises:
        DataError: the file cannot be used, or neither it nor the user says what its values mean or how large it is.
    """
    image = _read(path, view)
    reading = image.reading if stated.intensity is None else INTENSITIES[stated.intensity]
    if reading is None:
        where = (
            "the file does not say (no PixelIntensityRelationship LOG or LIN)" if image.is_dicom else "it cannot say"
        )
        raise DataError(
            f"{path}: expected to know what its gray values mean, and {where}; give --intensity line-integrals (bright "
            "where dense, after a log, as shown on screens), inverted-line-integrals, linear (detector counts, dark "
            "where dense) or inverted-linear"
        )
    if stated.whole_detector:
        check_square(path, image.values)
        return replace(image, reading=reading, pixel_mm=None, in_patient=False)
    if stated.pixel_mm is not None:
        return replace(image, reading=reading, pixel_mm=(stated.pixel_mm, stated.pixel_mm), in_patient=False)
    if image.pixel_mm is None:
        found = "no ImagerPixelSpacing or PixelSpacing in the file" if image.is_dicom else "a plain image has none"
        raise DataError(
            f"{path}: expected the size of its pixels, and {found}; give --pixel-mm MM, measured on the detector, or "
            "--whole-detector if the image shows exactly the whole square detector, as a DRR of this program does"
        )
    return replace(image, reading=reading)


def _read(path: Path, view: str) -> XrayImage:
    if path.is_dir():
        raise DataError(f"{path}: expected the file of one radiograph, found a folder")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return XrayImage(path, read_pixels(path))
    meta = file_meta(path)
    if meta is None:
        raise DataError(f"{path}: expected a radiograph as {', '.join(IMAGE_SUFFIXES)} or DICOM, found neither")
    return read_dicom_radiograph(path, meta, view)
