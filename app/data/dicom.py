"""DICOM folders: slices grouped into series, unusable series refused with a reason, one series chosen per study.

The rule of choice, among the usable series of a study: axial before other orientations; then the largest coverage
along z, where series within 10 mm of the largest count as equal; then most slices; then the smallest SeriesInstanceUID.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from app.data.dicom_header import (
    CT_IMAGE,
    ENHANCED_CT,
    IMAGE_OBJECTS,
    READABLE_SYNTAXES,
    SliceHeader,
    read_header,
)
from app.data.dicom_layout import file_meta
from app.data.itk import image_reader
from app.data.limits import GIB, check_declared, inside
from app.errors import DataError

MIN_SLICES = 16
MAX_TILT_DEGREES = 0.5
GAP_MM = 0.101  # positions rounded to 0.1 mm make steps that differ by 0.1
GAP_SHARE = 0.01
SAME_PLACE_MM = 0.01
SAME_COVERAGE_MM = 10.0
SAME_COSINE = 1e-3
AXIAL_COSINE = 0.7
HU_RESCALE_TYPES = ("", "HU", "US")
LEAVES = "a link that leaves the data folder; copy the data into the folder"
NO_CODEC = "compressed in a way that cannot be read (transfer syntax {}); convert with `gdcmconv --raw`"
UNREADABLE = "cannot be decoded: truncated or damaged; copy it again"


@dataclass(frozen=True)
class Refusal:
    """A file or folder that is not used, and why; the reason never quotes header text."""

    path: Path
    reason: str


@dataclass(frozen=True)
class DicomSeries:
    """A usable series: files in slice order, spacing between slices in mm, what was refused in the same study."""

    files: tuple[Path, ...]
    patient_id: str | None = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    size: tuple[int, int]
    direction: tuple[float, ...]
    """3x3, row by row; its columns are the directions of a row, of a column, and from slice to slice."""
    spacing_mm: tuple[float, float, float]
    """Along a row, along a column, between slices."""
    coverage_mm: float
    """Extent along z."""
    refused: tuple[Refusal, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that holds all files."""
        return Path(os.path.commonpath([file.parent for file in self.files]))

    @property
    def axial(self) -> bool:
        """Whether the slices are stacked along z rather than x or y."""
        return abs(self.direction[8]) > AXIAL_COSINE


@dataclass(frozen=True)
class DicomFindings:
    """What a folder holds: one series per study, refusals of everything else, number of files that are no image."""

    series: tuple[DicomSeries, ...]
    refused: tuple[Refusal, ...]
    ignored: int


def discover(folder: Path, *, root: Path, max_gib: float, tick: Callable[[], None] = lambda: None) -> DicomFindings:
    """Read every header below `folder` once and choose a series per study by the rule in the module's docstring.

    Args:
        folder: where to look, by content and not by file name.
        root: the data folder that links may not leave.
        max_gib: larger files are refused unopened.
        tick: called after each file; for a progress bar, or to stop by raising.
    """
    studies: dict[tuple[str, str], list[SliceHeader]] = defaultdict(list)
    problems: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    ignored = 0
    for path in _files(folder, root, problems, set()):
        found = _open(path, max_gib)
        if isinstance(found, SliceHeader):
            studies[found.patient_id or "", found.study_uid].append(found)
        elif found is None:
            ignored += 1
        else:
            problems[path.parent, found].append(path)
        tick()
    refused = [Refusal(paths[0], _counted(len(paths), reason)) for (_, reason), paths in problems.items()]
    chosen: list[DicomSeries] = []
    for _, slices in sorted(studies.items()):
        best, others = _choose(slices)
        if best is None:
            refused += others
        else:
            chosen.append(best)
    return DicomFindings(tuple(chosen), tuple(sorted(refused, key=lambda refusal: refusal.path)), ignored)


def _files(folder: Path, root: Path, problems: dict[tuple[Path, str], list[Path]], seen: set[Path]) -> Iterator[Path]:
    """Every file below `folder` in a fixed order; each real folder once; links that leave `root` go to `problems`."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            try:
                inside(path, root)
            except DataError:
                problems[folder, LEAVES].append(path)
                continue
        if path.is_dir():
            yield from _files(path, root, problems, seen)
        elif path.is_file():
            yield path


def _open(path: Path, max_gib: float) -> SliceHeader | str | None:
    """The header of a DICOM image, the reason why it cannot be read, or None for any other file."""
    try:
        meta = file_meta(path)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    # Some exporters leave the class out of the file meta group; then the data set decides.
    if meta is None or not (meta.object_class or IMAGE_OBJECTS).startswith(IMAGE_OBJECTS):
        return None
    if path.stat().st_size > max_gib * GIB:
        return f"larger than data.max_file_gib, {max_gib:g} GiB"
    if not meta.transfer_syntax:
        return UNREADABLE
    if meta.transfer_syntax not in READABLE_SYNTAXES:
        return NO_CODEC.format(_uid(meta.transfer_syntax))
    header = read_header(path, meta)
    # Structure sets, plans and the like share the prefix of the images and have no pixels.
    return UNREADABLE if header is None and meta.object_class in (CT_IMAGE, *ENHANCED_CT) else header


def _uid(text: str) -> str:
    """A UID as digits and dots alone, so that nothing else from a header reaches a message."""
    return "".join(c for c in text if c in "0123456789.")[:64] or "none"


def _counted(count: int, reason: str) -> str:
    return reason if count == 1 else f"{count} files: {reason}"


def _choose(slices: list[SliceHeader]) -> tuple[DicomSeries | None, list[Refusal]]:
    """The series of a study that is used, and why the others are not."""
    groups: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        groups[header.series_uid].append(header)
    usable: list[DicomSeries] = []
    refused: list[Refusal] = []
    for _, group in sorted(groups.items()):
        series = _as_series(group)
        if isinstance(series, DicomSeries):
            usable.append(series)
        else:
            refused.append(Refusal(group[0].path, _counted(len(group), series)))
    if not usable:
        return None, refused
    pool = [series for series in usable if series.axial] or usable
    longest = max(series.coverage_mm for series in pool)
    pool = [series for series in pool if series.coverage_mm >= longest - SAME_COVERAGE_MM]
    best = min(pool, key=lambda series: (-len(series.files), series.series_uid))
    why = f"another series of the study is used ({len(best.files)} slices, {best.coverage_mm:.0f} mm along z)"
    refused += [Refusal(s.files[0], _counted(len(s.files), why)) for s in usable if s is not best]
    return replace(best, refused=tuple(refused)), refused


def _as_series(group: list[SliceHeader]) -> DicomSeries | str:
    """The slices of one series in order along their normal, or the reason why they are no CT volume."""
    slices = list({(header.instance_uid, header.position): header for header in reversed(group)}.values())
    reason = _not_ct(slices) or _mixed(slices)
    if reason:
        return reason
    first = slices[0]
    normal = first.normal
    slices.sort(key=lambda header: float(normal @ header.position))
    positions = np.array([header.position for header in slices])
    reason = _not_stacked(positions, normal)
    if reason:
        return reason
    step = float((positions[-1] - positions[0]) @ normal) / (len(slices) - 1)
    direction = np.stack([first.orientation[:3], first.orientation[3:], normal], axis=1)
    spacing = (first.spacing[1], first.spacing[0], step)
    extent = np.array([first.size[1], first.size[0], len(slices)]) * spacing
    return DicomSeries(
        files=tuple(header.path for header in slices),
        patient_id=first.patient_id,
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        size=first.size,
        direction=tuple(float(v) for v in direction.ravel()),
        spacing_mm=spacing,
        coverage_mm=float(np.max(np.abs(direction[2]) * extent)),
    )


def _not_ct(slices: list[SliceHeader]) -> str | None:
    """Why the images of a series are not the slices of a CT."""
    if any(header.modality != "CT" for header in slices):
        return "modality is not CT"
    if any(header.object_class in ENHANCED_CT or header.frames > 1 for header in slices):
        return "multi-frame (enhanced) CT is not supported; export it as single-frame CT"
    if any(header.object_class != CT_IMAGE for header in slices):
        return "secondary capture or other derived object, not CT images"
    if any("LOCALIZER" in header.image_type for header in slices):
        return "localizer (scout)"
    if any(header.samples != 1 for header in slices):
        return "color images, not HU"
    if any(header.rescale_type not in HU_RESCALE_TYPES for header in slices):
        return "values are not HU by their RescaleType"
    if not all(header.complete for header in slices):
        return UNREADABLE
    if not all(header.study_uid and header.series_uid for header in slices):
        return "no StudyInstanceUID or SeriesInstanceUID in the headers"
    if not all(header.position and header.orientation and header.spacing for header in slices):
        return "no position, orientation or pixel spacing in the headers"
    if len(slices) < MIN_SLICES:
        return f"only {len(slices)} slices, expected at least {MIN_SLICES}"
    return None


def _mixed(slices: list[SliceHeader]) -> str | None:
    """Why the slices do not share one grid."""
    first = slices[0]
    rows = np.array(first.orientation).reshape(2, 3)
    if np.abs(rows @ rows.T - np.eye(2)).max() > SAME_COSINE:
        return "the row and column directions are not orthonormal"
    if any(header.size != first.size for header in slices):
        return "slices of different size in one series"
    if not np.allclose([header.spacing for header in slices], first.spacing, rtol=1e-3, atol=0):
        return "slices of different pixel spacing in one series"
    if np.abs(np.array([header.orientation for header in slices]) - first.orientation).max() > SAME_COSINE:
        return "slices of different orientation in one series"
    return None


def _not_stacked(positions: np.ndarray[Any, Any], normal: np.ndarray[Any, Any]) -> str | None:
    """Why positions (N, 3), sorted along the normal, are not an even stack."""
    offsets = positions - positions[0]
    along = offsets @ normal
    steps = np.diff(along)
    duplicates = int(np.count_nonzero(steps < SAME_PLACE_MM))
    if duplicates:
        return f"{duplicates} slices at the same position as another (several acquisitions in one series?)"
    sideways = np.linalg.norm(offsets - along[:, None] * normal, axis=1)
    tilt = float(np.degrees(np.arctan2(sideways.max(), along[-1])))
    if tilt > MAX_TILT_DEGREES:
        return f"gantry tilt or shifted slices: {tilt:.1f} degrees off the slice normal; use the tilt-corrected series"
    usual = float(np.median(steps))
    allowed = max(GAP_MM, GAP_SHARE * usual)
    if np.abs(steps - usual).max() <= allowed:
        return None
    missing = np.round(steps / usual) - 1
    if np.abs(steps - (missing + 1) * usual).max() <= allowed and missing.min() >= 0:
        return f"missing slices: {int(missing.sum())} (steps of {steps.max():.2f} mm among steps of {usual:.2f} mm)"
    return f"uneven slice positions: steps of {steps.min():.2f} to {steps.max():.2f} mm"


def read_slices(series: DicomSeries, *, max_gib: float) -> sitk.Image:
    """Decode the slices one by one, each with its own rescale slope and intercept, into one float32 image in HU."""
    rows, columns = series.size
    check_declared(series.folder, (len(series.files), rows, columns), 4, max_gib)
    stack = np.empty((len(series.files), rows, columns), np.float32)
    reader = image_reader("GDCMImageIO")
    reader.SetOutputPixelType(sitk.sitkFloat32)
    for index, path in enumerate(series.files):
        reader.SetFileName(str(path))
        try:
            pixels = sitk.GetArrayFromImage(reader.Execute())  # a view would outlive its image
        except RuntimeError:
            raise DataError(f"{path}: {UNREADABLE}") from None
        if pixels.size != rows * columns:
            raise DataError(f"{path}: expected {rows} x {columns} pixels, found {' x '.join(map(str, pixels.shape))}")
        stack[index] = pixels.reshape(rows, columns)
    image = sitk.GetImageFromArray(stack)
    image.SetDirection(series.direction)
    image.SetSpacing(series.spacing_mm)
    return image
