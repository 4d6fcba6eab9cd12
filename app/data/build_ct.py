"""From one source of the data folder to its finest cube and radiographs, or to the reason why it is refused.

Shapes: F edge of the finest cube.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.config import Config
from app.data.acceptance import coverage_refusal, drr_refusal, lung_refusal
from app.data.anatomy import LUNG_EDGE, Point, body_centre, lung_fraction, resample_cube
from app.data.build import Renderer, clip_hu
from app.data.ct import CTVolume, read_ct, read_series
from app.data.dicom import DicomSeries
from app.data.radiograph import CLEARLY_BETTER, Alignment, align, read_radiograph
from app.data.sources import Source
from app.errors import DataError
from app.physics.geometry import VIEWS

CHUNK_BYTES = 2**20
WELL_ALIGNED = 0.05
"""Relative L2 below which radiographs need no other place."""


@dataclass
class Built:
    """A case before it is written."""

    cube: NDArray[np.int16]
    """(F, F, F) HU."""
    xrays: NDArray[np.float32]
    """(2, F, F) line integrals."""
    size: str
    coverage: float
    lung_fraction: float
    drr_difference: float | None
    notes: list[str] = field(default_factory=list)


def content_hash(source: Source) -> str:
    """sha256 of a source's files: of the file itself where there is one, else of their hashes in order."""
    hashes = [_file_hash(path) for path in source.files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def build_case(source: Source, config: Config, render: Renderer) -> Built:
    """Read, resample and judge one source.

    Raises:
        DataError: it is refused; the message may hold paths.
    """
    limit = config.data.max_file_gib
    volume = source.volume
    ct = read_series(volume, max_gib=limit) if isinstance(volume, DicomSeries) else read_ct(volume, max_gib=limit)
    given = {view: read_radiograph(path) for view, path in source.radiographs.items()}
    built = _cut(ct, body_centre(ct), config, render)
    if given:
        built = _with_radiographs(built, given, ct, config, render)
    built.notes += source.notes
    return built


def _cut(ct: CTVolume, centre_mm: Point, config: Config, render: Renderer) -> Built:
    """The finest cube around a point, with our own radiographs of it, if it lies within the limits."""
    edge, fov = config.stages[-1].resolution, config.data.field_of_view_mm
    hu, coverage = resample_cube(ct, edge, fov, centre_mm)
    _refuse(coverage_refusal(coverage, config))
    # On a coarser grid lungs melt into their surroundings, and what is a thorax may not depend on the stages.
    lungs = lung_fraction(hu if edge >= LUNG_EDGE else resample_cube(ct, LUNG_EDGE, fov, centre_mm)[0], fov)
    _refuse(lung_refusal(lungs, config))
    cube = clip_hu(hu, config.data.hu_window)
    return Built(cube, render(cube), _size(ct), coverage, lungs, None, list(ct.notes))


def _with_radiographs(
    built: Built, given: dict[str, NDArray[np.float32]], ct: CTVolume, config: Config, render: Renderer
) -> Built:
    """Replace rendered views by given ones, after the cube was moved to where they look."""
    alignments = align(given, built.xrays)
    if _difference(alignments) > WELL_ALIGNED:
        built, alignments = _try_scan_centre(built, alignments, given, ct, config, render)
    for alignment in alignments.values():
        _refuse(alignment.refusal())
    _refuse(drr_refusal(_difference(alignments), config))
    for view, alignment in alignments.items():
        built.xrays[VIEWS.index(view)] = alignment.fit.line_integrals
        built.notes.append(f"{view} given as {alignment.fit.reading}, difference {alignment.fit.difference:.3f}")
    built.notes += [f"{view} not given: rendered" for view in VIEWS if view not in alignments]
    built.drr_difference = _difference(alignments)
    return built


def _try_scan_centre(
    built: Built,
    alignments: dict[str, Alignment],
    given: dict[str, NDArray[np.float32]],
    ct: CTVolume,
    config: Config,
    render: Renderer,
) -> tuple[Built, dict[str, Alignment]]:
    """The cube around the middle of the scan, if its projections fit better than the patient-centred ones in any
    orientation: radiographs rendered elsewhere look there."""
    z, y, x = (count * spacing / 2 for count, spacing in zip(ct.hu.shape, ct.spacing_mm, strict=True))
    try:
        centred = _cut(ct, (z, y, x), config, render)
    except DataError:
        # There is no thorax in that cube; the patient-centred one stands, with its own reasons.
        return built, alignments
    moved = align(given, centred.xrays)
    if _difference(moved) >= CLEARLY_BETTER * max(each.best_difference for each in alignments.values()):
        return built, alignments
    centred.notes += ["centred on the scan, as its radiographs are"]
    return centred, moved


def _difference(alignments: dict[str, Alignment]) -> float:
    return max(alignment.fit.difference for alignment in alignments.values())


def _refuse(reason: str | None) -> None:
    if reason:
        raise DataError(reason)


def _size(ct: CTVolume) -> str:
    """Size and spacing in the order x, y, z."""
    size = "x".join(str(count) for count in reversed(ct.hu.shape))
    return f"{size}, {'x'.join(f'{spacing:.3g}' for spacing in reversed(ct.spacing_mm))} mm"


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
