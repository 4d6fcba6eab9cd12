"""Writes DICOM slices tag by tag, so that tests can plant any header that a scanner or an exporter might write."""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
PATIENT_NAME, PATIENT_ID = "Doe^Jane", "SECRET-4711"
Tag = tuple[int, int]


def element(tag: Tag, vr: str, value: str | bytes, *, implicit: bool = False) -> bytes:
    """One data element, padded to even length."""
    if isinstance(value, str):
        raw = value.encode("latin-1")
        value = raw + (b"\0" if vr == "UI" else b" ") * (len(raw) % 2)
    if implicit:
        return struct.pack("<HHI", *tag, len(value)) + value
    if vr in ("OB", "OW", "SQ", "UN"):
        return struct.pack("<HH2sHI", *tag, vr.encode(), 0, len(value)) + value
    return struct.pack("<HH2sH", *tag, vr.encode(), len(value)) + value


def joined(numbers: Iterable[float]) -> str:
    """Numbers as a multi-valued decimal string."""
    return "\\".join(f"{value:.10g}" for value in numbers)


def write_slice(
    path: Path,
    stored: np.ndarray[Any, Any],
    *,
    position: Iterable[float],
    orientation: Iterable[float] = (1, 0, 0, 0, 1, 0),
    pixel_spacing: Iterable[float] = (0.8, 0.8),
    study: str = "1.2.3",
    series: str = "1.2.3.4",
    instance: str = "1.2.3.4.1",
    syntax: str = EXPLICIT,
    meta_class: bool = True,
    changes: Mapping[Tag, tuple[str, str | bytes] | None] | None = None,
) -> None:
    """Write one unsigned 16-bit CT slice (rows, columns); `changes` replaces elements, None removes one."""
    fields: dict[Tag, tuple[str, str | bytes] | None] = {
        (0x08, 0x08): ("CS", "ORIGINAL\\PRIMARY\\AXIAL"),
        (0x08, 0x16): ("UI", CT_IMAGE),
        (0x08, 0x18): ("UI", instance),
        (0x08, 0x60): ("CS", "CT"),
        (0x10, 0x10): ("PN", PATIENT_NAME),
        (0x10, 0x20): ("LO", PATIENT_ID),
        (0x20, 0x0D): ("UI", study),
        (0x20, 0x0E): ("UI", series),
        (0x20, 0x32): ("DS", joined(position)),
        (0x20, 0x37): ("DS", joined(orientation)),
        (0x28, 0x02): ("US", struct.pack("<H", 1)),
        (0x28, 0x04): ("CS", "MONOCHROME2"),
        (0x28, 0x10): ("US", struct.pack("<H", stored.shape[0])),
        (0x28, 0x11): ("US", struct.pack("<H", stored.shape[1])),
        (0x28, 0x30): ("DS", joined(pixel_spacing)),
        (0x28, 0x100): ("US", struct.pack("<H", 16)),
        (0x28, 0x101): ("US", struct.pack("<H", 16)),
        (0x28, 0x102): ("US", struct.pack("<H", 15)),
        (0x28, 0x103): ("US", struct.pack("<H", 0)),
        (0x28, 0x1052): ("DS", "-1024"),
        (0x28, 0x1053): ("DS", "1"),
        (0x7FE0, 0x10): ("OW", stored.astype("<u2").tobytes()),
    }
    fields.update(changes or {})
    object_class = fields[0x08, 0x16]
    assert object_class is not None
    meta = b"".join(
        [
            element((2, 0x01), "OB", b"\0\1"),
            element((2, 0x02), "UI", object_class[1]) if meta_class else b"",
            element((2, 0x03), "UI", instance),
            element((2, 0x10), "UI", syntax),
            element((2, 0x12), "UI", "1.2.3.9"),
        ]
    )
    body = b"".join(
        element(tag, *field, implicit=syntax == IMPLICIT) for tag, field in sorted(fields.items()) if field is not None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + element((2, 0), "UL", struct.pack("<I", len(meta))) + meta + body)


def stored_values(seed: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Random stored values that are -1024 to 1024 HU after a rescale by 1 and -1024."""
    return np.random.default_rng(seed).integers(0, 2048, shape)


def write_series(
    folder: Path,
    stored: np.ndarray[Any, Any],
    *,
    positions: Iterable[Iterable[float]] | None = None,
    step_mm: float = 2.0,
    series: str = "1.2.3.4",
    changes: Mapping[Tag, tuple[str, str | bytes] | None] | None = None,
    **options: Any,
) -> list[Path]:
    """Write (slices, rows, columns) as a stack along z, or at the given `positions`, in files named by number."""
    places = positions if positions is not None else [(-10, -20, k * step_mm) for k in range(len(stored))]
    paths = []
    for k, (pixels, position) in enumerate(zip(stored, places, strict=True)):
        paths.append(folder / f"{k:04d}")
        write_slice(
            paths[-1],
            pixels,
            position=position,
            series=series,
            instance=f"{series}.{k + 1}",
            changes=changes,
            **options,
        )
    return paths
