"""The command line of `sample`: what contradicts itself is refused before anything is read."""

import numpy as np
import pytest

from app.__main__ import parser
from app.errors import ConfigError
from app.ops.panels import sample_panel
from app.sample_plan import SamplePlan, ViewPlan, sample_plan


def plan(*words) -> SamplePlan:
    """The plan of a command line."""
    return sample_plan(parser().parse_args(["sample", *map(str, words)]))


def refusal(*words) -> str:
    """Why a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    return str(caught.value)


def test_two_values_are_for_the_two_images(tmp_path):
    """One value is for both."""
    found = plan(
        "--frontal", "f.png", "--lateral", "l.png", "--out", tmp_path / "ct.nii.gz",
        "--intensity", "linear", "inverted-linear", "--pixel-mm", "0.2", "--gain", "1", "2", "--offset", "-0.5",
    )  # fmt: skip
    assert [(view.view, view.intensity, view.pixel_mm, view.gain, view.offset) for view in found.views] == [
        ("frontal", "linear", 0.2, 1.0, -0.5),
        ("lateral", "inverted-linear", 0.2, 2.0, -0.5),
    ]
    assert found.picture == tmp_path / "ct.png"


def test_calibrated_is_gain_one(tmp_path):
    """And no offset."""
    found = plan("--lateral", "l.npy", "--out", tmp_path / "ct.nii", "--calibrated", "--whole-detector")
    (view,) = found.views
    assert isinstance(view, ViewPlan)
    assert (view.view, view.intensity, view.gain, view.offset) == ("lateral", "line-integrals", 1.0, 0.0)


F = ("--frontal", "f.png")
REFUSALS = {
    ("--out", "{}/ct.nii"): "expected a radiograph, found none: give --frontal FILE, --lateral FILE or both",
    (*F, "--out", "{}/ct.mha"): "--out {}/ct.mha: expected a name that ends in .nii.gz or .nii, such as ct.nii.gz",
    (*F, "--out", "{}/.nii.gz"): "--out {}/.nii.gz: expected a name that ends in .nii.gz or .nii, such as ct.nii.gz",
    (*F, "--out", "{}/no/ct.nii"): "--out {}/no/ct.nii: the folder {}/no does not exist; make it first",
    ("--frontal", "{}/ct.png", "--out", "{}/ct.nii"): (
        "--out {}/ct.nii: {}/ct.png would overwrite the radiograph; choose another name"
    ),
    (*F, "--out", "{}/ct.nii", "--gain", "1", "2"): "--gain: expected one value, found 2",
    (*F, "--out", "{}/ct.nii", "--calibrated", "--gain", "2"): (
        "--calibrated says that the values are line integrals: leave --intensity, --gain, --offset and --air-visible "
        "out"
    ),
    (*F, "--out", "{}/ct.nii", "--offset", "0", "--air-visible"): (
        "--offset and --air-visible both fix b: leave one of them out"
    ),
    (*F, "--out", "{}/ct.nii", "--model", "c.pt", "--config", "c.yaml"): (
        "--model brings its own config: leave --config and --set out"
    ),
    (*F, "--out", "{}/ct.nii", "--source-to-detector-mm", "1500"): (
        "give both --source-to-detector-mm and --source-to-isocenter-mm, or neither"
    ),
    (*F, "--out", "{}/ct.nii", "--source-to-detector-mm", "1", "--source-to-isocenter-mm", "2"): (
        "--source-to-detector-mm 1 must be larger than --source-to-isocenter-mm 2"
    ),
    (*F, "--out", "{}/ct.nii", "--preset", "c_arm", "--source-to-detector-mm", "3", "--source-to-isocenter-mm", "2"): (
        "--preset sets both distances: leave it out, or leave the distances out"
    ),
}


@pytest.mark.parametrize("words", REFUSALS, ids=" ".join)
def test_what_cannot_be_done_is_refused(tmp_path, words):
    """The message says what was expected."""
    given = [word.replace("{}", str(tmp_path)) for word in words]
    assert refusal(*given) == REFUSALS[words].replace("{}", str(tmp_path))


def test_a_radiograph_is_not_overwritten_through_a_link(tmp_path):
    """The picture's name leads to it."""
    (tmp_path / "xray.png").touch()
    (tmp_path / "ct.png").symlink_to(tmp_path / "xray.png")
    assert "would overwrite the radiograph" in refusal("--frontal", tmp_path / "xray.png", "--out", tmp_path / "ct.nii")


@pytest.mark.parametrize("words", [("--pixel-mm", "0"), ("--relaxation", "3"), ("--samples", "0"), ("--offset", "nan")])
def test_numbers_out_of_range_are_refused(tmp_path, words, capsys):
    """By argparse, with what was expected."""
    with pytest.raises(SystemExit):
        plan(*F, "--out", tmp_path / "ct.nii", *words)
    assert f"argument {words[0]}: expected a " in capsys.readouterr().err


def test_the_picture_shows_radiographs_and_slices_the_right_way_round():
    """A bright pixel at the patient's left and top, a dense voxel at the left: on the viewer's right, superior up."""
    air = np.full((16,) * 3, -1000, np.float32)
    air[8, 8, 15] = 100
    xrays = np.zeros((2, 16, 16), np.float32)
    xrays[0, 15, 13] = 4
    picture = sample_panel("title", xrays, xrays / 2, air, [True, False])
    edge, step, top, left = 160, 166, 44, 26
    frontal = picture[top : top + edge, left : left + edge]
    assert (frontal[:10, 130:140] == 255).all()
    lateral = picture[top + step : top + step + edge, left : left + edge]
    assert lateral.max() > 200  # "not given"
    axial = picture[top + 2 * step + 22 : top + 2 * step + 22 + edge, left : left + 2 * step]
    assert (axial[80:90, 150:160] > 200).all()
    assert (axial[80:90, step + 150 : step + 160] > 150).all()
    assert picture.shape == (3 * 22 + 5 * step, left + 4 * step, 3)
