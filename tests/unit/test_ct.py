"""CT files: an asymmetric volume stays itself through every format, and what is no CT is refused with a reason."""

import gzip
import json
import struct
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from app.data.ct import CTVolume, read_ct, volume_suffix
from app.data.limits import inside
from app.errors import DataError

SPACING = (3.0, 2.0, 1.5)
FORMATS = (".nii.gz", ".nii", ".nrrd", ".mha")
Array = np.ndarray[Any, Any]


def asymmetric() -> Array:
    """Random HU (Z, Y, X), different along every axis and direction."""
    return np.random.default_rng(0).integers(-1000, 1500, (20, 18, 24)).astype(np.int16)


def write(path: Path, array: Array, direction: Any = None, spacing: Any = SPACING[::-1]) -> Path:
    """Save an array (k, j, i) with the directions of its index axes i, j, k as columns and its spacing (i, j, k)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin((-31.0, 57.0, 11.0))
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    sitk.WriteImage(image, str(path))
    return path


def read(path: Path, max_gib: float = 1) -> CTVolume:
    """Read with a limit that no small file meets."""
    return read_ct(path, max_gib=max_gib)


def refusal(path: Path, max_gib: float = 1) -> str:
    """The message with which a file is refused; it names the file."""
    with pytest.raises(DataError) as caught:
        read(path, max_gib)
    message = str(caught.value)
    assert str(path.parent) in message
    return message.replace(f"{path.parent}/", "")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_volume_stays_itself_in_all_48_orientations(tmp_path, suffix):
    """Stored with its index axes along any patient axes, either way, the volume read is the same patient."""
    patient = asymmetric()
    xyz, spacing = patient.transpose(2, 1, 0), np.array(SPACING[::-1])
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        stored = xyz.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
        direction = np.zeros((3, 3))
        for index, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
            direction[axis, index] = sign
        path = write(tmp_path / f"a{suffix}", stored.transpose(2, 1, 0), direction, spacing[list(axes)])
        volume = read(path)
        np.testing.assert_array_equal(volume.hu, patient)
        assert volume.spacing_mm == pytest.approx(SPACING)
        assert volume.hu.dtype == np.float32
        assert volume.notes == ()


def nifti(
    path: Path,
    array: Array,
    sform: Any = None,
    *,
    order: str = "<",
    qform: bool = False,
    pixdim: Any = SPACING[::-1],
    magic: bytes = b"n+1\0",
    extra: bytes = b"",
) -> Path:
    """Write a NIfTI-1 file byte by byte, (k, j, i) int16 with a 3x3 sform in the RAS frame."""
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, 3, *array.shape[::-1], 1, 1, 1, 1)
    struct.pack_into(f"{order}hh", header, 70, 4, 16)
    struct.pack_into(f"{order}8f", header, 76, 1, *pixdim, 1, 1, 1, 1)
    struct.pack_into(f"{order}ff", header, 108, 352, 1)
    header[123] = 2
    struct.pack_into(f"{order}hh", header, 252, int(qform), int(sform is not None))
    if sform is not None:
        struct.pack_into(f"{order}12f", header, 280, *np.c_[np.asarray(sform, float), np.zeros(3)].ravel())
    header[344:348] = magic
    path.write_bytes(bytes(header) + array.astype(f"{order}i2").tobytes() + extra)
    return path


RAS = np.diag(SPACING[::-1])


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_nifti_in_the_ras_frame_is_turned_by_definition(tmp_path, order):
    """NIfTI's +x is the patient's right and +y anterior, ours left and posterior: both axes turn round."""
    array = asymmetric()
    volume = read(nifti(tmp_path / "a.nii", array, RAS, order=order))
    np.testing.assert_array_equal(volume.hu, array[:, ::-1, ::-1])
    assert volume.spacing_mm == pytest.approx(SPACING)


@pytest.mark.parametrize(
    ("space", "flips"),
    [
        ("left-posterior-superior", (1, 1, 1)),
        ("right-anterior-superior", (1, -1, -1)),
        ("left-anterior-superior", (1, -1, 1)),
    ],
)
def test_the_frames_of_nrrd_are_turned_by_definition(tmp_path, space, flips):
    """NRRD names the frame of its directions."""
    array = asymmetric()
    head = (
        f"NRRD0004\ntype: short\ndimension: 3\nspace: {space}\nsizes: 24 18 20\n"
        "space directions: (1.5,0,0) (0,2,0) (0,0,3)\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(head.encode() + array.astype("<i2").tobytes())
    np.testing.assert_array_equal(read(tmp_path / "a.nrrd").hu, array[tuple(slice(None, None, f) for f in flips)])


def test_an_oblique_volume_is_resampled_onto_the_patient(tmp_path):
    """A smooth blob sampled on axes turned by 7 degrees is that blob on straight axes, around the same centre."""

    def blob(x: Array, y: Array, z: Array) -> Array:
        return -1000 + 1600 * np.exp(-((x - 6) ** 2 / 400 + (y + 4) ** 2 / 300 + (z - 3) ** 2 / 200))

    sine, cosine = np.sin(np.radians(7)), np.cos(np.radians(7))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    k, j, i = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (40, 48, 56)), indexing="ij")
    points = np.einsum("ab,bkji->akji", turn, np.stack([i * 1.0, j * 1.2, k * 1.5]))
    hu = blob(*points).astype(np.float32)
    volume = read(write(tmp_path / "a.mha", hu, turn, (1.0, 1.2, 1.5)))
    assert volume.notes == ("oblique by 7.0 degrees: resampled onto the patient's axes",)
    grids = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(volume.hu.shape, volume.spacing_mm, strict=True))
    z, y, x = np.meshgrid(*grids, indexing="ij")
    middle = (abs(x) < 20) & (abs(y) < 20)
    assert np.abs(volume.hu - blob(x, y, z))[middle].max() < 6
    assert volume.spacing_mm == pytest.approx((1.5, 1.2, 1.0))


def test_values_outside_the_scanner_become_air(tmp_path):
    """Padding of -2048 or -3024 is set to -1000 and said, in straight and in oblique volumes."""
    hu = asymmetric()
    hu[:, :, 0] = -2048
    hu[0] = -3024
    volume = read(write(tmp_path / "a.nii.gz", hu))
    np.testing.assert_array_equal(volume.hu, np.where(hu < -1024, -1000, hu))
    assert volume.notes == ("9 % of the voxels below -1024 HU set to air",)
    turn = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]
    assert read(write(tmp_path / "b.mha", hu, turn)).hu.min() >= -1000


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    """Some exporters write (x, y, z, 1)."""
    array = asymmetric()
    image = sitk.GetImageFromArray(array[None], isVector=False)
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    np.testing.assert_array_equal(read(tmp_path / "a.nii").hu, array)


def test_an_array_takes_its_spacing_from_the_sidecar(tmp_path):
    """An array lies in our axes already, in C or Fortran order."""
    array = asymmetric()
    np.save(tmp_path / "p1.npy", np.asfortranarray(array))
    (tmp_path / "p1.json").write_text(json.dumps({"spacing_mm": SPACING}))
    volume = read(tmp_path / "p1.npy")
    np.testing.assert_array_equal(volume.hu, array)
    assert volume.spacing_mm == SPACING


HINT = 'write {"spacing_mm": [z, y, x]} into it, for example {"spacing_mm": [2.5, 0.7, 0.7]}'


def test_an_array_without_a_spacing_is_refused(tmp_path):
    """The message says how to write the sidecar."""
    path = tmp_path / "p1.npy"
    np.save(path, asymmetric())
    assert refusal(path) == f"p1.npy: an array has no spacing; expected p1.json beside it: {HINT}"
    for text in (
        "",
        "[]",
        '{"spacing": 1}',
        '{"spacing_mm": 2}',
        '{"spacing_mm": [1, 2]}',
        '{"spacing_mm": ["a",1,2]}',
    ):
        path.with_suffix(".json").write_text(text)
        assert refusal(path) == f"p1.json: expected the spacing of p1.npy: {HINT}"


def test_arrays_that_are_no_volume_are_refused(tmp_path):
    """Pickles are never opened, and the header is checked before the data are read."""
    path = tmp_path / "a.npy"
    path.with_suffix(".json").write_text('{"spacing_mm": [1, 1, 1]}')
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert refusal(path) == "a.npy: expected integers or floats, found dtype object"
    np.save(path, np.zeros((20, 20)))
    assert refusal(path) == "a.npy: expected a 3D volume, found size 20 x 20"
    np.save(path, asymmetric())
    path.write_bytes(path.read_bytes()[:-10])
    assert refusal(path) == "a.npy: truncated: shorter than its header says"
    path.write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': [[[[   ")
    assert refusal(path) == "a.npy: not a NumPy array of format 1.0 or 2.0; save it with numpy.save"
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (4096,) * 3})
    assert refusal(path) == "a.npy: declares 256 GiB, the limit data.max_file_gib is 1 GiB"


SHEARED = (
    "the axes in the header are not orthonormal (sheared, zero or not finite, deviation {}); "
    "resample the volume onto orthogonal axes (gantry tilt: use the tilt-corrected export)"
)


@pytest.mark.parametrize("qform", [False, True])
@pytest.mark.parametrize(
    ("sform", "deviation"),
    [
        (RAS + np.array([[0, 0, 0.6], [0, 0, 0], [0, 0, 0]]), "0.2"),
        (np.zeros((3, 3)), "1"),
        (RAS * np.nan, "inf"),
    ],
)
def test_a_nifti_with_bad_axes_is_refused_even_with_a_second_geometry(tmp_path, capfd, sform, deviation, qform):
    """ITK would fall back to the qform of a sheared file without a word."""
    path = nifti(tmp_path / "a.nii", asymmetric(), sform, qform=qform)
    assert refusal(path) == f"a.nii: {SHEARED.format(deviation)}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_sheared_axes_are_refused_in_every_format(tmp_path, suffix):
    """A gantry tilt that an exporter kept as a shear."""
    path = write(tmp_path / f"a{suffix}", asymmetric(), [[1, 0, 0], [0, 1, 0.2], [0, 0, 0.98]])
    assert refusal(path) == f"a{suffix}: {SHEARED.format('0.2')}"


def test_geometry_that_itk_would_make_up_is_refused(tmp_path):
    """A file that does not give orientation or spacing may be mirrored; nothing is assumed."""
    array = asymmetric()
    none = "no orientation in the header"
    path = nifti(tmp_path / "a.nii", array)
    assert refusal(path) == f"a.nii: {none} (qform_code and sform_code are 0); export it again"
    path = nifti(tmp_path / "a.nii", array, RAS, pixdim=(1.5, 2, 0))
    assert refusal(path) == "a.nii: expected a positive spacing, found 1.5 x 2 x 0 mm"
    path = nifti(tmp_path / "a.nii", array, RAS, pixdim=(1, 1, 1))
    assert refusal(path) == "a.nii: the header has two spacings, 1 x 1 x 1 and 1.5 x 2 x 3 mm (sform)"
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 24 18 20\nencoding: raw\n\n")
    assert refusal(tmp_path / "a.nrrd").startswith(f"a.nrrd: {none} (expected `space` as one of LPS, RAS, LAS")
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 3\nElementDataFile = LOCAL\n")
    assert refusal(tmp_path / "a.mha") == (
        "a.mha: no TransformMatrix and no ElementSpacing in the header; export it again with its geometry"
    )


def test_headers_whose_data_lie_elsewhere_are_refused(tmp_path):
    """A detached header could name any file of the machine."""
    for suffix in (".nhdr", ".mhd", ".hdr", ".img"):
        (tmp_path / f"a{suffix}").write_bytes(b"x")
        assert refusal(tmp_path / f"a{suffix}") == (
            f"a{suffix}: a {suffix} file keeps its data elsewhere; save it as one .nrrd, .mha or .nii.gz file"
        )
    head = "NRRD0004\ntype: short\nspace: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n{}: /etc/passwd\n\n"
    for key in ("data file", "datafile", "Data File"):
        (tmp_path / "a.nrrd").write_text(head.format(key))
        assert refusal(tmp_path / "a.nrrd") == "a.nrrd: its data lie in another file; save it as one attached .nrrd"
    (tmp_path / "a.mha").write_text("ObjectType = Image\nElementDataFile = /etc/passwd\n")
    assert refusal(tmp_path / "a.mha") == "a.mha: expected ElementDataFile = LOCAL; save it as one attached .mha"
    path = nifti(tmp_path / "a.nii", asymmetric(), RAS, magic=b"ni1\0")
    assert refusal(path) == "a.nii: expected a single-file NIfTI (n+1), found the header of a detached pair"


def test_volumes_larger_than_the_limit_are_refused_before_they_are_decoded(tmp_path):
    """By the size on the disk, by the size in the header, and by what a gzip stream really holds."""
    array = asymmetric()
    path = write(tmp_path / "a.nii", array)
    assert refusal(path, 1e-5) == "a.nii: the file has 1.64e-05 GiB, the limit data.max_file_gib is 1e-05 GiB"
    for suffix in (".nii", ".nrrd", ".mha"):
        path = write(tmp_path / f"a{suffix}", array)
        assert refusal(path, 2e-5) == f"a{suffix}: declares 3.22e-05 GiB, the limit data.max_file_gib is 2e-05 GiB"
    bomb = tmp_path / "b.nii.gz"
    bomb.write_bytes(gzip.compress(nifti(tmp_path / "b.nii", array, RAS, extra=bytes(2**22)).read_bytes()))
    assert refusal(bomb, 1e-3) == "b.nii.gz: expands to more than 0.001 GiB, the limit data.max_file_gib"


def test_a_nifti_that_holds_more_or_less_than_it_declares_is_refused(tmp_path):
    """Both ends: a file cut off, and a gzip stream that goes on behind the volume."""
    raw = nifti(tmp_path / "a.nii", asymmetric(), RAS, extra=bytes(2**21)).read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw))
    assert refusal(path) == ("a.nii.gz: the header declares 17632 bytes, found 2114784: damaged or made to mislead")
    path.write_bytes(gzip.compress(raw[:9000]))
    assert refusal(path) == "a.nii.gz: truncated: the header declares 17632 bytes, found 9000"
    path.write_bytes(gzip.compress(raw)[:5000])
    assert refusal(path) == "a.nii.gz: not a complete gzip file (truncated or damaged); copy it again"
    path.write_bytes(gzip.compress(raw[:100]))
    assert refusal(path) == "a.nii.gz: not a NIfTI file: shorter than its header"
    path.write_bytes(gzip.compress(bytes(400)))
    assert refusal(path) == "a.nii.gz: not a NIfTI file: expected 348 or 540 in its first four bytes"
    path.write_bytes(gzip.compress(raw[:42] + struct.pack("<h", -5) + raw[44:]))
    assert refusal(path) == "a.nii.gz: damaged NIfTI header: sizes [-5, 18, 20]"


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_truncated_volume_is_refused(tmp_path, suffix):
    """Half a file cannot be decoded."""
    path = write(tmp_path / f"a{suffix}", asymmetric())
    path.write_bytes(path.read_bytes()[:9000])
    assert refusal(path) == (f"a{suffix}: cannot be decoded (damaged, truncated, sheared or in an unusual encoding)")


def test_files_of_another_format_are_refused(tmp_path):
    """The suffix decides how a file is read, so a wrong one is said."""
    (tmp_path / "a.nrrd").write_bytes(b"PK\3\4")
    assert refusal(tmp_path / "a.nrrd") == "a.nrrd: not a NRRD file: expected NRRD in its first bytes"
    assert refusal(tmp_path / "a.stl") == "a.stl: expected one of .nii.gz, .nii, .nrrd, .mha, .npy or a DICOM folder"
    assert refusal(tmp_path / "b.mha") == "b.mha: no such file"


@pytest.mark.parametrize(
    ("name", "known"),
    [("A.NII.GZ", ".nii.gz"), ("a.b.nii", ".nii"), ("a.nhdr", ".nhdr"), (".nii", None), ("a.gz", None), ("nii", None)],
)
def test_suffixes_are_told_from_names(name, known):
    """Upper case and further dots are common; a bare suffix is a hidden file."""
    assert volume_suffix(Path("d") / name) == known


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((20, 20), np.int16), "expected a 3D volume, found size 20 x 20"),
        (np.zeros((2, 20, 20, 20), np.int16), "expected a 3D volume, found size 20 x 20 x 20 x 2"),
        (np.zeros((15, 20, 20), np.int16), "expected at least 16 voxels along each axis, found 15 x 20 x 20"),
    ],
)
def test_other_shapes_are_refused(tmp_path, array, message):
    """Slices, films and thin slabs are no volume."""
    image = sitk.GetImageFromArray(array, isVector=False)
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    assert refusal(tmp_path / "a.nii") == f"a.nii: {message}"


def test_color_volumes_are_refused(tmp_path):
    """A rendering is no CT."""
    path = write(tmp_path / "a.nrrd", np.zeros((20, 20, 20, 3), np.uint8))
    assert refusal(path) == "a.nrrd: expected one number per voxel, found vector of 8-bit unsigned integer"


def test_implausible_spacings_are_refused(tmp_path):
    """A thick slab or a spacing in another unit."""
    path = write(tmp_path / "a.mha", asymmetric(), spacing=(1, 1, 25))
    assert refusal(path) == "a.mha: expected a spacing above 0 and up to 20 mm, found 25 x 1 x 1 mm"
    np.save(tmp_path / "a.npy", asymmetric())
    (tmp_path / "a.json").write_text('{"spacing_mm": [-1, 1, 1]}')
    assert refusal(tmp_path / "a.npy") == "a.npy: expected a spacing above 0 and up to 20 mm, found -1 x 1 x 1 mm"


def test_values_that_are_not_finite_are_refused(tmp_path):
    """NaN and infinity are counted, in straight and in oblique volumes."""
    hu = asymmetric().astype(np.float32)
    hu[3, 4, 5], hu[6, 7, 8] = np.nan, np.inf
    message = "2 voxels are NaN or infinite; replace them, air is -1000 HU"
    assert refusal(write(tmp_path / "a.nii", hu)) == f"a.nii: {message}"
    assert refusal(write(tmp_path / "a.mha", hu, [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])) == f"a.mha: {message}"


STORED = "(stored values without the rescale offset, usually -1024?)"


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (asymmetric() + 1024, f"24 to 2523 {STORED}"),
        (asymmetric() / 2500, "-0.4 to 0.5996"),
        (np.full((20, 20, 20), -3000.0), "-1024 to -1024"),
        (np.where(asymmetric() < 0, -2000, asymmetric()), f"0 to 1499 {STORED}"),
    ],
    ids=["stored", "scaled", "empty", "padded"],
)  # fmt: skip
def test_values_that_are_not_hu_are_refused(tmp_path, array, found):
    """Stored values, normalised volumes and empty ones; padding does not count as air."""
    path = write(tmp_path / "a.nii", array.astype(np.float32))
    message = refusal(path)
    assert message == f"a.nii: not HU: expected air near -1000 and tissue above 0, found {found}"


def test_links_that_leave_the_folder_are_named(tmp_path):
    """Links inside the data folder are fine; the message names the link, not its target."""
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (root / "a" / "x.nii").write_bytes(b"")
    (tmp_path / "secret" / "y.nii").write_bytes(b"")
    (root / "good").symlink_to(root / "a" / "x.nii")
    (root / "bad").symlink_to(tmp_path / "secret")
    inside(root / "good", root)
    inside(root / "a" / "x.nii", root)
    with pytest.raises(DataError) as caught:
        inside(root / "bad" / "y.nii", root)
    assert str(caught.value) == (
        f"{root}/bad: expected everything below {root}, found a link that leaves it; copy the data into the folder"
    )


def test_the_data_folder_itself_may_be_a_link(tmp_path):
    """Only links below it count."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x.nii").write_bytes(b"")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    inside(tmp_path / "data" / "x.nii", tmp_path / "data")


def test_errors_do_not_quote_headers(tmp_path, capfd):
    """A name in the free text of a damaged file stays there."""
    head = (
        "NRRD0004\n# Doe^Jane\ntype: Doe^Jane\ndimension: 3\nspace: LPS\nsizes: 24 18 20\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nDoe^Jane:=Doe^Jane\nencoding: Doe^Jane\n\n"
    )
    (tmp_path / "a.nrrd").write_text(head)
    assert "Doe" not in refusal(tmp_path / "a.nrrd") + "".join(capfd.readouterr())
