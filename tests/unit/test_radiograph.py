"""Radiograph files: what is read, how it is fitted to the scan's own projection, what is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from app.data.build import Renderer
from app.data.phantom import phantom_hu
from app.data.radiograph import align, read_radiograph
from app.errors import DataError
from tests.conftest import tiny_config

RAMP = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)


@pytest.fixture(scope="module")
def rendered() -> np.ndarray:
    """Line integrals (2, 32, 32) of a phantom."""
    return Renderer(tiny_config())(phantom_hu(11, 1, 32, 384.0))


def refusal(path) -> str:
    """Why a file is refused."""
    with pytest.raises(DataError) as caught:
        read_radiograph(path)
    return str(caught.value)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint8), ("png", np.uint16), ("npy", np.float32)])
def test_row_zero_of_a_file_is_superior(tmp_path, suffix, dtype):
    """The first row of the file is the last of the array, for every format and depth."""
    pixels = (RAMP // 4 if dtype == np.uint8 else RAMP * 4).astype(dtype)
    path = tmp_path / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(read_radiograph(path), pixels[::-1])


def test_a_jpeg_is_read(tmp_path):
    """Within the error of its compression."""
    Image.fromarray((RAMP // 4).astype(np.uint8)).save(tmp_path / "image.jpg", quality=95)
    assert np.abs(read_radiograph(tmp_path / "image.jpg") - RAMP[::-1] // 4).max() <= 6


def test_gray_in_colour_channels_is_gray(tmp_path):
    """Three equal channels are one."""
    gray = (RAMP // 4).astype(np.uint8)
    Image.fromarray(np.stack([gray] * 3, -1)).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_radiograph(tmp_path / "image.png"), gray[::-1])


def test_colour_is_refused(tmp_path):
    """A picture with colours is no radiograph."""
    Image.fromarray(np.stack([RAMP // 4, RAMP // 8, RAMP // 16], -1).astype(np.uint8)).save(tmp_path / "image.png")
    assert refusal(tmp_path / "image.png") == f"{tmp_path / 'image.png'}: expected a gray image, found colour"


def test_a_black_and_white_image_is_refused(tmp_path):
    """One bit per pixel is too little."""
    Image.fromarray(RAMP > 500).save(tmp_path / "image.png")
    assert refusal(tmp_path / "image.png").endswith("expected an 8- or 16-bit gray image, found mode 1")


def test_an_image_that_is_not_square_is_refused(tmp_path):
    """The detector is square, and only a whole detector can be placed."""
    np.save(tmp_path / "image.npy", RAMP[:20])
    assert refusal(tmp_path / "image.npy").endswith(
        "expected a square image of the whole detector, found 32 x 20 pixels"
    )


def png_of_declared_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("edge", [8_000, 12_000, 60_000])
def test_a_png_that_declares_a_huge_size_is_refused_before_it_is_decoded(tmp_path, edge):
    """Below and above the sizes at which the decoder itself warns or gives up."""
    (tmp_path / "image.png").write_bytes(png_of_declared_size(edge, edge))
    assert "declares too many pixels" in refusal(tmp_path / "image.png")


def test_an_array_that_declares_a_huge_size_is_refused(tmp_path):
    """A header of terabytes over an empty file."""
    with (tmp_path / "image.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (1_000_000, 1_000_000)}
        )
    assert refusal(tmp_path / "image.npy").endswith("not a complete NumPy array of numbers; save it with numpy.save")


def test_a_pickled_array_is_refused(tmp_path):
    """Objects are never unpickled."""
    np.save(tmp_path / "image.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    assert "not a complete NumPy array of numbers" in refusal(tmp_path / "image.npy")


def test_an_array_of_another_kind_is_refused(tmp_path):
    """Three dimensions, or complex numbers."""
    np.save(tmp_path / "image.npy", np.zeros((2, 32, 32)))
    assert refusal(tmp_path / "image.npy").endswith("expected a 2D array of numbers, found float64 (2, 32, 32)")


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.where(RAMP == 7, np.nan, RAMP), "holds values that are NaN or infinite"),
        (np.full((32, 32), 3.0), "all pixels have the same value"),
        (RAMP[:8, :8], "expected at least 16 pixels along each edge, found 8 x 8"),
    ],
)
def test_images_without_use_are_refused(tmp_path, pixels, reason):
    """NaN, no contrast, too small."""
    np.save(tmp_path / "image.npy", pixels)
    assert refusal(tmp_path / "image.npy") == f"{tmp_path / 'image.npy'}: {reason}"


def test_damaged_images_are_refused(tmp_path):
    """Truncated, or not an image at all."""
    Image.fromarray((RAMP * 60).astype(np.uint16)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:120])
    (tmp_path / "text.png").write_text("no image")
    assert refusal(tmp_path / "cut.png").endswith("cannot be decoded (damaged or truncated image)")
    assert refusal(tmp_path / "text.png").endswith("not a PNG or JPEG image")


ENCODINGS = {
    "line integrals": lambda p: p * 7000 + 900,
    "inverted line integrals": lambda p: 65535 - p * 7000,
    "intensity": lambda p: np.rint(60000 * np.exp(-p)),
    "inverted intensity": lambda p: 65535 - np.rint(65535 * np.exp(-p)),
}


@pytest.mark.parametrize("reading", ENCODINGS)
def test_each_encoding_gives_the_line_integrals_back(rendered, reading):
    """Whatever gain, offset and polarity, p comes back to 0.2 %, and the reading is named."""
    given = {"frontal": ENCODINGS[reading](rendered[0]).astype(np.float32)}
    fit = align(given, rendered)["frontal"].fit
    assert fit.reading == reading
    assert fit.difference < 0.002
    np.testing.assert_allclose(fit.line_integrals, rendered[0], atol=0.02)


def test_larger_images_are_averaged_onto_the_detector(rendered):
    """Each pixel shown as 8 x 8 gives the same image, blurred a little by the filter."""
    given = {"lateral": np.kron(rendered[1], np.ones((8, 8), np.float32))}
    assert align(given, rendered)["lateral"].fit.difference < 0.06


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p[0][:, ::-1], "better mirrored left to right"),
        (lambda p: p[0][::-1], "better upside down"),
        (lambda p: p[0][::-1, ::-1], "better rotated by 180 degrees"),
        (lambda p: p[1], "better as the lateral view"),
    ],
)
def test_a_wrong_orientation_is_named(rendered, change, words):
    """A mirrored chest differs from itself by less than the threshold, so orientations are compared."""
    reason = align({"frontal": np.ascontiguousarray(change(rendered))}, rendered)["frontal"].refusal()
    assert f"misaligned radiographs: the frontal image fits the scan {words} (relative L2 0.000)" in str(reason)


def test_a_right_image_is_not_refused(rendered):
    """No other orientation fits better."""
    assert all(
        each.refusal() is None for each in align({"frontal": rendered[0], "lateral": rendered[1]}, rendered).values()
    )


def test_another_patient_differs_by_much(rendered):
    """What the threshold is for."""
    other = Renderer(tiny_config())(phantom_hu(11, 4, 32, 384.0))
    fit = align({"frontal": other[0]}, rendered)["frontal"].fit
    assert fit.difference > 0.1
