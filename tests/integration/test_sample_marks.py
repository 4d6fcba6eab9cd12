"""A marked patient from scan through training, DRR and `sample` to a NIfTI file: the mark stands where it stood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from app.__main__ import parser
from app.data.anatomy import body_centre
from app.data.ct import read_ct
from app.data.phantom import phantom_hu
from app.sample import sample
from app.sample_plan import sample_plan
from app.workspace import RunDir
from tests.runs import RUN, train
from tests.scans import FIELD_OF_VIEW_MM, ct_config, own_xrays

EDGE = 48
VOXEL_MM = FIELD_OF_VIEW_MM / 32
MARK = (slice(28, 34), slice(16, 22), slice(31, 37))
"""z, y, x in LPS: above the middle, in front of it, to the left, by three different distances; in the left lung."""
MARK_HU = 1400


def write(path: Path, index: int, marked: bool, mirrored: bool) -> None:
    """A phantom as a scan; mirrored: stored from left to right, by an affine of the other handedness."""
    hu = phantom_hu(11, index, EDGE, FIELD_OF_VIEW_MM)
    if marked:
        hu[MARK] = MARK_HU
    spacing = FIELD_OF_VIEW_MM / EDGE
    image = sitk.GetImageFromArray(hu[:, :, ::-1].copy() if mirrored else hu)
    image.SetSpacing([spacing] * 3)
    if mirrored:
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
        image.SetOrigin((spacing * (EDGE - 1), 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def centre_mm(image: sitk.Image, weights: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y, z) in LPS of weights (z, y, x), by SimpleITK's own geometry."""
    z, y, x = (float((np.arange(n) * weights.sum(axis=others)).sum() / weights.sum()) for n, others in zip(
        weights.shape, ((1, 2), (0, 2), (0, 1)), strict=True))  # fmt: skip
    return np.array(image.TransformContinuousIndexToPhysicalPoint((x, y, z)))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mark_stands_where_it_stood(tmp_path: Path, mirrored: bool) -> None:
    """Within two voxels, whichever handedness the scan's affine has; with and without it, all else is the same."""
    for index in range(2):
        write(tmp_path / "data" / f"scan{index}.nii.gz", index, marked=True, mirrored=mirrored)
    code, output = train(tmp_path, "--set", "data.source=ct")
    assert code == 0, output
    volumes = {}
    for name in ("marked", "plain"):
        scan = tmp_path / f"{name}.nii.gz"
        write(scan, 0, marked=name == "marked", mirrored=mirrored)
        for view, p in zip(("frontal", "lateral"), own_xrays(scan, ct_config()), strict=True):
            np.save(tmp_path / f"{name}_{view}.npy", p[::-1])
        words = ["sample", "--config", "tests/tiny.yaml", "--calibrated", "--whole-detector", "--device", "cpu"]
        for view in ("frontal", "lateral"):
            words += [f"--{view}", str(tmp_path / f"{name}_{view}.npy")]
        made = tmp_path / f"{name}_made.nii.gz"
        sample(sample_plan(parser().parse_args([*words, "--out", str(made)])), RunDir(tmp_path / RUN), lambda: False)
        volumes[name] = sitk.ReadImage(str(made))
    image = volumes["marked"]
    difference = sitk.GetArrayFromImage(image).astype(float) - sitk.GetArrayFromImage(volumes["plain"])
    found = centre_mm(image, np.where(difference > difference.max() / 2, difference, 0.0))

    scan = sitk.ReadImage(str(tmp_path / "marked.nii.gz"))
    truth = centre_mm(scan, (sitk.GetArrayFromImage(scan) == MARK_HU).astype(float))
    # The volume's origin is the isocentre, the middle of the patient, counted from the outer corner of the scan.
    truth += FIELD_OF_VIEW_MM / EDGE / 2 - np.array(body_centre(read_ct(tmp_path / "marked.nii.gz", max_gib=1)))[::-1]
    assert np.abs(truth).min() > VOXEL_MM, "a mark in the middle of an axis tells nothing"
    print(f"found {found}, expected {truth}")
    assert np.linalg.norm(found - truth) <= 2 * VOXEL_MM, (found, truth)
