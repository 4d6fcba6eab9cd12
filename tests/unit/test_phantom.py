"""Phantom patients: the same everywhere, the same at every resolution, different from each other, and thorax-like."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from app.data.anatomy import lung_fraction
from app.data.phantom import phantom_hu
from app.data.phantom_canvas import Canvas, Pose
from app.data.pooling import pool

FOV_MM = 384.0


@pytest.fixture(scope="module")
def patients() -> np.ndarray:
    """Twelve patients (12, 64, 64, 64)."""
    return np.stack([phantom_hu(0, index, 64, FOV_MM) for index in range(12)])


@pytest.fixture(scope="module")
def fine() -> np.ndarray:
    """A patient at the resolution of the last stage, (256, 256, 256)."""
    return phantom_hu(0, 3, 256, FOV_MM)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_phantom_is_the_same_in_every_process(patients, threads):
    """Another process, with another number of threads, paints the same bits."""
    code = (
        "import hashlib; from app.data.phantom import phantom_hu; "
        "print(hashlib.sha256(phantom_hu(0, 3, 64, 384.0).tobytes()).hexdigest())"
    )
    environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == hashlib.sha256(patients[3].tobytes()).hexdigest()


@pytest.mark.parametrize("edge", [16, 32])
def test_coarse_phantoms_are_averages_of_finer_ones(patients, edge):
    """The pooled 64 cube is the coarser cube, up to the rounding to whole HU."""
    pooled = pool(patients[5].astype(np.float32), 64 // edge, 3)
    assert np.abs(pooled - phantom_hu(0, 5, edge, FOV_MM)).max() <= 1.0


def test_a_finer_scene_is_the_same_scene(fine):
    """At twice the resolution, painted directly, the average differs by a few HU and nowhere in the mean."""
    difference = pool(fine.astype(np.float32), 2, 3) - phantom_hu(0, 3, 128, FOV_MM)
    assert np.abs(difference).mean() < 4
    assert abs(difference.mean()) < 0.6


def test_the_field_of_view_only_crops_the_scene(fine):
    """Half the field of view shows the middle of the same patient."""
    whole = fine[64:192, 64:192, 64:192].astype(np.float32)
    middle = phantom_hu(0, 3, 128, FOV_MM / 2).astype(np.float32)
    assert np.abs(whole - middle).max() <= 1


def test_values_are_hu_from_air_to_bone(patients):
    """int16 within [-1000, 1500], with air around the patient and bone in it."""
    assert patients.dtype == np.int16
    assert patients.min() == -1000
    assert patients.max() <= 1500
    assert all(patient.max() > 250 for patient in patients)
    assert (patients[:, :, 0, :] == -1000).mean() > 0.9


def test_every_phantom_has_lungs(patients):
    """The test that real scans must pass finds a thorax in each."""
    fractions = [lung_fraction(patient.astype(np.float32), FOV_MM) for patient in patients[:6]]
    assert min(fractions) > 0.06
    assert max(fractions) < 0.4


def test_the_heart_is_on_the_left_and_the_liver_on_the_right(patients):
    """In the mean patient, the lower chest is denser left of the midline and the upper belly right of it."""
    mean = patients.astype(np.float32).mean(0)
    heart, mirror = mean[24:30, 14:32, 34:46], mean[24:30, 14:32, 18:30]
    assert heart.mean() > mirror.mean() + 80
    belly = mean[8:13, 20:40]
    assert belly[..., 14:26].mean() > belly[..., 38:50].mean() + 10


def test_the_spine_is_posterior(patients):
    """The densest column of the mean patient lies behind the middle, near the midline."""
    columns = patients.astype(np.float32).mean(0)[16:48].mean(0)
    y, x = np.unravel_index(columns.argmax(), columns.shape)
    assert y > 34
    assert 27 <= x <= 36


def test_the_mean_phantom_is_a_poor_answer(patients):
    """The mean of the others predicts a patient to less than 22 dB (range 2500 HU), and no two are alike."""
    cubes = patients.astype(np.float64)
    decibels = []
    for index in range(len(cubes)):
        others = np.delete(cubes, index, axis=0).mean(0)
        decibels.append(20 * np.log10(2500 / np.sqrt(np.square(cubes[index] - others).mean())))
    assert np.mean(decibels) < 22
    distances = [np.abs(a - b).mean() for i, a in enumerate(cubes) for b in cubes[:i]]
    assert min(distances) > 25


def test_seed_and_index_both_matter():
    """Neither another seed nor another index gives the same patient."""
    cubes = [phantom_hu(seed, index, 16, FOV_MM) for seed, index in ((0, 0), (0, 1), (1, 0))]
    assert all((a != b).mean() > 0.1 for i, a in enumerate(cubes) for b in cubes[:i])


def test_a_painted_sphere_has_the_volume_of_a_sphere():
    """4/3 pi r^3, at radii below and above the voxel's size."""
    for radius in (2.0, 8.0, 30.0):
        canvas = Canvas(64, 256.0, Pose(shift_mm=(3.1, -7.3, 5.7), turn=0.1))
        canvas.ellipsoid((1.0, 2.0, 3.0), (radius,) * 3, 0.0)
        volume = (canvas.hu + 1000).sum() / 1000 * canvas.voxel_mm**3
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.1)


def test_a_tube_has_the_volume_of_a_tube_and_lies_where_it_should():
    """pi r^2 l and two half spheres; its centre of mass is its middle in the cube's frame."""
    pose = Pose(shift_mm=(10.0, 0.0, -20.0), turn=0.2)
    canvas = Canvas(96, 288.0, pose)
    canvas.capsule((-40.0, 5.0, -20.0), (40.0, 25.0, 30.0), 9.0, 9.0, 0.0)
    share = (canvas.hu + 1000) / 1000
    length = np.sqrt(80**2 + 20**2 + 50**2)
    assert share.sum() * canvas.voxel_mm**3 == pytest.approx(np.pi * 81 * length + 4 / 3 * np.pi * 729, rel=0.03)
    axis = (np.arange(96) + 0.5 - 48) * 3.0
    centre = [float((share.sum(axis=tuple({0, 1, 2} - {k})) * axis).sum() / share.sum()) for k in (2, 1, 0)]
    assert centre == pytest.approx(pose.to_cube((0.0, 15.0, 5.0)), abs=0.3)
