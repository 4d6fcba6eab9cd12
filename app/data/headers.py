"""Plain-Python checks of NIfTI, NRRD and MHA headers, for what ITK would silently make up.

ITK fills in an orientation or a spacing that the file does not give, and prefers one NIfTI geometry where the other
is sheared. A volume whose geometry is a guess may be mirrored, so these files are refused here, before ITK reads them.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.data.limits import check_declared, chunks
from app.errors import DataError

HEADER_BYTES = 2**16
NIFTI_SLACK_BYTES = 2**20
NIFTI_FLOATS = {16: "f4", 64: "f8"}
NOT_FINITE = "{}: {} voxels are NaN or infinite; replace them, air is -1000 HU"
ORTHOGONAL = 1e-3
NRRD_SPACES = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip


def check_nifti(path: Path, max_gib: float) -> None:
    """Check size, single-file layout, geometry and values of a .nii or .nii.gz file, in one pass over its bytes."""
    stream = chunks(path, max_gib)
    first = next(stream)
    header = _nifti_fields(path, first[:544])
    check_declared(path, header["size"], header["bits"] // 8, max_gib)
    _check_nifti_geometry(path, header)
    found, rest, bad = 0, b"", 0
    for chunk in itertools.chain([first], stream):
        values = rest + chunk[max(header["offset"] - found, 0) :]
        whole = len(values) // 8 * 8
        bad += _not_finite(values[:whole], header)
        rest = values[whole:]
        found += len(chunk)
    declared = math.prod(header["size"]) * header["bits"] // 8 + header["offset"]
    if found < declared:
        raise DataError(f"{path}: truncated: the header declares {declared} bytes, found {found}")
    if found > declared + NIFTI_SLACK_BYTES:
        raise DataError(f"{path}: the header declares {declared} bytes, found {found}: damaged or made to mislead")
    if bad:
        raise DataError(NOT_FINITE.format(path, bad))


def _not_finite(raw: bytes, header: dict[str, Any]) -> int:
    """How many of the voxels in `raw` are NaN or infinite; ITK's reader would set them to 0 HU, tissue, silently."""
    if header["datatype"] not in NIFTI_FLOATS:
        return 0
    values = np.frombuffer(raw, np.dtype(header["order"] + NIFTI_FLOATS[header["datatype"]]))
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def _nifti_fields(path: Path, raw: bytes) -> dict[str, Any]:
    """The fields of a NIfTI-1 or NIfTI-2 header that decide size and geometry."""
    if len(raw) < 348:
        raise DataError(f"{path}: not a NIfTI file: shorter than its header")
    for order in "<>":
        version = {348: 1, 540: 2}.get(struct.unpack_from(f"{order}i", raw)[0])
        if version:
            break
    else:
        raise DataError(f"{path}: not a NIfTI file: expected 348 or 540 in its first four bytes")
    magic_at, magic = (344, b"n+1") if version == 1 else (4, b"n+2")
    if (version == 2 and len(raw) < 540) or raw[magic_at : magic_at + 3] != magic:
        raise DataError(f"{path}: expected a single-file NIfTI ({magic.decode()}), found the header of a detached pair")

    def get(code: str, at_1: int, at_2: int) -> tuple[Any, ...]:
        return struct.unpack_from(order + code, raw, at_1 if version == 1 else at_2)

    dims = get("8h", 40, 0)[1:] if version == 1 else get("8q", 0, 16)[1:]
    rank = get("h", 40, 0)[0] if version == 1 else get("q", 0, 16)[0]
    offset = get("f", 108, 0)[0] if version == 1 else get("q", 0, 168)[0]
    reals = "f" if version == 1 else "d"
    codes = get("hh", 252, 0) if version == 1 else get("ii", 0, 344)
    if not 1 <= rank <= 7 or any(d < 1 for d in dims[:rank]) or not 0 <= offset < 2**31:
        raise DataError(f"{path}: damaged NIfTI header: sizes {list(dims[:rank])}")
    return {
        "size": dims[:rank],
        "order": order,
        "datatype": get("h", 70, 12)[0],
        "bits": get("h", 72, 14)[0],
        "offset": int(offset),
        "pixdim": np.array(get(f"8{reals}", 76, 104)[1:4]),
        "qform": codes[0],
        "sform": codes[1],
        "affine": np.array(get(f"12{reals}", 280, 400)).reshape(3, 4)[:, :3],
    }


def _check_nifti_geometry(path: Path, header: dict[str, Any]) -> None:
    """Refuse a NIfTI without orientation, with a sheared one, or with two spacings."""
    if header["qform"] <= 0 and header["sform"] <= 0:
        raise DataError(f"{path}: no orientation in the header (qform_code and sform_code are 0); export it again")
    pixdim = header["pixdim"]
    if not np.isfinite(pixdim).all() or (pixdim <= 0).any():
        raise DataError(f"{path}: expected a positive spacing, found {_triple(pixdim)} mm")
    if header["sform"] > 0:
        columns = np.linalg.norm(header["affine"], axis=0)
        check_orthonormal(path, header["affine"] / np.where(columns > 0, columns, 1))
        if not np.allclose(columns, pixdim, rtol=1e-2):
            raise DataError(f"{path}: the header has two spacings, {_triple(pixdim)} and {_triple(columns)} mm (sform)")


def _triple(values: np.ndarray[Any, Any]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def check_orthonormal(path: Path, direction: np.ndarray[Any, Any]) -> None:
    """Refuse a (3, 3) direction matrix that is not a rotation or mirrored rotation of the axes."""
    error = np.abs(direction.T @ direction - np.eye(3)).max() if np.isfinite(direction).all() else np.inf
    if not error < ORTHOGONAL:
        raise DataError(
            f"{path}: the axes in the header are not orthonormal (sheared, zero or not finite, deviation {error:.2g}); "
            "resample the volume onto orthogonal axes (gantry tilt: use the tilt-corrected export)"
        )


def check_nrrd(path: Path) -> None:
    """Refuse a NRRD that keeps its data elsewhere or does not say how it lies in the patient."""
    fields = dict(_text_fields(path, b"NRRD", ":"))
    if "data file" in fields or "datafile" in fields:
        raise DataError(f"{path}: its data lie in another file; save it as one attached .nrrd")
    if fields.get("space", "").lower() not in NRRD_SPACES or "space directions" not in fields:
        raise DataError(
            f"{path}: no orientation in the header (expected `space` as one of LPS, RAS, LAS, and `space directions`)"
        )


def check_mha(path: Path) -> None:
    """Refuse a MetaImage that keeps its data elsewhere or does not give spacing and orientation."""
    fields = dict(_text_fields(path, b"", "="))
    if fields.get("elementdatafile") != "LOCAL":
        raise DataError(f"{path}: expected ElementDataFile = LOCAL; save it as one attached .mha")
    missing = [
        names[0]
        for names in (("TransformMatrix", "Rotation", "Orientation"), ("ElementSpacing",))
        if not any(name.lower() in fields for name in names)
    ]
    if missing:
        raise DataError(f"{path}: no {' and no '.join(missing)} in the header; export it again with its geometry")


def _text_fields(path: Path, magic: bytes, separator: str) -> Iterator[tuple[str, str]]:
    """Key (lower case) and value of each line of a text header, up to a blank line or the data."""
    with path.open("rb") as stream:
        raw = stream.read(HEADER_BYTES)
    if not raw.startswith(magic):
        raise DataError(f"{path}: not a NRRD file: expected {magic.decode()} in its first bytes")
    for line in raw.split(b"\n"):
        key, found, value = line.decode("latin-1").strip().partition(separator)
        if not key:
            return
        if found:
            yield key.strip().lower(), value.strip()
        if key.strip().lower() == "elementdatafile":
            return
