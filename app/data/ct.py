"""CT files to HU volumes in patient axes: NIfTI, NRRD, MHA, NumPy arrays with a sidecar, DICOM folders.

Shapes: arrays are (Z, Y, X), z inferior -> superior, y anterior -> posterior, x right -> left; lengths in mm.
SimpleITK reads every format because it brings the DICOM codecs and thinks in LPS, our frame, throughout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import SimpleITK as sitk

from app.data.dicom import DicomSeries, discover, read_slices
from app.data.headers import NOT_FINITE, check_mha, check_nifti, check_nrrd, check_orthonormal
from app.data.itk import image_reader
from app.data.limits import check_declared, check_file_size
from app.errors import DataError

AIR_HU = -1000.0
LOWEST_HU = -1024.0
HIGHEST_AIR_HU = -200.0
SMALLEST_RANGE_HU = 500.0
MIN_EDGE = 16
MAX_SPACING_MM = 20.0
ALIGNED = 1e-3
FORMATS = {".nii.gz": "NiftiImageIO", ".nii": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".mha": "MetaImageIO"}
VOLUME_SUFFIXES = (*FORMATS, ".npy")
DETACHED_SUFFIXES = (".nhdr", ".mhd", ".hdr", ".img")
SCALAR_PIXELS = {
    sitk.sitkInt8, sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkUInt16, sitk.sitkInt32, sitk.sitkUInt32,
    sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat32, sitk.sitkFloat64,
}  # fmt: skip
SIDECAR_BYTES = 4096


@dataclass(frozen=True)
class CTVolume:
    """A CT in HU on the patient's axes: `hu` (Z, Y, X) float32, spacing (z, y, x), what was changed on reading."""

    hu: np.ndarray[Any, np.dtype[np.float32]]
    spacing_mm: tuple[float, float, float]
    notes: tuple[str, ...] = ()


def volume_suffix(path: Path) -> str | None:
    """The suffix by which `path` is a volume file that `read_ct` knows or refuses by name, else None."""
    name = path.name.lower()
    return next((s for s in (*VOLUME_SUFFIXES, *DETACHED_SUFFIXES) if name.endswith(s) and name != s), None)


def read_ct(path: Path, *, max_gib: float) -> CTVolume:
    """Read a volume file, or a folder with one DICOM study.

    Raises:
        DataError: the file cannot be used; the message says why and never quotes header text.
    """
    if path.is_dir():
        return read_series(_only_study(path, max_gib), max_gib=max_gib)
    suffix = volume_suffix(path)
    if suffix in DETACHED_SUFFIXES:
        raise DataError(f"{path}: a {suffix} file keeps its data elsewhere; save it as one .nrrd, .mha or .nii.gz file")
    if suffix is None:
        raise DataError(f"{path}: expected one of {', '.join(VOLUME_SUFFIXES)} or a DICOM folder")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    check_file_size(path, max_gib)
    if suffix == ".npy":
        return _read_npy(path, max_gib)
    return _to_patient_axes(_read_image(path, suffix, max_gib), path, max_gib)


def read_series(series: DicomSeries, *, max_gib: float) -> CTVolume:
    """Read the slices of one DICOM series that `discover` found usable."""
    return _to_patient_axes(read_slices(series, max_gib=max_gib), series.folder, max_gib)


def _only_study(folder: Path, max_gib: float) -> DicomSeries:
    """The chosen series of the one study below `folder`."""
    found = discover(folder, root=folder, max_gib=max_gib)
    if len(found.series) == 1:
        return found.series[0]
    if found.series:
        raise DataError(f"{folder}: expected one DICOM study, found {len(found.series)}; give each its own folder")
    reasons = "; ".join(f"{refusal.path.name}: {refusal.reason}" for refusal in found.refused[:5])
    raise DataError(f"{folder}: no usable DICOM series{': ' + reasons if reasons else ', and no DICOM file'}")


def _read_image(path: Path, suffix: str, max_gib: float) -> sitk.Image:
    """Decode a volume file as a 3D float32 image, after its header was found plausible."""
    if suffix in (".nii", ".nii.gz"):
        check_nifti(path, max_gib)
    elif suffix == ".nrrd":
        check_nrrd(path)
    else:
        check_mha(path)
    reader = image_reader(FORMATS[suffix])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_header(path, reader, max_gib)
        reader.SetOutputPixelType(sitk.sitkFloat32)
        image = reader.Execute()
    except RuntimeError:
        # ITK's own text may quote the header, and the header may hold a name.
        raise DataError(f"{path}: cannot be decoded (damaged, truncated, sheared or in an unusual encoding)") from None
    return image[(slice(None),) * 3 + (0,) * (image.GetDimension() - 3)]


def _check_header(path: Path, reader: sitk.ImageFileReader, max_gib: float) -> None:
    """Check size, pixel type and dimension before anything is decoded."""
    size, pixel = reader.GetSize(), reader.GetPixelIDValue()
    if reader.GetNumberOfComponents() != 1 or pixel not in SCALAR_PIXELS:
        raise DataError(f"{path}: expected one number per voxel, found {sitk.GetPixelIDValueAsString(pixel)}")
    if len(size) < 3 or any(n != 1 for n in size[3:]):
        raise DataError(f"{path}: expected a 3D volume, found size {' x '.join(map(str, size))}")
    wide = pixel in (sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat64)
    check_declared(path, size, 8 if wide else 4, max_gib)


def _read_npy(path: Path, max_gib: float) -> CTVolume:
    """Read an array (Z, Y, X) in our axes; its spacing stands in `<stem>.json` beside it."""
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(stream)
    except (ValueError, KeyError, SyntaxError, TokenError):
        raise DataError(f"{path}: not a NumPy array of format 1.0 or 2.0; save it with numpy.save") from None
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: expected integers or floats, found dtype {dtype}")
    if len(shape) != 3:
        raise DataError(f"{path}: expected a 3D volume, found size {' x '.join(map(str, shape))}")
    check_declared(path, shape, dtype.itemsize, max_gib)
    spacing = _sidecar_spacing(path)
    _check_grid(path, shape, spacing)
    try:
        hu = np.ascontiguousarray(np.load(path, mmap_mode="r", allow_pickle=False), dtype=np.float32)
    except ValueError:
        raise DataError(f"{path}: truncated: shorter than its header says") from None
    return _to_hu(hu, spacing, path, [])


def _sidecar_spacing(path: Path) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm from the JSON file beside a .npy volume."""
    sidecar = path.with_suffix(".json")
    hint = 'write {"spacing_mm": [z, y, x]} into it, for example {"spacing_mm": [2.5, 0.7, 0.7]}'
    if not sidecar.is_file():
        raise DataError(f"{path}: an array has no spacing; expected {sidecar.name} beside it: {hint}")
    try:
        with sidecar.open("rb") as stream:
            spacing = json.loads(stream.read(SIDECAR_BYTES))["spacing_mm"]
        z, y, x = (float(value) for value in spacing)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{sidecar}: expected the spacing of {path.name}: {hint}") from None
    return z, y, x


def _check_grid(path: Path, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    """Check the number of voxels and the spacing of each axis."""
    if min(shape) < MIN_EDGE:
        raise DataError(
            f"{path}: expected at least {MIN_EDGE} voxels along each axis, found {' x '.join(map(str, shape))}"
        )
    if not all(0 < s <= MAX_SPACING_MM for s in spacing_mm):
        found = " x ".join(f"{s:g}" for s in spacing_mm)
        raise DataError(f"{path}: expected a spacing above 0 and up to {MAX_SPACING_MM:g} mm, found {found} mm")


def _to_patient_axes(image: sitk.Image, path: Path, max_gib: float) -> CTVolume:
    """Bring a 3D image onto the patient's axes (LPS) by flips and transposes; an oblique one is resampled."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    check_orthonormal(path, direction)
    _check_grid(path, image.GetSize()[::-1], image.GetSpacing()[::-1])
    image = sitk.DICOMOrient(image, "LPS")
    notes: list[str] = []
    spacing = image.GetSpacing()[::-1]
    tilt = np.array(image.GetDirection()).reshape(3, 3)
    if np.abs(tilt - np.eye(3)).max() > ALIGNED:
        degrees = float(np.degrees(np.arccos(np.clip((np.trace(tilt) - 1) / 2, -1, 1))))
        notes.append(f"oblique by {degrees:.1f} degrees: resampled onto the patient's axes")
        hu = _straighten(_cleaned(image, path), path, max_gib)
    else:
        hu = sitk.GetArrayFromImage(image)
    return _to_hu(hu, spacing, path, notes)


def _cleaned(image: sitk.Image, path: Path) -> sitk.Image:
    """The image with non-air padding replaced, so that interpolation does not smear it."""
    hu = sitk.GetArrayFromImage(image)
    _check_finite(hu, path)
    hu[hu < LOWEST_HU] = AIR_HU
    cleaned = sitk.GetImageFromArray(hu)
    cleaned.CopyInformation(image)
    return cleaned


def _straighten(image: sitk.Image, path: Path, max_gib: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Resample linearly onto the axes of the patient, into the smallest box around the volume; air outside."""
    size, spacing = np.array(image.GetSize()), np.array(image.GetSpacing())
    ends = np.stack([np.full(3, -0.5), size - 0.5])
    corners = np.array(
        [
            image.TransformContinuousIndexToPhysicalPoint([float(ends[a][0]), float(ends[b][1]), float(ends[c][2])])
            for a in (0, 1) for b in (0, 1) for c in (0, 1)
        ]
    )  # fmt: skip
    low, high = corners.min(0), corners.max(0)
    box = [int(n) for n in np.maximum(np.round((high - low) / spacing), 1)]
    check_declared(path, box, 4, max_gib)
    first = (low + high) / 2 - (np.array(box) - 1) / 2 * spacing
    return np.asarray(
        sitk.GetArrayFromImage(
            sitk.Resample(
                image, box, sitk.Transform(), sitk.sitkLinear, first.tolist(), spacing.tolist(),
                np.eye(3).ravel().tolist(), AIR_HU, sitk.sitkFloat32,
            )
        )
    )  # fmt: skip


def _check_finite(hu: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse voxels that are NaN or infinite."""
    if np.isfinite(hu.min()) and np.isfinite(hu.max()):
        return
    bad = hu.size - int(np.count_nonzero(np.isfinite(hu)))
    raise DataError(NOT_FINITE.format(path, bad))


def _to_hu(
    hu: np.ndarray[Any, np.dtype[np.float32]], spacing_mm: tuple[float, ...], path: Path, notes: list[str]
) -> CTVolume:
    """Check that the values are HU and set what lies outside the scanner's circle to air."""
    _check_finite(hu, path)
    outside = hu < LOWEST_HU
    count = int(np.count_nonzero(outside))
    measured = hu[~outside] if count else hu
    lowest, highest = (float(measured.min()), float(measured.max())) if measured.size else (LOWEST_HU, LOWEST_HU)
    if lowest > HIGHEST_AIR_HU or highest - lowest < SMALLEST_RANGE_HU:
        hint = " (stored values without the rescale offset, usually -1024?)" if lowest >= 0 and highest > 500 else ""
        raise DataError(
            f"{path}: not HU: expected air near -1000 and tissue above 0, found {lowest:g} to {highest:g}{hint}"
        )
    if count:
        hu[outside] = AIR_HU
        notes.append(f"{100 * count / hu.size:.2g} % of the voxels below {LOWEST_HU:g} HU set to air")
    z, y, x = (float(s) for s in spacing_mm)
    return CTVolume(hu, (z, y, x), tuple(notes))
