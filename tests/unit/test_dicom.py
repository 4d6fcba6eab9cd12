"""DICOM folders: which slices become a volume, which are refused and why."""

import struct
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from app.data.ct import read_ct, read_series
from app.data.dicom import DicomFindings, discover
from app.data.dicom_header import read_header
from app.data.dicom_layout import file_meta, is_intact
from app.errors import DataError
from tests.dicom_files import (
    EXPLICIT,
    IMPLICIT,
    PATIENT_ID,
    PATIENT_NAME,
    element,
    joined,
    stored_values,
    write_series,
    write_slice,
)

SHAPE = (20, 18, 24)


def found_in(folder: Path) -> DicomFindings:
    """What `folder` holds, links kept inside it."""
    return discover(folder, root=folder, max_gib=1)


def reasons(folder: Path) -> list[str]:
    """Why nothing in `folder` can be used."""
    found = found_in(folder)
    assert found.series == ()
    return [refusal.reason for refusal in found.refused]


def test_a_series_becomes_its_volume_in_hu(tmp_path):
    """Stored values times slope plus intercept stand at their place, with the spacing of the headers."""
    stored = stored_values(0, SHAPE)
    write_series(tmp_path, stored, pixel_spacing=(0.7, 0.9))
    volume = read_ct(tmp_path, max_gib=1)
    np.testing.assert_array_equal(volume.hu, stored - 1024)
    assert volume.spacing_mm == pytest.approx((2.0, 0.7, 0.9))
    assert volume.notes == ()


def test_implicit_transfer_syntax_is_read(tmp_path):
    """The oldest encoding, without value representations, gives the same volume."""
    stored = stored_values(0, SHAPE)
    write_series(tmp_path, stored, syntax=IMPLICIT)
    np.testing.assert_array_equal(read_ct(tmp_path, max_gib=1).hu, stored - 1024)


@pytest.mark.parametrize("codec", ["JPEG2000", "JPEG"])
def test_lossless_compression_is_read(tmp_path, codec):
    """Slices that GDCM compressed losslessly come back exactly."""
    hu = stored_values(0, SHAPE) - 1024
    for k, pixels in enumerate(hu):
        image = sitk.GetImageFromArray(pixels[None].astype(np.int16))
        image.SetSpacing((0.8, 0.8, 2))
        tags = {"0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4", "0020|0032": f"0\\0\\{2 * k}"}
        for tag, value in (tags | {"0020|0037": "1\\0\\0\\0\\1\\0", "0008|0018": f"1.2.3.4.{k}"}).items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(codec)
        writer.SetFileName(str(tmp_path / f"{k}.dcm"))
        writer.Execute(image)
    np.testing.assert_array_equal(read_ct(tmp_path, max_gib=1).hu, hu)


def test_each_slice_has_its_own_rescale(tmp_path):
    """Slope and intercept may change from slice to slice and need not be whole numbers."""
    stored = stored_values(1, SHAPE)
    wanted = np.empty(SHAPE)
    for k, pixels in enumerate(stored):
        slope, intercept = 0.5 + k / 8, -1000.25 + k
        rescale = {(0x28, 0x1052): ("DS", str(intercept)), (0x28, 0x1053): ("DS", str(slope))}
        write_slice(tmp_path / str(k), pixels, position=(0, 0, 3 * k), instance=f"1.{k + 1}", changes=rescale)
        wanted[k] = pixels * slope + intercept
    np.testing.assert_allclose(read_ct(tmp_path, max_gib=1).hu, wanted, atol=1e-3)


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_any_slicing_of_the_patient_gives_the_same_volume(tmp_path, axes, signs):
    """Rows, columns and stacking order along any patient axis, either way: the patient is the same."""
    patient = stored_values(2, (20, 18, 24)).transpose(2, 1, 0)  # x, y, z
    spacing = np.array([1.5, 1.0, 2.5])
    flips = tuple(slice(None, None, sign) for sign in signs)
    cut = patient.transpose(axes)[flips]  # along a row, along a column, from slice to slice
    steps = np.zeros((3, 3))
    for k in range(3):
        steps[k, axes[k]] = signs[k]
    write_series(
        tmp_path,
        cut.transpose(2, 1, 0),
        positions=[steps[2] * spacing[axes[2]] * k for k in range(cut.shape[2])],
        orientation=[*steps[0], *steps[1]],
        pixel_spacing=(spacing[axes[1]], spacing[axes[0]]),
    )
    volume = read_ct(tmp_path, max_gib=1)
    np.testing.assert_array_equal(volume.hu, patient.transpose(2, 1, 0) - 1024)
    assert volume.spacing_mm == pytest.approx(tuple(spacing[::-1]))


def test_file_names_and_folders_do_not_matter(tmp_path):
    """Slices lie in any folder under any name, copies of a slice count once, other files are only counted."""
    stored = stored_values(3, SHAPE)
    for k, path in enumerate(write_series(tmp_path / "a", stored)):
        target = tmp_path / f"{k % 3}" / f"{(7 * k) % 20:02d}.img"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    write_slice(tmp_path / "copy", stored[4], position=(-10, -20, 8), instance="1.2.3.4.5")
    (tmp_path / "README.txt").write_text("no image")
    directory = element((2, 2), "UI", "1.2.840.10008.1.3.10") + element((2, 0x10), "UI", EXPLICIT)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + directory)
    found = found_in(tmp_path)
    assert (found.ignored, found.refused, len(found.series)) == (2, (), 1)
    np.testing.assert_array_equal(read_series(found.series[0], max_gib=1).hu, stored - 1024)


def test_the_longest_series_of_a_study_is_chosen(tmp_path):
    """Coverage along z first, within 10 mm most slices, then the smallest UID; axial before reformats."""
    write_series(tmp_path / "short", stored_values(0, (60, 16, 16)), step_mm=1, series="1.1")
    write_series(tmp_path / "thick", stored_values(0, (21, 16, 16)), step_mm=5, series="1.2")
    write_series(tmp_path / "thin_b", stored_values(1, (50, 16, 16)), step_mm=2, series="1.4")
    write_series(tmp_path / "thin_a", stored_values(2, (50, 16, 16)), step_mm=2, series="1.3")
    positions = [(0, k, 0) for k in range(70)]
    coronal = {"orientation": (1, 0, 0, 0, 0, -1), "pixel_spacing": (9, 9), "positions": positions}
    write_series(tmp_path / "coronal", stored_values(2, (70, 16, 16)), series="1.0", **coronal)
    (series,) = found_in(tmp_path).series
    assert series.folder == tmp_path / "thin_a"
    assert series.coverage_mm == pytest.approx(100)
    assert {refusal.path.parent.name for refusal in series.refused} == {"short", "thick", "thin_b", "coronal"}
    assert {refusal.reason.split(": ")[1] for refusal in series.refused} == {
        "another series of the study is used (50 slices, 100 mm along z)"
    }


def test_each_study_of_each_patient_gives_a_series(tmp_path):
    """Studies are told apart by UID and patient; the patient's number is handed on, and not shown by repr."""
    for k, (patient, study) in enumerate([("A", "1.5"), ("A", "1.6"), ("B", "1.6")]):
        number = {(0x10, 0x20): ("LO", patient)}
        write_series(tmp_path / str(k), stored_values(k, SHAPE), study=study, series=f"1.7.{k}", changes=number)
    found = found_in(tmp_path)
    assert [(s.patient_id, s.study_uid) for s in found.series] == [("A", "1.5"), ("A", "1.6"), ("B", "1.6")]
    assert "1.6" not in repr(found)
    with pytest.raises(DataError, match=r"expected one DICOM study, found 3; give each its own folder"):
        read_ct(tmp_path, max_gib=1)


def test_a_missing_patient_number_is_none(tmp_path):
    """Without PatientID the caller falls back to the folder's name."""
    write_series(tmp_path, stored_values(0, SHAPE), changes={(0x10, 0x20): None})
    assert found_in(tmp_path).series[0].patient_id is None


def test_a_patient_number_in_any_encoding_can_be_hashed(tmp_path):
    """Bytes that are not UTF-8 are escaped, not lost."""
    write_series(tmp_path, stored_values(0, SHAPE), changes={(0x10, 0x20): ("LO", b"M\xfcller")})
    assert found_in(tmp_path).series[0].patient_id == "M\\xfcller"


MULTIFRAME = "1.2.840.10008.5.1.4.1.1.2.1"
ONE_BAD_TAG = {
    "modality": ({(0x08, 0x60): ("CS", "MR")}, "modality is not CT"),
    "secondary": ({(0x08, 0x16): ("UI", "1.2.840.10008.5.1.4.1.1.7")}, "secondary capture or other derived object"),
    "enhanced": ({(0x08, 0x16): ("UI", MULTIFRAME)}, "multi-frame (enhanced) CT is not supported"),
    "localizer": ({(0x08, 0x08): ("CS", "ORIGINAL\\PRIMARY\\LOCALIZER")}, "localizer (scout)"),
    "rescale": ({(0x28, 0x1054): ("LO", "Z_EFF")}, "values are not HU by their RescaleType"),
    "position": ({(0x20, 0x32): None}, "no position, orientation or pixel spacing in the headers"),
    "spacing": ({(0x28, 0x30): None}, "no position, orientation or pixel spacing in the headers"),
    "nonsense": ({(0x20, 0x32): ("DS", "a\\b\\c")}, "no position, orientation or pixel spacing in the headers"),
    "study": ({(0x20, 0x0D): None}, "no StudyInstanceUID or SeriesInstanceUID in the headers"),
    "skewed": ({(0x20, 0x37): ("DS", "1\\0\\0\\0.5\\0.86\\0")}, "the row and column directions are not orthonormal"),
    "short": ({(0x7FE0, 0x10): ("OW", bytes(20))}, "cannot be decoded: truncated or damaged; copy it again"),
}


@pytest.mark.parametrize("name", ONE_BAD_TAG)
def test_series_that_are_no_ct_volume_are_refused(tmp_path, name):
    """One reason for the whole series, with the number of its files."""
    changes, reason = ONE_BAD_TAG[name]
    write_series(tmp_path, stored_values(0, SHAPE), changes=changes)
    (found,) = reasons(tmp_path)
    assert found.startswith(f"20 files: {reason}")


def test_color_slices_are_refused(tmp_path):
    """Three samples per pixel are a picture of a CT."""
    color = {
        (0x28, 0x02): ("US", struct.pack("<H", 3)), (0x28, 0x04): ("CS", "RGB"), (0x28, 0x06): ("US", b"\0\0"),
        (0x28, 0x100): ("US", b"\x08\0"), (0x28, 0x101): ("US", b"\x08\0"), (0x28, 0x102): ("US", b"\x07\0"),
        (0x7FE0, 0x10): ("OW", bytes(18 * 24 * 3)), (0x28, 0x1052): None, (0x28, 0x1053): None,
    }  # fmt: skip
    write_series(tmp_path, stored_values(0, SHAPE), changes=color)
    assert reasons(tmp_path) == ["20 files: color images, not HU"]


def test_too_few_slices_are_refused(tmp_path):
    """Fifteen slices are no volume."""
    write_series(tmp_path, stored_values(0, (15, 16, 16)))
    assert reasons(tmp_path) == ["15 files: only 15 slices, expected at least 16"]


def test_missing_slices_are_refused_and_counted(tmp_path):
    """Three deleted files leave two gaps."""
    paths = write_series(tmp_path, stored_values(0, SHAPE))
    for k in (5, 11, 12):
        paths[k].unlink()
    assert reasons(tmp_path) == ["17 files: missing slices: 3 (steps of 6.00 mm among steps of 2.00 mm)"]


def test_uneven_slices_are_refused(tmp_path):
    """Steps that no missing slice explains."""
    z = [2 * k + (0.7 if k > 9 else 0) for k in range(20)]
    write_series(tmp_path, stored_values(0, SHAPE), positions=[(0, 0, v) for v in z])
    assert reasons(tmp_path) == ["20 files: uneven slice positions: steps of 2.00 to 2.70 mm"]


def test_rounded_positions_are_accepted(tmp_path):
    """Positions that an exporter rounded to 0.1 mm are an even stack of 0.625 mm."""
    write_series(tmp_path, stored_values(0, SHAPE), positions=[(0, 0, round(0.625 * k, 1)) for k in range(20)])
    assert read_ct(tmp_path, max_gib=1).spacing_mm[0] == pytest.approx(0.625, rel=0.01)


def test_two_acquisitions_in_one_series_are_refused(tmp_path):
    """Different slices at one position cannot be put in order."""
    write_series(tmp_path / "a", stored_values(0, SHAPE))
    for k in range(20):
        write_slice(
            tmp_path / "b" / str(k), stored_values(9, (18, 24)), position=(-10, -20, 2 * k), instance=f"1.9.{k}"
        )
    assert reasons(tmp_path) == [
        "40 files: 20 slices at the same position as another (several acquisitions in one series?)"
    ]


def test_gantry_tilt_is_refused(tmp_path):
    """Slices that shift sideways from one to the next are a sheared volume, whatever the tilt tag says."""
    shift = np.tan(np.radians(12.0)) * 2
    write_series(tmp_path, stored_values(0, SHAPE), positions=[(0, shift * k, 2 * k) for k in range(20)])
    (reason,) = reasons(tmp_path)
    assert reason.endswith("tilt or shifted slices: 12.0 degrees off the slice normal; use the tilt-corrected series")


def test_a_tilted_stack_without_shear_is_resampled(tmp_path):
    """Slices stacked along their own oblique normal are a plain volume in an oblique frame."""
    sine, cosine = np.sin(np.radians(5)), np.cos(np.radians(5))
    positions = [(0, -sine * 2 * k, cosine * 2 * k) for k in range(20)]
    write_series(tmp_path, stored_values(0, SHAPE), positions=positions, orientation=(1, 0, 0, 0, cosine, sine))
    assert read_ct(tmp_path, max_gib=1).notes == ("oblique by 5.0 degrees: resampled onto the patient's axes",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({(0x28, 0x30): ("DS", joined((0.9, 0.9)))}, "slices of different pixel spacing in one series"),
        ({(0x20, 0x37): ("DS", "1\\0\\0\\0\\0.99\\0.141")}, "slices of different orientation in one series"),
    ],
)
def test_mixed_slices_are_refused(tmp_path, change, reason):
    """One slice that differs spoils the grid."""
    write_series(tmp_path, stored_values(0, SHAPE))
    write_slice(
        tmp_path / "0007", stored_values(0, (18, 24)), position=(-10, -20, 14), instance="1.2.3.4.8", changes=change
    )
    assert reasons(tmp_path) == [f"20 files: {reason}"]


def test_slices_of_different_size_are_refused(tmp_path):
    """One slice with another matrix spoils the grid."""
    write_series(tmp_path, stored_values(0, SHAPE))
    write_slice(tmp_path / "0007", stored_values(0, (32, 32)), position=(-10, -20, 14), instance="1.2.3.4.8")
    assert reasons(tmp_path) == ["20 files: slices of different size in one series"]


@pytest.mark.parametrize("number", ["4.110", "4.201", "1.99", "2"])
def test_unreadable_compression_is_refused_by_name(tmp_path, number):
    """JPEG XL, HTJ2K, deflate and big endian are named by their transfer syntax."""
    syntax = f"1.2.840.10008.1.2.{number}"
    write_series(tmp_path, stored_values(0, SHAPE), syntax=syntax)
    assert reasons(tmp_path) == [
        f"20 files: compressed in a way that cannot be read (transfer syntax {syntax}); convert with `gdcmconv --raw`"
    ]


def test_every_damaged_length_is_refused_without_allocating_it(tmp_path):
    """An element that claims four gigabytes is caught by the length of the file, wherever it stands."""
    (path,) = write_series(tmp_path, stored_values(0, (1, 16, 16)))
    raw = path.read_bytes()
    meta = file_meta(path)
    assert meta is not None
    assert is_intact(path, meta)
    short = [raw.index(tag) + 6 for tag in (b"\x08\0\x60\0CS", b"\x20\0\x0d\0UI", b"\x28\0\x10\0US")]
    for at in (*short, raw.index(b"\xe0\x7f\x10\0OW") + 10):
        path.write_bytes(raw[:at] + b"\xfe\xff" + raw[at + 2 :])
        assert not is_intact(path, meta)
        assert reasons(tmp_path) == ["cannot be decoded: truncated or damaged; copy it again"]
    at = raw.index(b"\2\0\1\0OB") + 8
    path.write_bytes(raw[:at] + b"\xff" * 4 + raw[at + 4 :])
    assert reasons(tmp_path) == ["cannot be decoded: truncated or damaged; copy it again"]


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_sequences_and_padding_are_walked_through(tmp_path, syntax):
    """Items of defined and undefined length, one in the other, and zeros at the end of the file."""
    inner = element((8, 0x104), "LO", "x" * 20, implicit=syntax == IMPLICIT)
    counted = struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner
    end_item, end = (struct.pack("<HHI", 0xFFFE, tag, 0) for tag in (0xE00D, 0xE0DD))
    head = struct.pack("<HH", 8, 0x2112) + (b"" if syntax == IMPLICIT else b"SQ\0\0") + b"\xff" * 4
    nested = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + head + counted + end + end_item
    stored = stored_values(0, SHAPE)
    for path in write_series(tmp_path, stored, syntax=syntax, changes={(0x08, 0x2111): ("SQ", counted)}):
        raw = path.read_bytes()
        at = raw.index(b"\x08\0\x11\x21")
        path.write_bytes(raw[:at] + head + nested + counted + end + raw[at:] + bytes(64))
    np.testing.assert_array_equal(read_ct(tmp_path, max_gib=1).hu, stored - 1024)
    raw = path.read_bytes()
    for find, put in ((end + end_item, end_item + end), (counted[:8], struct.pack("<HHI", 0xFFFE, 0xE000, 10**6))):
        path.write_bytes(raw.replace(find, put))
        assert read_header(path, file_meta(path)) is None


def test_sequences_nested_without_end_are_refused(tmp_path):
    """The depth is limited, so that a made-up file cannot exhaust the stack."""
    (path,) = write_series(tmp_path, stored_values(0, (1, 16, 16)), syntax=IMPLICIT)
    raw = path.read_bytes()
    level = struct.pack("<HHI", 8, 0x2112, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    path.write_bytes(raw[: file_meta(path).end] + level * 5000)
    assert not is_intact(path, file_meta(path))


def test_a_class_left_out_of_the_file_meta_group_is_taken_from_the_data_set(tmp_path):
    """Some exporters write no MediaStorageSOPClassUID."""
    stored = stored_values(0, SHAPE)
    write_series(tmp_path, stored, meta_class=False)
    np.testing.assert_array_equal(read_ct(tmp_path, max_gib=1).hu, stored - 1024)


def test_objects_without_an_image_are_counted_and_not_reported(tmp_path):
    """Structured reports and structure sets lie beside the slices in most exports."""
    write_series(tmp_path / "ct", stored_values(0, SHAPE))
    for k, number in enumerate(("88.11", "481.3")):
        changes = {(0x08, 0x16): ("UI", f"1.2.840.10008.5.1.4.1.1.{number}"), (0x7FE0, 0x10): None}
        write_slice(tmp_path / f"{k}", stored_values(0, (16, 16)), position=(0, 0, 0), series="1.9", changes=changes)
    found = found_in(tmp_path)
    assert (found.ignored, found.refused, len(found.series)) == (2, (), 1)


def test_a_truncated_slice_is_named_beside_its_series(tmp_path):
    """A slice cut off in the middle is reported, and the gap that it leaves refuses the series."""
    path = write_series(tmp_path, stored_values(0, SHAPE))[9]
    path.write_bytes(path.read_bytes()[:-300])
    assert sorted(reasons(tmp_path)) == [
        "19 files: missing slices: 1 (steps of 4.00 mm among steps of 2.00 mm)",
        "cannot be decoded: truncated or damaged; copy it again",
    ]
    with pytest.raises(
        DataError, match=r"no usable DICOM series: 0000: 19 files: missing slices: 1 .*; 0009: cannot be"
    ):
        read_ct(tmp_path, max_gib=1)


def test_a_slice_that_breaks_after_discovery_is_named(tmp_path):
    """Between listing and reading a file may be damaged."""
    paths = write_series(tmp_path, stored_values(0, SHAPE))
    (series,) = found_in(tmp_path).series
    paths[3].write_bytes(paths[3].read_bytes()[:500])
    with pytest.raises(DataError, match=r"0003: cannot be decoded: truncated or damaged"):
        read_series(series, max_gib=1)
    write_slice(paths[3], stored_values(0, (16, 16)), position=(-10, -20, 6))
    with pytest.raises(DataError, match=r"0003: expected 18 x 24 pixels, found 1 x 16 x 16"):
        read_series(series, max_gib=1)


def test_a_folder_without_dicom_is_refused(tmp_path):
    """The message says that nothing was found."""
    (tmp_path / "notes.txt").write_text("x" * 5000)
    with pytest.raises(DataError, match=r"no usable DICOM series, and no DICOM file"):
        read_ct(tmp_path, max_gib=1)


def test_sizes_are_capped_before_decoding(tmp_path):
    """Single files when they are listed, the whole series before the first slice is decoded."""
    write_series(tmp_path, stored_values(0, SHAPE))
    found = discover(tmp_path, root=tmp_path, max_gib=1e-7)
    assert [refusal.reason for refusal in found.refused] == ["20 files: larger than data.max_file_gib, 1e-07 GiB"]
    (series,) = found_in(tmp_path).series
    with pytest.raises(DataError, match=r"declares 3.22e-05 GiB, the limit data.max_file_gib is 1e-05 GiB"):
        read_series(series, max_gib=1e-5)


def test_links_that_leave_the_data_folder_are_refused(tmp_path):
    """A link inside the folder is followed, each real folder once; one to the outside is named."""
    write_series(tmp_path / "elsewhere", stored_values(0, SHAPE), series="1.8")
    root = tmp_path / "data"
    write_series(root / "series", stored_values(0, SHAPE))
    (root / "again").symlink_to(root / "series")
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    found = found_in(root)
    assert len(found.series) == 1
    assert [(r.path, r.reason) for r in found.refused] == [
        (root / "out", "a link that leaves the data folder; copy the data into the folder")
    ]


def test_the_caller_hears_of_every_file(tmp_path):
    """The tick counts files for a progress bar and may stop the walk by raising."""
    write_series(tmp_path, stored_values(0, SHAPE))
    ticks: list[None] = []
    discover(tmp_path, root=tmp_path, max_gib=1, tick=lambda: ticks.append(None))
    assert len(ticks) == 20


def test_no_name_reaches_messages_or_the_terminal(tmp_path, capfd):
    """The patient's name and number stay in the files, whatever is wrong with them."""
    said = []
    for name, (changes, _) in ONE_BAD_TAG.items():
        write_series(tmp_path / name, stored_values(0, SHAPE), series=f"1.{len(said)}", changes=changes)
        said.append(repr(found_in(tmp_path / name)))
        with pytest.raises(DataError) as caught:
            read_ct(tmp_path / name, max_gib=1)
        said.append(str(caught.value))
    write_series(tmp_path / "good", stored_values(0, SHAPE), syntax=f"1.2.840.10008.1.2.1.99{PATIENT_NAME}")
    said += [repr(found_in(tmp_path / "good")), *capfd.readouterr()]
    for secret in (PATIENT_NAME, PATIENT_ID, "Doe", "4711"):
        assert secret not in "".join(said)
