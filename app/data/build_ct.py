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
from app.data.radiograph import Fit, fit_radiographs, read_radiograph
from app.data.sources import Source
from app.errors import DataError
from app.physics.geometry import VIEWS

CHUNK_BYTES = 2**20


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
    built.notes += source.notes
    return _with_radiographs(built, given, ct, config, render) if given else built


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
    """Replace rendered views by given ones.

    Radiographs rendered elsewhere look at the middle of the scan more often than at the patient's, so where they do not
    fit the patient-centred cube the scan-centred one is tried.
    """
    try:
        fits = _fits(given, built, config)
    except DataError as error:
        z, y, x = (count * spacing / 2 for count, spacing in zip(ct.hu.shape, ct.spacing_mm, strict=True))
        try:
            built = _cut(ct, (z, y, x), config, render)
            fits = _fits(given, built, config)
        except DataError:
            # The cube around the patient is the one that is meant: its reason is the one to tell.
            raise error from None
        built.notes.append("centred on the scan, as its radiographs are")
    for view, fit in fits.items():
        built.xrays[VIEWS.index(view)] = fit.line_integrals
        built.notes.append(f"{view} given as {fit.reading}, difference {fit.difference:.3f}")
    built.notes += [f"{view} not given: rendered" for view in VIEWS if view not in fits]
    built.drr_difference = max(fit.difference for fit in fits.values())
    return built


def _fits(given: dict[str, NDArray[np.float32]], built: Built, config: Config) -> dict[str, Fit]:
    fits = fit_radiographs(given, built.xrays)
    _refuse(drr_refusal(max(fit.difference for fit in fits.values()), config))
    return fits


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
