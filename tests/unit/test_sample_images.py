"""Radiograph files for sampling: what is read, where it lies on the trained detector, what is refused."""

import logging
import struct

import numpy as np
import pytest
from PIL import Image

from app.data.build import Renderer
from app.data.calibration import Known, calibrate
from app.data.phantom import phantom_hu
from app.data.xray_files import INTENSITIES, Stated, read_xray
from app.data.xray_image import place
from app.errors import DataError
from app.physics.geometry import PRESETS_MM, Geometry
from app.sample_plan import INTENSITY_NAMES, PRESET_NAMES
from tests.conftest import tiny_config
from tests.dicom_files import PATIENT_ID, PATIENT_NAME, write_slice

FOV = 384.0
TRAINED = Geometry(1800.0, 1500.0, FOV, 506.88)
C_ARM = Geometry(1020.0, 850.0, FOV, 506.88)
NEAR = Geometry(1200.0, 800.0, FOV, 633.6)
DX = "1.2.840.10008.5.1.4.1.1.1.1"
GRADIENT = np.arange(40 * 30).reshape(40, 30)


def refusal(path, view="frontal", **stated) -> str:
    """Why a file is refused."""
    with pytest.raises(DataError) as caught:
        read_xray(path, view, Stated(**stated))
    return str(caught.value)


def dicom(path, stored=GRADIENT, **changes):
    """A DX radiograph for processing: log, dense is bright, 0.2 x 0.3 mm, rows to the left and columns to the feet."""
    fields = {
        (0x08, 0x16): ("UI", DX),
        (0x08, 0x60): ("CS", "DX"),
        (0x08, 0x68): ("CS", "FOR PROCESSING"),
        (0x18, 0x1164): ("DS", "0.2\\0.3"),
        (0x20, 0x20): ("CS", "L\\F"),
        (0x20, 0x32): None,
        (0x20, 0x37): None,
        (0x28, 0x30): None,
        (0x28, 0x1040): ("CS", "LOG"),
        (0x28, 0x1041): ("SS", struct.pack("<h", -1)),
        (0x28, 0x1052): ("DS", "0"),
        (0x28, 0x1053): ("DS", "1"),
    }
    named = {
        "modality": (0x08, 0x60),
        "photometric": (0x28, 0x04),
        "relation": (0x28, 0x1040),
        "sign": (0x28, 0x1041),
        "imager": (0x18, 0x1164),
        "spacing": (0x28, 0x30),
        "calibration": (0x28, 0x0A02),
        "orientation": (0x20, 0x20),
        "position": (0x18, 0x5101),
        "intent": (0x08, 0x68),
        "slope": (0x28, 0x1053),
        "distance": (0x18, 0x1110),
    }
    kinds = {"imager": "DS", "spacing": "DS", "slope": "DS", "distance": "DS", "sign": "SS"}
    for name, value in changes.items():
        raw = struct.pack("<h", value) if name == "sign" and value is not None else value
        fields[named[name]] = None if value is None else (kinds.get(name, "CS"), raw)
    write_slice(path, stored, position=(0, 0, 0), changes=fields)
    return path


def test_the_command_line_names_what_there_is():
    """It repeats two lists, in place of importing what is slow to import."""
    assert tuple(INTENSITIES) == INTENSITY_NAMES
    assert tuple(PRESETS_MM) == PRESET_NAMES


# From a file to line integrals

ENCODINGS = {
    "line-integrals": (lambda p: p * 7000 + 900, 1 / 7000, -900 / 7000),
    "inverted-line-integrals": (lambda p: 65535 - p * 7000, 1 / 7000, 65535 / 7000),
    "linear": (lambda p: 60000 * np.exp(-p), 1.0, np.log(60000)),
    "inverted-linear": (lambda p: 65535 - 60000 * np.exp(-p), 1.0, np.log(60000)),
}


@pytest.fixture(scope="module")
def rendered() -> np.ndarray:
    """Line integrals (2, 32, 32) of a phantom."""
    return Renderer(tiny_config())(phantom_hu(11, 1, 32, FOV))


@pytest.mark.parametrize("intensity", ENCODINGS)
def test_a_drr_in_a_png_is_recovered(tmp_path, rendered, intensity):
    """Whatever polarity and gain it was written with: the file is fitted to the same projection, a and b come back."""
    encode, gain, offset = ENCODINGS[intensity]
    Image.fromarray(np.rint(encode(rendered[0][::-1])).astype(np.uint16)).save(tmp_path / "x.png")
    image = read_xray(tmp_path / "x.png", "frontal", Stated(intensity, whole_detector=True))
    placed = place(image, TRAINED, TRAINED, 32)
    assert placed.covered.all()
    found = calibrate(image.path, placed.t, rendered[0], placed.covered, Known())
    assert found.gain == pytest.approx(gain, rel=2e-3)
    assert found.offset == pytest.approx(offset, abs=2e-3)
    np.testing.assert_allclose(found.line_integrals(placed.t), rendered[0], atol=0.01)


@pytest.mark.parametrize("taken", [TRAINED, C_ARM, NEAR], ids=["trained", "c_arm", "luna16"])
def test_a_point_of_the_isocentre_plane_falls_on_its_pixel(tmp_path, taken):
    """x = 60 mm to the left and z = 40 mm up, by the triangles of each geometry, from an image that is not square."""
    x, z, pixel = 60.0, 40.0, 2.0
    values = np.zeros((300, 340))
    row = 150 - z * taken.source_to_detector_mm / taken.source_to_isocenter_mm / pixel
    column = 170 + x * taken.source_to_detector_mm / taken.source_to_isocenter_mm / pixel
    rows, columns = np.mgrid[:300, :340] + 0.5
    values = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 6.0**2))
    np.save(tmp_path / "x.npy", values)
    image = read_xray(tmp_path / "x.npy", "frontal", Stated("line-integrals", pixel_mm=pixel))
    placed = place(image, TRAINED, taken, 128)
    centres = (np.arange(128) + 0.5 - 64) * (TRAINED.detector_mm / 128)
    v, u = (float((placed.t.sum(axis) * centres).sum() / placed.t.sum()) for axis in (1, 0))
    assert u == pytest.approx(x * 1800 / 1500, abs=0.3)
    assert v == pytest.approx(z * 1800 / 1500, abs=0.3)


def test_a_small_image_is_continued_and_what_it_covers_is_known(tmp_path, caplog):
    """400 mm of 506.88 mm: the middle 101 of 128 pixels are covered, less those at the edge; the border goes on."""
    np.save(tmp_path / "x.npy", np.tile(np.linspace(1, 2, 200), (200, 1)))
    image = read_xray(tmp_path / "x.npy", "frontal", Stated("line-integrals", pixel_mm=2.0))
    placed = place(image, TRAINED, TRAINED, 128)
    assert placed.covered.sum() == 100**2
    assert placed.covered[14:114, 14:114].all()
    np.testing.assert_allclose(placed.t[:, :12], 1.0, atol=1e-6)
    np.testing.assert_allclose(placed.t[:, -12:], 2.0, atol=1e-6)
    assert "cover 62 % of the trained detector (507 mm); the border goes on outside" in caplog.text


def test_a_large_image_is_cropped(tmp_path):
    """The centre of 1000 mm x 1200 mm."""
    np.save(tmp_path / "x.npy", np.tile(np.arange(600.0), (500, 1)))
    placed = place(read_xray(tmp_path / "x.npy", "frontal", Stated("line-integrals", 2.0)), TRAINED, TRAINED, 32)
    assert placed.covered.all()
    assert placed.t[0, 0] == pytest.approx(299.5 - 506.88 / 4 + 506.88 / 128, abs=0.5)


# DICOM


@pytest.mark.parametrize(
    ("photometric", "sign", "relation", "reading"),
    [
        ("MONOCHROME2", -1, "LOG", "line integrals"),
        ("MONOCHROME1", 1, "LOG", "line integrals"),
        ("MONOCHROME2", 1, "LOG", "inverted line integrals"),
        ("MONOCHROME1", -1, "LOG", "inverted line integrals"),
        ("MONOCHROME2", None, "LOG", "line integrals"),
        ("MONOCHROME1", None, "LOG", "line integrals"),
        ("MONOCHROME2", 1, "LIN", "intensity"),
        ("MONOCHROME2", -1, "LIN", "inverted intensity"),
        ("MONOCHROME1", 1, "LIN", "inverted intensity"),
        ("MONOCHROME1", -1, "LIN", "intensity"),
    ],
)
def test_attenuation_rises_in_what_the_tags_make_of_a_dicom_file(tmp_path, photometric, sign, relation, reading):
    """The sign says which way stored values run; without it dense is bright on a screen, in either MONOCHROME."""
    stored_rises = sign == -1 if sign is not None else photometric == "MONOCHROME2"
    p = np.linspace(0.5, 4, 40 * 30).reshape(40, 30)
    detector = p * 8000 if relation == "LOG" else 60000 * np.exp(-p)
    stored = np.rint(detector if (relation == "LOG") == stored_rises else 65535 - detector)
    image = read_xray(
        dicom(tmp_path / "x", stored, photometric=photometric, sign=sign, relation=relation), "frontal", Stated()
    )
    assert image.reading == reading
    assert image.is_dicom
    t = place(image, Geometry(1800, 1500, 60, 6.0), TRAINED, 16).t
    assert (np.diff(t[:, 8]) < 0).all()  # row 0 of the file, the least attenuation, is superior: the last row
    if relation == "LIN":
        # 6 of the 8 mm, from the centre of the first to that of the last of 16 pixels.
        assert t[0, 8] - t[-1, 8] == pytest.approx(3.5 * 6 / 8 * 15 / 16, abs=0.02)


def test_dicom_pixels_are_rescaled_and_carry_their_size(tmp_path):
    """Slope 2; ImagerPixelSpacing is height and width at the detector; the distance is passed on."""
    image = read_xray(dicom(tmp_path / "x", slope="2", distance="1850"), "frontal", Stated())
    np.testing.assert_array_equal(image.values, 2 * GRADIENT)
    assert image.pixel_mm == (0.2, 0.3)
    assert not image.in_patient
    assert image.source_to_detector_mm == 1850


def test_a_calibrated_pixel_spacing_is_a_length_in_the_patient(tmp_path):
    """0.5 mm at the isocentre are 0.6 mm on the detector at SDD / SOD = 1.2; uncalibrated, 0.5 mm."""
    for calibration, detector_mm in ((None, 0.5), ("FIDUCIAL", 0.6)):
        path = dicom(
            tmp_path / str(calibration), np.kron(GRADIENT, np.ones((30, 30))), imager=None, spacing="0.5\\0.5",
            calibration=calibration,
        )  # fmt: skip
        image = read_xray(path, "frontal", Stated())
        assert image.in_patient == (calibration is not None)
        covered = place(image, TRAINED, TRAINED, 128).covered.any(0).sum()
        assert covered == pytest.approx(min(128, 900 * detector_mm / TRAINED.detector_mm * 128), abs=2)


@pytest.mark.parametrize(
    ("view", "orientation", "turned"),
    [
        ("frontal", "L\\F", GRADIENT),
        ("frontal", "R\\F", GRADIENT[:, ::-1]),
        ("frontal", "L\\H", GRADIENT[::-1]),
        ("frontal", "F\\L", GRADIENT.T),
        ("frontal", "H\\L", GRADIENT.T[::-1]),
        ("lateral", "P\\F", GRADIENT),
        ("lateral", "A\\F", GRADIENT[:, ::-1]),
        ("frontal", "LF\\FR", GRADIENT),
    ],
)
def test_a_dicom_file_is_turned_as_it_says(tmp_path, view, orientation, turned):
    """Row 0 superior, column 0 the patient's right or front, pixel size turned along."""
    image = read_xray(dicom(tmp_path / "x", orientation=orientation), view, Stated())
    np.testing.assert_array_equal(image.values, turned)
    assert image.pixel_mm == ((0.3, 0.2) if turned.shape == (30, 40) else (0.2, 0.3))


def test_what_a_dicom_file_leaves_open_is_said(tmp_path, caplog):
    """No orientation, processed for a screen, a beam that runs the other way."""
    path = dicom(tmp_path / "x", orientation=None, intent="FOR PRESENTATION", position="AP")
    read_xray(path, "frontal", Stated())
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(": ", 1)[1][:40] for message in messages] == [
        "processed for presentation: its gray val",
        "the beam runs the other way (ViewPositio",
        "does not say how it lies (PatientOrienta",
    ]


@pytest.mark.parametrize(
    ("view", "changes", "reason"),
    [
        ("frontal", {"modality": "CT"}, "expected a radiograph (modality CR, DX, DR, RF), found another modality"),
        ("frontal", {"orientation": "P\\F"}, "not a frontal radiograph by its PatientOrientation; were --frontal and"),
        ("lateral", {}, "not a lateral radiograph by its PatientOrientation; were --frontal and --lateral exchanged?"),
        ("frontal", {"slope": "-1"}, "expected a positive rescale slope, found -1"),
        ("frontal", {"relation": None}, "the file does not say (no PixelIntensityRelationship LOG or LIN); give "),
        ("frontal", {"imager": None}, "no ImagerPixelSpacing or PixelSpacing in the file; give --pixel-mm MM"),
    ],
)
def test_dicom_files_that_cannot_be_used_are_refused(tmp_path, view, changes, reason):
    """The message names the file and what to do, and nothing of the patient."""
    path = dicom(tmp_path / "x.dcm", **changes)
    message = refusal(path, view)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert PATIENT_NAME not in message
    assert PATIENT_ID not in message


def test_a_truncated_dicom_file_is_refused(tmp_path):
    """Before GDCM believes its lengths."""
    path = dicom(tmp_path / "x.dcm")
    path.write_bytes(path.read_bytes()[:-400])
    assert refusal(path) == f"{path}: cannot be decoded: truncated or damaged; copy it again"


# Refusals of plain images


def test_unknown_gray_values_are_refused(tmp_path):
    """A png cannot say whether it is a log image, nor which way."""
    Image.fromarray(GRADIENT.astype(np.uint16)).save(tmp_path / "x.png")
    assert refusal(tmp_path / "x.png", pixel_mm=1.0) == (
        f"{tmp_path / 'x.png'}: expected to know what its gray values mean, and it cannot say; give --intensity "
        "line-integrals (bright where dense, after a log, as shown on screens), inverted-line-integrals, linear "
        "(detector counts, dark where dense) or inverted-linear"
    )


def test_an_unknown_pixel_size_is_refused(tmp_path):
    """A png has none."""
    Image.fromarray(GRADIENT.astype(np.uint16)).save(tmp_path / "x.png")
    assert refusal(tmp_path / "x.png", intensity="linear") == (
        f"{tmp_path / 'x.png'}: expected the size of its pixels, and a plain image has none; give --pixel-mm MM, "
        "measured on the detector, or --whole-detector if the image shows exactly the whole square detector, as a DRR "
        "of this program does"
    )


def test_a_whole_detector_is_square(tmp_path):
    """Otherwise it is not the whole one."""
    np.save(tmp_path / "x.npy", GRADIENT)
    assert refusal(tmp_path / "x.npy", intensity="linear", whole_detector=True).endswith(
        "expected a square image of the whole detector, found 30 x 40 pixels"
    )


def test_files_that_are_no_radiographs_are_refused(tmp_path):
    """Missing, a folder, a text."""
    (tmp_path / "x.txt").write_text("text")
    assert refusal(tmp_path / "no.png") == f"{tmp_path / 'no.png'}: no such file"
    assert refusal(tmp_path) == f"{tmp_path}: expected the file of one radiograph, found a folder"
    assert refusal(tmp_path / "x.txt").endswith(
        "expected a radiograph as .png, .jpg, .jpeg, .npy or DICOM, found neither"
    )


@pytest.mark.parametrize(
    ("pixel_mm", "reason"),
    [
        (
            1.0,
            "30 x 40 pixels of 1 x 1 mm cover only 0.47 % of the trained detector (507 mm, at least 20 % are expected)",
        ),
        (
            100.0,
            "the trained detector (507 mm) spans only 5.1 of its 30 x 40 pixels of 100 x 100 mm; check the pixel size",
        ),
    ],
)
def test_an_absurd_pixel_size_is_refused(tmp_path, pixel_mm, reason):
    """A stamp, or a wall."""
    np.save(tmp_path / "x.npy", GRADIENT)
    image = read_xray(tmp_path / "x.npy", "frontal", Stated("line-integrals", pixel_mm))
    with pytest.raises(DataError) as caught:
        place(image, TRAINED, TRAINED, 32)
    assert reason in str(caught.value)


def test_negative_intensities_are_refused(tmp_path):
    """Counts are not negative: the values mean something else."""
    np.save(tmp_path / "x.npy", GRADIENT - 5.0)
    image = read_xray(tmp_path / "x.npy", "frontal", Stated("linear", whole_detector=False, pixel_mm=10.0))
    with pytest.raises(DataError, match="expected intensities from 0 up, found -5; are they line integrals"):
        place(image, TRAINED, TRAINED, 32)
