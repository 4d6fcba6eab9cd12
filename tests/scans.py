"""Writes scans and radiographs of phantom patients, as a user might have them."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from app.config import Config
from app.data.anatomy import body_centre, resample_cube
from app.data.build import Renderer, clip_hu
from app.data.cases import PrepareReport, prepare
from app.data.ct import read_ct
from app.data.phantom import phantom_hu
from app.errors import DataError
from app.workspace import Workspace
from tests.conftest import tiny_config

FIELD_OF_VIEW_MM = 384.0


def ct_config(*overrides: str) -> Config:
    """The tiny cascade on scans instead of phantoms."""
    return tiny_config("data.source=ct", *overrides)


def write_scan(path: Path, index: int, edge: int = 48) -> NDArray[np.int16]:
    """Phantom patient `index` as a volume file of any format, (edge, edge, edge) over 384 mm; returns its HU."""
    hu = phantom_hu(11, index, edge, FIELD_OF_VIEW_MM)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing([FIELD_OF_VIEW_MM / edge] * 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return hu


def own_xrays(path: Path, config: Config) -> NDArray[np.float32]:
    """The radiographs (2, N, N) that the product renders of a volume file at the finest edge."""
    ct = read_ct(path, max_gib=1)
    hu, _ = resample_cube(ct, config.stages[-1].resolution, FIELD_OF_VIEW_MM, body_centre(ct))
    return Renderer(config)(clip_hu(hu, config.data.hu_window))


def write_png(path: Path, values: NDArray[np.float32]) -> None:
    """An array with row 0 inferior as a 16-bit image with row 0 superior; the largest value becomes white."""
    pixels = np.rint(values[::-1] * (65535 / values.max())).astype(np.uint16)
    Image.fromarray(pixels).save(path)


def workspace_in(folder: Path) -> Workspace:
    """A workspace with its folders."""
    workspace = Workspace(folder)
    workspace.ensure()
    return workspace


def file_times(folder: Path) -> dict[str, int]:
    """Modification time of every array below a folder."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def reasons(report: PrepareReport) -> dict[str, str]:
    """Path -> reason of each refusal."""
    return {entry.name: entry.reason or "" for entry in report.refused}


def refusals(config: Config, workspace: Workspace) -> str:
    """The message where nothing can be used."""
    with pytest.raises(DataError) as caught:
        prepare(config, workspace)
    return str(caught.value)
