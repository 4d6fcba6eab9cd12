"""The cube around the patient: exact averages, the body's centre, and what is no thorax."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.config import DataConfig
from app.data.anatomy import body_centre, box_weights, lung_fraction, resample_cube
from app.data.ct import CTVolume, read_ct
from app.errors import DataError

CT_DIR = Path(os.environ.get("CT_DIR", Path(__file__).parents[2] / ".." / "shared" / "ct"))
Array = np.ndarray[Any, Any]


def centres(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[Array]:
    """Coordinates (z, y, x) of the voxel centres in mm from the outer corner."""
    grids = ((np.arange(n) + 0.5) * s for n, s in zip(shape, spacing_mm, strict=True))
    return np.meshgrid(*grids, indexing="ij")


def volume(hu: Array, spacing_mm: tuple[float, float, float]) -> CTVolume:
    """A scan of these values."""
    return CTVolume(hu.astype(np.float32), spacing_mm)


@pytest.mark.parametrize("voxel_mm", [0.4, 1.0, 2.5, 3.3, 7.0])
def test_a_linear_ramp_keeps_its_values_at_any_resolution(voxel_mm):
    """The average of a ramp over a box is its value at the box's centre, up and down."""
    shape, spacing = (40, 50, 60), (2.5, 1.5, 1.0)
    z, y, x = centres(shape, spacing)
    edge = int(40 / voxel_mm)
    cube, coverage = resample_cube(volume(3 * z - 5 * y + 7 * x, spacing), edge, edge * voxel_mm, (50.0, 37.0, 30.0))
    assert coverage == 1
    k = (np.arange(edge) + 0.5 - edge / 2) * voxel_mm
    wanted = 3 * (50 + k)[:, None, None] - 5 * (37 + k)[:, None] + 7 * (30 + k)
    np.testing.assert_allclose(cube, wanted, atol=0.01)


def test_downsampling_keeps_the_total_and_does_not_alias():
    """Attenuation is conserved, and a checkerboard finer than the voxels turns into its mean instead of a pattern."""
    z, y, x = np.indices((64, 64, 64))
    board = np.where((z + y + x) % 2, 1000.0, -1000.0)
    cube, _ = resample_cube(volume(board, (1.0, 1.0, 1.0)), 12, 60.0, (32.0, 32.0, 32.0))
    assert np.abs(cube).max() < 5
    noise = np.random.default_rng(0).uniform(-1000, 2000, (30, 40, 50))
    ct = volume(noise, (2.0, 1.5, 1.1))
    cube, coverage = resample_cube(ct, 16, 80.0, (30.0, 30.0, 27.5))
    total = (noise + 1000).sum() * 2.0 * 1.5 * 1.1
    # A sample at the border weighs half a cell more than one inside, hence not to the last digit.
    assert (cube + 1000).sum() * 5.0**3 == pytest.approx(total, rel=5e-3)
    assert coverage == pytest.approx(60 * 60 * 55 / 80**3)


def test_what_the_scan_does_not_cover_is_air_and_counted():
    """Coverage is the volume that cube and scan share over the volume of the cube."""
    ct = volume(np.full((20, 20, 20), 40.0), (1.0, 1.0, 1.0))
    cube, coverage = resample_cube(ct, 10, 10.0, (0.0, 10.0, 17.5))
    assert coverage == pytest.approx(0.5 * 1.0 * 0.75)
    np.testing.assert_allclose(cube[:5], -1000)
    np.testing.assert_allclose(cube[5:, :, :7], 40, atol=1e-3)
    np.testing.assert_allclose(cube[5:, :, 7], -480, atol=1e-3)
    np.testing.assert_allclose(cube[:, :, 8:], -1000)
    far, coverage = resample_cube(ct, 10, 10.0, (100.0, 10.0, 10.0))
    assert (far == -1000).all()
    assert coverage == 0


def test_a_bright_spot_stays_at_its_place():
    """The centre of mass of a small blob is where it was, for cubes of odd and even edges and any centre."""
    z, y, x = centres((40, 40, 40), (1.0, 1.0, 1.0))
    spot = volume(-1000 + 2000 * np.exp(-((z - 12) ** 2 + (y - 22) ** 2 + (x - 29.5) ** 2) / 8), (1.0, 1.0, 1.0))
    for edge, centre in ((31, (20.0, 20.0, 20.0)), (20, (18.3, 21.7, 22.2)), (48, (19.0, 20.1, 22.0))):
        cube, _ = resample_cube(spot, edge, 36.0, centre)
        mass = cube + 1000.0
        at = [(mass * grid).sum() / mass.sum() for grid in centres(cube.shape, (36.0 / edge,) * 3)]
        wanted = [place - middle + 18 for place, middle in zip((12, 22, 29.5), centre, strict=True)]
        assert at == pytest.approx(wanted, abs=0.02)


def test_weights_are_the_integral_of_the_linear_interpolant():
    """Against a fine numerical integration of numpy's interpolation, which holds the ends constant."""
    samples = np.random.default_rng(0).normal(size=12)
    weights = box_weights(12, 2.0, 9, 3.1, -1.7)
    fine = (np.arange(200_000) + 0.5) / 200_000
    for k, row in enumerate(weights):
        x = -1.7 + (k + fine) * 3.1
        inside = (x > 0) & (x < 24)
        values = np.where(inside, np.interp(x / 2.0 - 0.5, np.arange(12), samples), 0)
        assert row @ samples == pytest.approx(values.mean(), abs=1e-4)


SPACING = (4.0, 2.0, 2.0)
SHAPE = (40, 150, 200)


def patient(lungs: bool) -> Array:
    """A body, 120 mm and 85 mm half axes around (y, x) = (130, 210), with or without two lungs; a table behind."""
    _, y, x = centres(SHAPE, SPACING)
    hu = np.full(SHAPE, -1000.0)
    hu[((x - 210) / 120) ** 2 + ((y - 130) / 85) ** 2 < 1] = 30
    if lungs:
        for side in (-1, 1):
            hu[((x - 210 - side * 55) / 35) ** 2 + ((y - 130) / 50) ** 2 < 1] = -850
    hu[(abs(y - 224) < 2) & (abs(x - 200) < 190)] = 100
    return hu


def test_the_centre_is_the_bodys_and_not_the_tables():
    """Bounding box of the body in the plane, middle of the scan along z; a table and a loose cable do not count."""
    hu = patient(lungs=True)
    hu[:, 3:5, 5:7] = 2000
    assert body_centre(volume(hu, SPACING)) == pytest.approx((80.0, 130.0, 210.0), abs=4.1)


def test_a_scan_without_a_body_is_refused():
    """Air and a thin table are no patient."""
    hu = np.full(SHAPE, -1000.0)
    hu[:, 100] = 100
    with pytest.raises(DataError, match=r"no body in the scan: nothing larger than 8 mm above -300 HU"):
        body_centre(volume(hu, SPACING))


def test_the_lung_fraction_is_the_ratio_of_the_volumes():
    """Two elliptic lungs in an elliptic body, by their areas; none without lungs; air outside does not count."""
    for lungs, wanted in ((True, 2 * 35 * 50 / (120 * 85)), (False, 0.0)):
        cube, _ = resample_cube(volume(patient(lungs), SPACING), 128, 384.0, (80.0, 130.0, 210.0))
        assert lung_fraction(cube, 384.0) == pytest.approx(wanted, abs=0.03)


def test_a_cube_of_air_has_no_lung():
    """No body, no lung, no division by zero."""
    assert lung_fraction(np.full((32, 32, 32), -1000, np.float32), 384.0) == 0


@pytest.mark.parametrize(
    ("name", "covered", "thorax"),
    [
        ("thorax_lidc_idri_0001.nii.gz", True, True),
        ("thorax_totalsegmentator_aorta.nii.gz", True, True),
        ("thorax_pyradiomics_lung1.nrrd", True, True),
        ("thorax_pyradiomics_lung2.nrrd", True, True),
        ("lung_elastix.mha", False, False),
        ("abdomen_totalsegmentator_example.nii.gz", True, False),
    ],
)
def test_real_scans_are_told_apart_by_the_default_limits(name, covered, thorax):
    """Four thoraxes pass, a crop of one lung covers too little, an abdomen has no lungs.

    The heart lies on the left, so the right lung, at small x, is the larger one.
    """
    limits = DataConfig()
    ct = read_ct(CT_DIR / name, max_gib=limits.max_file_gib)
    cube, coverage = resample_cube(ct, 64, limits.field_of_view_mm, body_centre(ct))
    lungs = lung_fraction(cube, limits.field_of_view_mm)
    assert (coverage >= limits.min_coverage) is covered
    assert (lungs >= limits.min_lung_fraction) is thorax
    if thorax:
        inner = cube[16:48, 20:44]
        air = (inner < -500) & (inner > -950)
        assert air[:, :, 14:32].sum() > 1.1 * air[:, :, 32:50].sum()
