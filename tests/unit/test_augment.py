"""Augmentation: where anatomy lands is a closed form, radiographs fit the moved volume, draws are functions of names.

Points are (x, y, z) in mm from the centre of a cube of 384 mm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.config import AugmentationConfig, Config
from app.errors import Stopped
from app.model.denoiser import StageModel
from app.physics.attenuation import x_to_mu
from app.physics.projector import centres
from app.train.augment import SampleName, augment, augmentation_draws, measured, moved_volume, rotation
from app.train.samples import Batch
from app.train.stage import train_stage
from tests.conftest import tiny_config
from tests.unit.test_stage import set_up

FOV = 384.0
ALL = ("rotation_deg=10", "scale=0.1", "translation_mm=20", "xray_noise=0.01", "xray_gain=0.05")
SWITCHES = [f"augmentation.{setting}" for setting in ALL]


def names(count: int, step: int = 7) -> list[SampleName]:
    """Of the first samples of a step."""
    return [(3, "stage_16", step, index) for index in range(count)]


def sphere(edge: int, centre_mm: tuple[float, float, float], radius_mm: float) -> Tensor:
    """(1, 1, N, N, N): water with a soft rim of a voxel, in air."""
    along = centres(edge, FOV)
    z, y, x = torch.meshgrid(along, along, along, indexing="ij")
    offset = [axis - c for axis, c in zip((x, y, z), centre_mm, strict=True)]
    distance = torch.stack(offset).norm(dim=0)
    inside = ((radius_mm - distance) / (FOV / edge) + 0.5).clamp(0, 1)
    return (inside * 0.8 - 1)[None, None].float()


def mass_and_centre(x: Tensor) -> tuple[float, Tensor]:
    """Volume above air in mm^3 and its centre (x, y, z) in mm."""
    edge = x.shape[-1]
    weight = (x[0, 0].double() + 1) / 0.8
    along = centres(edge, FOV)
    total = weight.sum()
    moments = [(weight.sum([axis for axis in range(3) if axis != kept]) * along).sum() / total for kept in (2, 1, 0)]
    return total.item() * (FOV / edge) ** 3, torch.stack(moments)


def stage_batch(config: Config, count: int, lowres: int | None = None) -> tuple[Batch, StageModel]:
    """Spheres of two sizes with radiographs that are not theirs, as given ones may be."""
    stage = config.stages[1 if lowres else 0]
    edge = stage.resolution
    x_0 = torch.cat([sphere(edge, (20.0, -30.0, 10.0), 70.0 + 20 * (index % 2)) for index in range(count)])
    coarse = torch.nn.functional.avg_pool3d(x_0, edge // lowres) if lowres else None
    torch.manual_seed(0)
    return Batch(x_0, torch.rand(count, 2, edge, edge), coarse), StageModel(config, stage)


def test_with_all_settings_at_zero_nothing_is_touched() -> None:
    """The very same objects come back: a config without the section trains as before."""
    batch, model = stage_batch(tiny_config(), 2)
    same, xrays = augment(batch, model, tiny_config(), names(2))
    assert same is batch
    assert xrays is batch.xrays


def test_the_identity_moves_nothing() -> None:
    """Rotation by 0, factor 1, no shift: equal up to rounding."""
    x = torch.rand(2, 1, 9, 9, 9) * 2 - 1
    unmoved = moved_volume(x, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), torch.zeros(2, 3).double(), FOV)
    assert torch.allclose(unmoved, x, atol=1e-5)


@pytest.mark.parametrize(
    ("axis", "point", "turned"),
    [
        ((0, 0, 1), (1, 0, 0), (0, 1, 0)),
        ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0, 2, 0), (0, 0, 1), (1, 0, 0)),
        ((1, 1, 1), (1, 0, 0), (0, 1, 0)),
    ],
)
def test_a_rotation_turns_by_the_right_hand(axis: tuple[int, ...], point: tuple[int, ...], turned: tuple[int, ...]):
    """A quarter turn about an axis takes x to y; a third of a turn about the diagonal too."""
    angle = math.radians(120 if sum(axis) == 3 else 90)
    matrix = rotation(torch.tensor(axis).double(), angle)
    assert torch.allclose(matrix @ torch.tensor(point).double(), torch.tensor(turned).double(), atol=1e-12)


@pytest.mark.parametrize("edge", [24, 48])
@pytest.mark.parametrize(
    ("linear", "shift"),
    [
        (torch.eye(3).double(), (25.0, -13.0, 40.0)),
        (rotation(torch.tensor([0.0, 0.0, 1.0]).double(), math.radians(30)), (0.0, 0.0, 0.0)),
        (rotation(torch.tensor([1.0, 2.0, -1.0]).double(), math.radians(17)) * 1.2, (5.0, 10.0, -20.0)),
        (torch.eye(3).double() * 0.8, (0.0, 0.0, 0.0)),
    ],
    ids=["translated", "rotated", "all", "shrunk"],
)
def test_a_sphere_lands_where_the_closed_form_says(edge: int, linear: Tensor, shift: tuple[float, ...]) -> None:
    """Its centre q comes to s R q + t, its volume is s^3 as large; at every resolution the same place."""
    centre, radius = (35.0, -50.0, 20.0), 60.0
    shift_mm = torch.tensor(shift).double()
    moved = moved_volume(sphere(edge, centre, radius), linear[None], shift_mm[None], FOV)
    volume, found = mass_and_centre(moved)
    expected = linear @ torch.tensor(centre).double() + shift_mm
    assert torch.allclose(found, expected, atol=0.05 * FOV / edge)
    assert volume == pytest.approx(4 / 3 * math.pi * radius**3 * torch.linalg.det(linear).item(), rel=0.03)


def test_what_leaves_the_cube_is_gone_and_air_comes_in() -> None:
    """A slab of the cube's size that is shifted by a quarter leaves air behind."""
    moved = moved_volume(
        torch.ones(1, 1, 8, 8, 8), torch.eye(3).double()[None], torch.tensor([[FOV / 4, 0, 0]]).double(), FOV
    )
    assert torch.equal(moved[..., :2], -torch.ones(1, 1, 8, 8, 2))
    assert torch.equal(moved[..., 2:], torch.ones(1, 1, 8, 8, 6))


def test_the_radiographs_are_those_of_the_moved_volume() -> None:
    """Whatever they were before; the previous stage's output has moved by the same motion, on its own grid."""
    config = tiny_config(*SWITCHES[:3])
    batch, model = stage_batch(config, 3, lowres=8)
    moved, xrays = augment(batch, model, config, names(3))
    assert xrays is moved.xrays
    assert torch.equal(xrays, model.projector(x_to_mu(moved.x_0, config.data.hu_window)))
    truth, lowres = moved.lowres_truth(), moved.lowres
    assert truth is not None
    assert lowres is not None
    for index in range(3):
        at_x_0, at_lowres = (mass_and_centre(part[index : index + 1])[1] for part in (truth, lowres))
        assert torch.allclose(at_x_0, at_lowres, atol=3)
        assert (at_x_0 - mass_and_centre(batch.x_0[index : index + 1])[1]).norm() > 6


def test_where_only_radiographs_are_distorted_the_case_stays() -> None:
    """Its own radiographs, given or rendered, are what the physics loss sees; the network's differ."""
    config = tiny_config(*SWITCHES[3:])
    batch, model = stage_batch(config, 2)
    same, xrays = augment(batch, model, config, names(2))
    assert same is batch
    assert not torch.equal(xrays, batch.xrays)


def test_noise_has_the_variance_of_counted_photons() -> None:
    """The standard deviation at p is g noise exp(p / 2), the mean is g p, each view with its own gain."""
    p = torch.tensor([0.0, 2.0, 6.0]).repeat(40_000)[None, None].expand(1, 2, -1)[..., None]
    found = measured(p, torch.tensor([[1.0, 1.1]]), 0.01, names(1))[0, :, :, 0].view(2, -1, 3)
    for view, gain in enumerate((1.0, 1.1)):
        sigma = torch.tensor([gain * 0.01 * math.exp(value / 2) for value in (0, 2, 6)])
        assert torch.allclose(found[view].std(0), sigma, rtol=0.02)
        assert torch.allclose(found[view].mean(0), torch.tensor([0.0, 2.0, 6.0]) * gain, atol=0.003)


def test_coarse_pixels_have_less_noise() -> None:
    """stage_8 of 32: a pixel is the mean of 16 of the finest, its noise a quarter of theirs."""
    config = tiny_config("augmentation.xray_noise=0.2")
    batch, model = stage_batch(config, 2)
    still = Batch(batch.x_0, torch.zeros(2, 2, 64, 64), None)
    _, xrays = augment(still, model, config, names(2))
    assert xrays.std().item() == pytest.approx(0.05, rel=0.03)


def test_draws_stay_within_their_limits_and_reach_them() -> None:
    """2000 samples: angle, factor, shift and gain are uniform up to what the config says."""
    config = AugmentationConfig(rotation_deg=10, scale=0.1, translation_mm=20, xray_gain=0.05)
    draws = augmentation_draws(config, names(2000))
    factor = torch.linalg.det(draws.linear) ** (1 / 3)
    trace = (draws.linear / factor[:, None, None]).diagonal(dim1=1, dim2=2).sum(1)
    angle = torch.rad2deg(torch.arccos(((trace - 1) / 2).clamp(-1, 1)))
    for values, limit in ((angle, 10), (factor - 1, 0.1), (draws.shift_mm, 20), (draws.gain - 1, 0.05)):
        assert 0.99 * limit < values.abs().max() <= limit * (1 + 1e-6)
        assert values.abs().mean().item() == pytest.approx(limit / 2, rel=0.05)


def test_a_setting_does_not_change_what_the_others_draw() -> None:
    """The shift of a sample is the same with and without rotation."""
    shifts = [
        augmentation_draws(AugmentationConfig(translation_mm=20, rotation_deg=angle), names(4)).shift_mm
        for angle in (0, 10)
    ]
    assert torch.equal(*shifts)


def test_draws_are_those_of_the_sample_whatever_the_micro_batch() -> None:
    """Samples 2 and 3 alone get what they get among four; another step gets something else."""
    config = tiny_config(*SWITCHES)
    batch, model = stage_batch(config, 4)
    whole, xrays = augment(batch, model, config, names(4))
    half = Batch(batch.x_0[2:], batch.xrays[2:], None)
    part, part_xrays = augment(half, model, config, names(4)[2:])
    assert torch.allclose(part.x_0, whole.x_0[2:], atol=1e-6)
    assert torch.allclose(part_xrays, xrays[2:], atol=1e-5)
    other, _ = augment(half, model, config, names(4, step=8)[2:])
    assert not torch.allclose(other.x_0, part.x_0, atol=1e-2)


@pytest.mark.parametrize("change", [lambda run: None, lambda run: run.append("augmentation.rotation_deg=9")])
@pytest.mark.parametrize("polls", [7, 19])
def test_a_stopped_run_with_augmentation_ends_with_the_same_weights(
    tmp_path: Path, polls: int, change: Callable[[list[str]], None]
) -> None:
    """Bit for bit those of the straight run, and not those of a run with another augmentation."""
    settings = list(SWITCHES)
    straight, run, _ = set_up(tmp_path / "straight", *settings)
    (tmp_path / "straight").mkdir()
    train_stage(straight, run)
    (tmp_path / "stopped").mkdir()
    change(settings)
    with pytest.raises(Stopped):
        train_stage(*set_up(tmp_path / "stopped", *settings, stop_after=polls)[:2])
    resumed, run, _ = set_up(tmp_path / "stopped", *settings)
    found = run.checkpoints.newest("stage_8")
    assert found is not None
    resumed.restore(found[1], found[0].path.name)
    train_stage(resumed, run)
    same = all(torch.equal(*pair) for pair in zip(resumed.model.parameters(), straight.model.parameters(), strict=True))
    assert same == (settings == SWITCHES)
