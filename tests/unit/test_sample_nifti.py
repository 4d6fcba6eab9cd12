"""The written volume lies the right way round, by the bytes of its header and by SimpleITK."""

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from app.data.ct import read_ct
from app.data.nifti import write_nifti

EDGE, FOV = 20, 200.0
MARKS = {"left": (1000, (10, 10, 19)), "front": (1100, (10, 0, 10)), "superior": (1200, (19, 10, 10))}
"""HU and index (z, y, x) of one dense voxel each; the arrays run to superior, posterior and left."""
EXPECTED_RAS_MM = {"left": (-95, -5, 5), "front": (-5, 95, 5), "superior": (-5, -5, 95)}
"""Centres of those voxels by hand: x to the right, y to the front, z up, 10 mm apart, the cube's centre at 0."""


def phantom() -> np.ndarray:
    """Air with a marked voxel each at the left, at the front and on top."""
    hu = np.full((EDGE,) * 3, -1000, np.int16)
    for value, index in MARKS.values():
        hu[index] = value
    return hu


def parsed(raw: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels (i, j, k) and the two affines of a NIfTI-1 file, from the standard's own layout."""
    assert struct.unpack_from("<i", raw, 0)[0] == 348
    assert raw[344:348] == b"n+1\0"
    rank, *size = struct.unpack_from("<4h", raw, 40)
    datatype, bits = struct.unpack_from("<hh", raw, 70)
    assert (rank, datatype, bits) == (3, 4, 16)
    assert raw[123] & 7 == 2  # millimetres
    slope, intercept = struct.unpack_from("<2f", raw, 112)
    assert (slope, intercept) in ((1, 0), (0, 0))
    qform_code, sform_code = struct.unpack_from("<hh", raw, 252)
    assert qform_code > 0
    assert sform_code > 0
    b, c, d, *offset = struct.unpack_from("<6f", raw, 256)
    a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    qfac, *spacing = struct.unpack_from("<4f", raw, 76)
    qform = np.column_stack([rotation * np.array([spacing[0], spacing[1], (qfac or 1) * spacing[2]]), offset])
    sform = np.array(struct.unpack_from("<12f", raw, 280)).reshape(3, 4)
    start = int(struct.unpack_from("<f", raw, 108)[0])
    voxels = np.frombuffer(raw, "<i2", int(np.prod(size)), start).reshape(size, order="F")
    return voxels, sform, qform


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii"])
def test_marks_stand_at_their_coordinates_by_the_bytes_of_the_header(tmp_path, name):
    """Left is at negative x, front at positive y, superior at positive z in RAS, by sform and by qform."""
    write_nifti(tmp_path / name, phantom(), FOV)
    raw = (tmp_path / name).read_bytes()
    voxels, sform, qform = parsed(gzip.decompress(raw) if name.endswith(".gz") else raw)
    np.testing.assert_allclose(qform, sform, atol=1e-4)
    for mark, (value, _) in MARKS.items():
        index = np.argwhere(voxels == value)
        assert len(index) == 1
        place = sform @ [*index[0], 1]
        np.testing.assert_allclose(place, EXPECTED_RAS_MM[mark], atol=1e-3, err_msg=mark)


def test_marks_stand_at_their_coordinates_by_simpleitk(tmp_path):
    """In LPS: the first two coordinates have the other sign."""
    write_nifti(tmp_path / "ct.nii.gz", phantom(), FOV)
    image = sitk.ReadImage(str(tmp_path / "ct.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    for mark, (value, _) in MARKS.items():
        z, y, x = (int(i) for i in np.argwhere(array == value)[0])
        place = np.array(image.TransformIndexToPhysicalPoint((x, y, z)))
        np.testing.assert_allclose(place * [-1, -1, 1], EXPECTED_RAS_MM[mark], atol=1e-3)


def test_the_project_reads_back_what_it_wrote(tmp_path):
    """The same array in the same axes, and its spacing."""
    write_nifti(tmp_path / "ct.nii.gz", phantom(), FOV)
    ct = read_ct(tmp_path / "ct.nii.gz", max_gib=1)
    np.testing.assert_array_equal(ct.hu, phantom())
    assert ct.spacing_mm == pytest.approx((10, 10, 10))
    assert ct.notes == ()


def test_a_volume_is_written_whole_or_not_at_all(tmp_path):
    """The folder is gone: an error, and no file; else exactly the one file."""
    with pytest.raises(OSError, match="No such file"):
        write_nifti(tmp_path / "missing" / "ct.nii.gz", phantom(), FOV)
    write_nifti(tmp_path / "ct.nii.gz", phantom(), FOV)
    assert [path.name for path in tmp_path.iterdir()] == ["ct.nii.gz"]
