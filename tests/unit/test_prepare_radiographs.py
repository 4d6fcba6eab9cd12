"""Radiographs beside a scan: used as line integrals where they fit it, refused where they do not."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from app.data.build import Renderer, clip_hu
from app.data.cases import CaseStore, PrepareReport, prepare
from app.data.pooling import pool
from app.workspace import Workspace
from tests.scans import ct_config, own_xrays, reasons, workspace_in, write_png, write_scan


@pytest.fixture(scope="module")
def with_radiographs(tmp_path_factory) -> tuple[Workspace, PrepareReport]:
    """Patient folders with radiographs, right and wrong."""
    workspace = workspace_in(tmp_path_factory.mktemp("drr"))

    def patient(index: int, name: str) -> tuple[Path, np.ndarray]:
        path = workspace.data / name / f"{name}.nii"
        write_scan(path, index)
        return path.parent / name, own_xrays(path, ct_config())

    stem, xrays = patient(0, "right")
    write_png(Path(f"{stem}_pa_drr.png"), xrays[0])
    np.save(f"{stem}_lat_drr.npy", 9 - xrays[1][::-1])
    stem, xrays = patient(1, "film")
    write_png(Path(f"{stem}_frontal.png"), np.exp(-xrays[0]))
    stem, xrays = patient(3, "swapped")
    write_png(Path(f"{stem}_frontal.png"), xrays[1])
    write_png(Path(f"{stem}_lateral.png"), xrays[0])
    stem, xrays = patient(4, "turned")
    write_png(Path(f"{stem}_frontal.png"), xrays[0][:, ::-1])
    stem, xrays = patient(5, "stranger")
    write_png(Path(f"{stem}_frontal.png"), np.roll(xrays[0], 6, 1))
    twice = workspace.data / "twice"
    write_scan(twice / "twice.nii", 6)
    write_png(twice / "twice_frontal.png", xrays[0])
    np.save(twice / "twice_pa_drr.npy", xrays[0])
    return workspace, prepare(ct_config(), workspace)


def notes_of(report: PrepareReport, name: str) -> str:
    """Notes of an accepted case."""
    entry = next(entry for entry in report.accepted if entry.name.startswith(name))
    assert entry.record is not None
    return "; ".join(entry.record.notes)


def test_given_radiographs_are_used_as_line_integrals(with_radiographs, tmp_path):
    """A 16-bit picture of p and an inverted array of it come back as p, and the residual is in the table."""
    workspace, report = with_radiographs
    entry = next(entry for entry in report.accepted if entry.name.startswith("right"))
    assert entry.record is not None
    assert entry.record.drr_difference == pytest.approx(0, abs=1e-3)
    store = CaseStore.open(ct_config(), workspace)
    expected = own_xrays(workspace.data / "right" / "right.nii", ct_config())
    np.testing.assert_allclose(store.load(entry.record.id, 32).xrays, expected, atol=0.01)
    assert notes_of(report, "right") == (
        "frontal given as line integrals, difference 0.000; lateral given as inverted line integrals, difference 0.000"
    )


def test_a_missing_view_is_rendered_and_said_so(with_radiographs):
    """An intensity image of one view only."""
    notes = notes_of(with_radiographs[1], "film")
    assert notes == "frontal given as intensity, difference 0.000; lateral not given: rendered"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swapped", "misaligned radiographs: the frontal image fits the scan better as the lateral view (relative L2"),
        ("turned", "misaligned radiographs: the frontal image fits the scan better mirrored left to right"),
        ("stranger", "misaligned radiographs: they differ from the scan's own projection by 0."),
        ("twice", "more than one frontal radiograph: keep one file per view"),
    ],
)
def test_wrong_radiographs_are_refused(with_radiographs, name, reason):
    """Swapped views, a mirrored image, a shifted one, two for one view."""
    assert reason in reasons(with_radiographs[1])[f"{name}/{name}.nii"]


def test_radiographs_of_the_scan_s_own_middle_are_accepted(tmp_path):
    """Images rendered around the scan's centre instead of the patient's: the cube follows them."""
    workspace = workspace_in(tmp_path)
    folder = workspace.data / "elsewhere"
    hu = write_scan(folder / "elsewhere.nii", 7)
    shifted = np.full_like(hu, -1000)
    shifted[:, :, 5:] = hu[:, :, :-5]
    image = sitk.GetImageFromArray(shifted)
    image.SetSpacing([8.0] * 3)
    sitk.WriteImage(image, str(folder / "elsewhere.nii"))
    # Pose of the cube before the shift and after it differ by 5 voxels of 8 mm; 1.1 is the detector's margin.
    cube = pool(np.repeat(np.repeat(np.repeat(shifted, 2, 0), 2, 1), 2, 2).astype(np.float32), 3, 3)
    write_png(folder / "elsewhere_frontal.png", Renderer(ct_config())(clip_hu(cube, (-1000, 1500)))[0])
    report = prepare(ct_config(), workspace)
    assert "centred on the scan, as its radiographs are" in notes_of(report, "elsewhere")
