"""Radiographs in DICOM files (CR, DX, DR, RF): values, polarity, pixel size, orientation, without the patient's name.

GDCM applies the rescale slope and intercept, and turns MONOCHROME1 into MONOCHROME2: from m it makes 2^bits - 1 - m
before the rescale. So in what is decoded larger values are brighter on a screen, where bone is white.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from app.data.dicom import UNREADABLE
from app.data.dicom_header import READABLE_SYNTAXES, Tags, read_tags
from app.data.dicom_layout import FileMeta
from app.data.radiograph import Array, check_size, check_values
from app.data.xray_image import XrayImage
from app.errors import DataError

log = logging.getLogger(__name__)

MODALITIES = ("CR", "DX", "DR", "RF")
RIGHT_WAY = {"frontal": ("L", "F"), "lateral": ("P", "F")}
"""Letters of PatientOrientation: where the rows and the columns of an image lead to."""
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "F": "H", "H": "F"}
OTHER_BEAM = {("frontal", "AP"): "PA", ("lateral", "RL"): "LL"}
"""ViewPosition of a radiograph whose beam runs the other way, and that which the cascade is trained on."""


def read_dicom_radiograph(path: Path, meta: FileMeta, view: str) -> XrayImage:
    """Decode a radiograph and turn it the right way round; what the file does not say is None.

    Raises:
        DataError: the file cannot be used; the message says why and never quotes header text.
    """
    if meta.transfer_syntax not in READABLE_SYNTAXES:
        raise DataError(f"{path}: compressed in a way that cannot be read; convert it with `gdcmconv --raw`")
    tags = read_tags(path, meta)
    if tags is None:
        raise DataError(f"{path}: {UNREADABLE}")
    _check_kind(path, tags)
    values = _decode(path, tags)
    if tags.text("0008|0068") == "FOR PRESENTATION":
        log.warning(
            "%s: processed for presentation: its gray values are not those of the detector, so the volume will be less "
            "reliable; the image FOR PROCESSING is better", path,
        )  # fmt: skip
    position = tags.text("0018|5101")
    if (view, position) in OTHER_BEAM:
        log.warning(
            "%s: the beam runs the other way (ViewPosition %s, trained on %s): perspective differs",
            path, position, OTHER_BEAM[view, position],
        )  # fmt: skip
    size, in_patient = _pixel_size(tags)
    turned, swapped = _right_way_round(path, values, tags.text("0020|0020"), view)
    if size is not None and swapped:
        size = (size[1], size[0])
    reading, white = _reading(path, tags)
    distance = tags.numbers("0018|1110", 1)
    return XrayImage(
        path=path,
        values=turned,
        reading=reading,
        white=white,
        pixel_mm=size,
        in_patient=in_patient,
        is_dicom=True,
        source_to_detector_mm=distance[0] if distance and distance[0] > 0 else None,
    )


def _check_kind(path: Path, tags: Tags) -> None:
    if tags.text("0008|0060") not in MODALITIES:
        raise DataError(f"{path}: expected a radiograph (modality {', '.join(MODALITIES)}), found another modality")
    size = tags.reader.GetSize()
    if tags.samples != 1 or not tags.text("0028|0004").startswith("MONOCHROME"):
        raise DataError(f"{path}: expected a gray image (MONOCHROME1 or MONOCHROME2), found colour")
    if any(count != 1 for count in size[2:]):
        raise DataError(f"{path}: expected one image, found {size[2]} frames; export the one to use")
    check_size(path, size[0], size[1])


def _decode(path: Path, tags: Tags) -> Array:
    tags.reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        pixels = sitk.GetArrayFromImage(tags.reader.Execute())  # a view would outlive its image
    except RuntimeError:
        raise DataError(f"{path}: {UNREADABLE}") from None
    values: Array = pixels.reshape(pixels.shape[-2:])
    check_values(path, values)
    return values


def _pixel_size(tags: Tags) -> tuple[tuple[float, float] | None, bool]:
    """Height and width of a pixel in mm, and whether they are lengths in the patient (PS3.3 section 10.7.1.3).

    ImagerPixelSpacing is measured at the detector. PixelSpacing alone is too, unless PixelSpacingCalibrationType says
    that it was calibrated.
    """
    imager, spacing = tags.numbers("0018|1164", 2), tags.numbers("0028|0030", 2)
    if len(imager) == 2 and min(imager) > 0:
        return (imager[0], imager[1]), False
    if len(spacing) == 2 and min(spacing) > 0:
        return (spacing[0], spacing[1]), tags.text("0028|0a02") != ""
    return None, False


def _reading(path: Path, tags: Tags) -> tuple[str | None, float | None]:
    """How the decoded values are to be understood, and what inverted ones were subtracted from.

    PixelIntensityRelationshipSign is 1 where smaller stored values mean less beam, which is where attenuation is
    large; without it the image is taken to be meant for a screen, where bone is white.
    """
    relation = tags.text("0028|1040")
    if relation not in ("LOG", "LIN"):
        return None, None
    slope = (tags.numbers("0028|1053", 1) or (1.0,))[0]
    if slope <= 0:
        raise DataError(f"{path}: expected a positive rescale slope, found {slope:g}")
    sign = tags.numbers("0028|1041", 1)
    turned = tags.text("0028|0004") == "MONOCHROME1"
    bright_is_dense = True
    if sign:
        bright_is_dense = (sign[0] < 0) != turned
    if relation == "LOG":
        return ("line integrals" if bright_is_dense else "inverted line integrals"), None
    if not bright_is_dense:
        return "intensity", None
    bits = int((tags.numbers("0028|0101", 1) or (16.0,))[0])
    return "inverted intensity", slope * (2**bits - 1) + (tags.numbers("0028|1052", 1) or (0.0,))[0]


def _right_way_round(path: Path, values: Array, orientation: str, view: str) -> tuple[Array, bool]:
    """Row 0 superior and column 0 the patient's right or front, and whether rows and columns changed places."""
    letters = tuple(part[:1] for part in orientation.split("\\"))
    expected = RIGHT_WAY[view]
    if len(letters) != 2 or any(letter not in OPPOSITE for letter in letters):
        log.warning(
            "%s: does not say how it lies (PatientOrientation); row 0 is taken as superior and column 0 as the "
            "patient's %s", path, "right" if view == "frontal" else "front",
        )  # fmt: skip
        return values, False
    swapped = letters[0] in (expected[1], OPPOSITE[expected[1]])
    if swapped:
        values, letters = values.T, letters[::-1]
    for axis, letter in ((1, letters[0]), (0, letters[1])):
        wanted = expected[1 - axis]
        if letter == OPPOSITE[wanted]:
            values = np.flip(values, axis)
        elif letter != wanted:
            raise DataError(
                f"{path}: not a {view} radiograph by its PatientOrientation; were --frontal and --lateral exchanged?"
            )
    return np.ascontiguousarray(values), swapped
