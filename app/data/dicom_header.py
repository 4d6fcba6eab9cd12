"""What one DICOM file says about its slice, without the patient's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.data.dicom_layout import IMPLICIT, FileMeta, is_intact
from app.data.itk import image_reader

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
IMAGE_OBJECTS = "1.2.840.10008.5.1.4.1.1."
READABLE_SYNTAXES = {
    IMPLICIT,  # implicit VR little endian
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first order
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
}
UNCOMPRESSED_SYNTAXES = {IMPLICIT, "1.2.840.10008.1.2.1"}


@dataclass(frozen=True)
class SliceHeader:
    """One slice: identifiers (hidden from repr), what kind of image it is, and where it lies (mm, LPS)."""

    path: Path
    patient_id: str | None = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    instance_uid: str = field(repr=False)
    object_class: str
    modality: str
    image_type: tuple[str, ...]
    rescale_type: str
    samples: int
    frames: int
    complete: bool
    size: tuple[int, int]
    """Rows, columns."""
    position: tuple[float, ...]
    """Centre of the first pixel (x, y, z); empty where the file does not say."""
    orientation: tuple[float, ...]
    """Direction of a row, then of a column, three cosines each; empty where the file does not say."""
    spacing: tuple[float, ...]
    """Between rows, between columns; empty where the file does not say."""

    @property
    def normal(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Unit normal of the slice, row x column."""
        cross = np.cross(self.orientation[:3], self.orientation[3:])
        return np.asarray(cross / np.linalg.norm(cross))


@dataclass(frozen=True)
class Tags:
    """The elements of a file's header, by keys such as `0028|0030`, and the reader that can decode its pixels."""

    reader: Any

    def text(self, tag: str) -> str:
        """An element's text, empty where the file has none."""
        raw = self.reader.GetMetaData(tag) if self.reader.HasMetaDataKey(tag) else ""
        # Bytes outside UTF-8 arrive as lone surrogates; an identifier must survive being encoded again.
        return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").strip(" \0")

    def numbers(self, tag: str, count: int) -> tuple[float, ...]:
        """`count` finite numbers, or none."""
        try:
            values = tuple(float(part) for part in self.text(tag).split("\\"))
        except ValueError:
            return ()
        return values if len(values) == count and np.isfinite(values).all() else ()

    @property
    def samples(self) -> int:
        """Values per pixel."""
        return int((self.numbers("0028|0002", 1) or (1.0,))[0])


def read_tags(path: Path, meta: FileMeta) -> Tags | None:
    """The header of an image file, or None where it is damaged or GDCM cannot read it as an image."""
    if not is_intact(path, meta):
        return None
    reader = image_reader("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return Tags(reader)


def read_header(path: Path, meta: FileMeta) -> SliceHeader | None:
    """The header of a slice, or None where it is damaged or GDCM cannot read it as an image."""
    tags = read_tags(path, meta)
    if tags is None:
        return None
    text, numbers = tags.text, tags.numbers
    size = tags.reader.GetSize()
    rows, columns = size[1], size[0]
    bits = int((numbers("0028|0100", 1) or (16.0,))[0])
    expected = rows * columns * tags.samples * bits // 8 if meta.transfer_syntax in UNCOMPRESSED_SYNTAXES else 1
    return SliceHeader(
        path=path,
        patient_id=text("0010|0020") or None,
        study_uid=text("0020|000d"),
        series_uid=text("0020|000e"),
        instance_uid=text("0008|0018"),
        object_class=text("0008|0016") or meta.object_class,
        modality=text("0008|0060"),
        image_type=tuple(part.strip().upper() for part in text("0008|0008").split("\\")),
        rescale_type=text("0028|1054"),
        samples=tags.samples,
        frames=size[2] if len(size) > 2 else 1,
        complete=path.stat().st_size >= expected,
        size=(rows, columns),
        position=numbers("0020|0032", 3),
        orientation=numbers("0020|0037", 6),
        spacing=numbers("0028|0030", 2),
    )
