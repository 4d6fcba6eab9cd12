"""The pictures show the patient the right way round."""

import numpy as np
import pytest

from app.ops.panels import SMALLEST_TILE, middle_slice, validation_panel
from app.train.protocols import CasePicture

AIR = -1000.0


def marked_volume(edge: int = 16) -> np.ndarray:
    """Air with one dense voxel each: superior (1), to the patient's left (2), posterior (3), in the middle planes."""
    volume = np.full((edge,) * 3, AIR, np.float32)
    middle = edge // 2
    volume[edge - 1, middle, middle] = 1
    volume[middle, middle, edge - 1] = 2
    volume[middle, edge - 1, middle] = 3
    return volume


@pytest.mark.parametrize(
    ("plane", "where"),
    [
        ("axial", {2: "right", 3: "bottom"}),
        ("coronal", {1: "top", 2: "right"}),
        ("sagittal", {1: "top", 3: "right"}),
    ],
)
def test_slices_are_the_right_way_round(plane: str, where: dict[int, str]) -> None:
    """Superior is up, the patient's left on the viewer's right, posterior at the bottom or on the right."""
    image = middle_slice(marked_volume(), plane)
    borders = {"top": image[0], "bottom": image[-1], "right": image[:, -1], "left": image[:, 0]}
    assert {int(v) for v in np.unique(image) if v > 0} == set(where)
    for value, border in where.items():
        assert value in borders[border]


def case(edge: int, **changes: np.ndarray) -> CasePicture:
    """A case of air and empty radiographs, with changes."""
    air = np.full((edge,) * 3, AIR, np.float32)
    flat = np.zeros((2, edge, edge), np.float32)
    arrays = {"truth": air, "prediction": air, "condition": air, "xrays": flat, "drr": flat, **changes}
    return CasePicture("case 3fa2b1c0", **arrays)


def tile(picture: np.ndarray, row: int, column: int, edge: int) -> np.ndarray:
    """(edge, edge, 3): the tile of a panel, found from its documented margins."""
    top = 22 * (2 if row < 3 else 3) + row * (edge + 6)
    left = 26 + column * (edge + 6)
    return picture[top : top + edge, left : left + edge]


@pytest.mark.parametrize(("edge", "expected"), [(16, 160), (32, 160), (64, 192), (160, 160), (256, 256)])
def test_small_cubes_are_enlarged_by_a_whole_factor(edge: int, expected: int) -> None:
    """A tile is at least 160 pixels wide and each voxel a square of equal size."""
    picture = validation_panel(case(edge))
    assert expected >= SMALLEST_TILE
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * 22 + 5 * (expected + 6), 26 + 4 * (expected + 6), 3)


def test_one_voxel_is_one_square_of_the_tile() -> None:
    """The error of one voxel lights exactly its own pixels, in the colour of 500 HU."""
    truth = np.full((16,) * 3, AIR, np.float32)
    prediction = truth.copy()
    prediction[8, 2, 12] += 500
    error = tile(validation_panel(case(16, prediction=prediction)), 0, 2, 160)
    np.testing.assert_array_equal(error[20:30, 120:130], np.broadcast_to((255, 255, 200), (10, 10, 3)))
    assert np.count_nonzero(error.any(axis=2)) == 100


def test_radiographs_stand_upright_and_share_their_scale() -> None:
    """Row 0 is inferior in the array and the bottom row in the picture; X-ray and DRR have the same grey values."""
    xrays = np.zeros((2, 16, 16), np.float32)
    xrays[0, 15, 2] = 4.0
    drr = xrays / 2
    picture = validation_panel(case(16, xrays=xrays, drr=drr))
    assert tuple(tile(picture, 3, 0, 160)[5, 25]) == (255, 255, 255)
    assert tuple(tile(picture, 3, 1, 160)[5, 25]) == (128, 128, 128)
    assert tuple(tile(picture, 3, 2, 160)[5, 25]) == (40, 110, 255)
    assert not tile(picture, 4, 0, 160)[40:].any()


def test_arrays_of_different_shape_are_refused() -> None:
    """The message names the array."""
    with pytest.raises(ValueError, match=r"drr has shape \(2, 8, 8\), expected that of xrays: \(2, 16, 16\)"):
        validation_panel(case(16, drr=np.zeros((2, 8, 8), np.float32)))
