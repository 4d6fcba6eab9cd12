"""The projector against closed forms, finite differences and `grid_sample`.

Shapes: volumes (B, 1, D, H, W) in 1/mm, (z, y, x); images (B, 2, Nv, Nu). Lengths in mm, isocentre 0.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from app.physics.geometry import VIEWS, Geometry
from app.physics.projector import Projector

CHEST_STAND = Geometry(1800.0, 1500.0, 384.0, 507.0)
C_ARM = Geometry(1020.0, 850.0, 384.0, 507.0)


def cell_centres(count: int, edge_mm: float) -> Tensor:
    """Centres of `count` equal cells over `edge_mm`, float64."""
    step = edge_mm / count
    return torch.linspace(-edge_mm / 2 + step / 2, edge_mm / 2 - step / 2, count, dtype=torch.float64)


def rays(geometry: Geometry, detector_edge: int, view: str) -> tuple[Tensor, Tensor]:
    """Source (3,) and pixel centres (Nv, Nu, 3) of a view in patient x, y, z."""
    sdd, sod = geometry.source_to_detector_mm, geometry.source_to_isocenter_mm
    s = cell_centres(detector_edge, geometry.detector_mm)
    v, u = torch.meshgrid(s, s, indexing="ij")
    behind = torch.full_like(u, sdd - sod)
    if view == "frontal":
        return torch.tensor([0.0, sod, 0.0], dtype=torch.float64), torch.stack([u, -behind, v], dim=-1)
    return torch.tensor([-sod, 0.0, 0.0], dtype=torch.float64), torch.stack([behind, u, v], dim=-1)


def shadow_of(point: tuple[float, float, float], geometry: Geometry, view: str) -> tuple[float, float]:
    """Where the ray through a patient point x, y, z meets the detector: (v, u)."""
    x, y, z = point
    depth, across = (-y, x) if view == "frontal" else (x, y)
    scale = geometry.source_to_detector_mm / (geometry.source_to_isocenter_mm + depth)
    return z * scale, across * scale


def ball(edge: int, field_of_view_mm: float, centre: tuple[float, float, float], radius_mm: float) -> Tensor:
    """A ball of attenuation 1, (1, 1, D, H, W); voxels at its surface hold about the share that lies inside."""
    t = cell_centres(edge, field_of_view_mm)
    z, y, x = t[:, None, None], t[None, :, None], t[None, None, :]
    distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2).sqrt()
    return ((radius_mm - distance) / (field_of_view_mm / edge) + 0.5).clamp(0, 1).float()[None, None]


def distances_of_rays(geometry: Geometry, detector_edge: int, view: str, point: tuple[float, float, float]) -> Tensor:
    """Distance (Nv, Nu) in mm of each ray from a patient point x, y, z."""
    source, pixels = rays(geometry, detector_edge, view)
    directions = torch.nn.functional.normalize(pixels - source, dim=-1)
    return torch.linalg.cross(directions, (torch.tensor(point) - source).expand_as(directions)).norm(dim=-1)


@pytest.mark.parametrize("geometry", [CHEST_STAND, C_ARM], ids=["chest_stand", "c_arm"])
@pytest.mark.parametrize("view", VIEWS)
def test_line_integrals_of_an_off_centre_ball_converge_to_its_chords(geometry: Geometry, view: str) -> None:
    """A ball reads 2 sqrt(r^2 - d^2) on a ray at distance d: within 0.5 % inside the rim, and converging at it.

    Interpolation blurs the surface over a voxel h, where the chord ends as a square root: the error of the rays that
    graze the rim keeps the whole relative L2 at first order in h (2 % at 3 mm). A wrong axis, sign or magnification
    misplaces the whole ball and costs tens of percent on every ray.
    """
    centre, radius = (60.0, -35.0, 25.0), 70.0
    distances = distances_of_rays(geometry, 120, view, centre)
    expected = 2 * (radius**2 - distances**2).clamp(min=0).sqrt()
    errors = []
    for edge in (32, 64, 128):
        seen = Projector(geometry, edge, 120)(ball(edge, 384.0, centre, radius))[0, VIEWS.index(view)]
        errors.append(float((seen - expected).norm() / expected.norm()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.025

    inside, outside = distances < radius - 4.5, distances > radius + 7.5
    assert float((seen - expected)[inside].norm() / expected[inside].norm()) < 0.005
    assert float(seen[outside].abs().max()) == 0.0


@pytest.mark.parametrize("view", VIEWS)
def test_a_slab_across_the_beam_reads_thickness_over_cosine(view: str) -> None:
    """Inside the cube's shadow a slab of thickness t gives mu t |ray| / SDD, to rounding."""
    edge, mu, first, last = 32, 0.02, 6, 17
    volume = torch.zeros(1, 1, edge, edge, edge)
    if view == "frontal":
        volume[:, :, :, first:last] = mu
    else:
        volume[..., first:last] = mu
    seen = Projector(CHEST_STAND, edge)(volume)[0, VIEWS.index(view)]

    source, pixels = rays(CHEST_STAND, edge, view)
    expected = mu * (last - first) * 12.0 * (pixels - source).norm(dim=-1) / 1800.0
    v, u = (pixels[..., i] for i in ((2, 0) if view == "frontal" else (2, 1)))
    covered = (v.abs() < 180) & (u.abs() < 180)  # well inside the smallest shadow of a plane
    torch.testing.assert_close(seen[covered].double(), expected[covered], rtol=1e-6, atol=0)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("voxel", [(24, 6, 21), (5, 9, 27), (20, 25, 3), (10, 22, 18)])
def test_one_bright_voxel_lands_where_the_ray_through_it_lands(view: str, voxel: tuple[int, int, int]) -> None:
    """The centre of the spot of voxel (z, y, x) is the analytic (v, u); no two axes can be mirrored or swapped."""
    volume = torch.zeros(1, 1, 32, 32, 32)
    volume[(0, 0, *voxel)] = 1.0
    spot = Projector(CHEST_STAND, 32, 256)(volume)[0, VIEWS.index(view)].double()

    s = cell_centres(256, CHEST_STAND.detector_mm)
    seen = float((spot.sum(1) * s).sum() / spot.sum()), float((spot.sum(0) * s).sum() / spot.sum())
    z, y, x = ((i + 0.5 - 16) * 12.0 for i in voxel)
    assert seen == pytest.approx(shadow_of((x, y, z), CHEST_STAND, view), abs=0.05)  # mm; a pixel is 1.98 mm


def test_radiographs_show_the_patient_as_the_convention_says() -> None:
    """Left, posterior and superior are at larger u (frontal), larger u (lateral) and larger v; nearer is larger."""
    volume = torch.zeros(3, 1, 16, 16, 16)
    volume[0, 0, 8, 8, 13] = volume[1, 0, 8, 13, 8] = volume[2, 0, 13, 8, 8] = 1.0
    seen = Projector(CHEST_STAND, 16)(volume)
    frontal_u, lateral_u, v = seen[:, 0].sum(1).argmax(1), seen[:, 1].sum(1).argmax(1), seen[:, 0].sum(2).argmax(1)
    assert frontal_u[0] > 8
    assert lateral_u[1] > 8
    assert v[2] > 8
    posterior, anterior = torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16)
    posterior[..., 14, 14], anterior[..., 1, 14] = 1.0, 1.0
    u = torch.arange(16.0)
    projector = Projector(CHEST_STAND, 16)
    frontal = [projector.project(volume, "frontal").sum(dim=(0, 1)) for volume in (posterior, anterior)]
    assert (frontal[0] * u).sum() / frontal[0].sum() > (frontal[1] * u).sum() / frontal[1].sum()


def test_a_source_far_away_gives_parallel_sums() -> None:
    """SOD -> infinity is the parallel beam: the sum of voxels along y and along x times their edge."""
    geometry = Geometry(1e9 + 300, 1e9, 320.0, 320.0)
    volume = torch.rand(2, 1, 16, 16, 16)
    seen = Projector(geometry, 16)(volume)
    torch.testing.assert_close(seen[:, 0], volume[:, 0].sum(2) * 20.0, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen[:, 1], volume[:, 0].sum(3) * 20.0, rtol=1e-5, atol=1e-4)


def test_beyond_the_last_voxel_values_fall_to_zero_within_one_voxel() -> None:
    """Across the border of a uniform cube the line integral follows the hat functions of its voxels."""
    geometry = Geometry(1e9, 1e9, 80.0, 160.0)
    seen = Projector(geometry, 4, 32).project(torch.ones(1, 1, 4, 4, 4), "frontal")[0].double()
    s, t = cell_centres(32, 160.0), cell_centres(4, 80.0)
    profile = (1 - (s[:, None] - t).abs() / 20.0).clamp(min=0).sum(1)
    torch.testing.assert_close(seen, 80.0 * profile[:, None] * profile, rtol=1e-5, atol=1e-4)
    assert profile[s.abs() > 50].abs().max() == 0
    assert 0 < profile[s.abs() > 40].max() < 0.5


@pytest.mark.parametrize(("volume_edge", "detector_edge"), [(12, 12), (10, 17), (16, 9)])
def test_adjoint_is_the_exact_transpose(volume_edge: int, detector_edge: int) -> None:
    """<A x, y> = <x, A^T y> to rounding in float64, and to float32's rounding as trained."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, volume_edge, volume_edge, volume_edge, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 2, detector_edge, detector_edge, generator=generator, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        projector = Projector(CHEST_STAND, volume_edge, detector_edge).to(dtype)
        seen, smeared = projector(x.to(dtype)).double(), projector.adjoint(y.to(dtype)).double()
        difference = (seen * y).sum() - (x * smeared).sum()
        assert abs(float(difference)) <= tolerance * float(seen.norm() * y.norm())


def test_autograd_gives_the_adjoint() -> None:
    """The gradient of <A x, y> by x is A^T y."""
    projector = Projector(CHEST_STAND, 12, 15)
    x, y = torch.rand(3, 1, 12, 12, 12, requires_grad=True), torch.rand(3, 2, 15, 15)
    (projector(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, projector.adjoint(y), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["forward", "adjoint", "unproject"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """Each operation's gradient is that of finite differences in float64."""
    projector = Projector(CHEST_STAND, 4, 5).double()
    if name == "forward":
        start, function = torch.rand(2, 1, 4, 4, 4), lambda mu: torch.exp(-0.01 * projector(mu))
    elif name == "adjoint":
        start, function = torch.rand(2, 2, 5, 5), lambda p: projector.adjoint(p) ** 2
    else:
        start, function = torch.rand(1, 2, 5, 5), lambda image: projector.unproject(image, "lateral") ** 2
    assert torch.autograd.gradcheck(function, start.double().requires_grad_())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("volume_edge", "detector_edge"), [(16, 32), (16, 16), (12, 9)])
def test_unprojection_is_a_bilinear_sample_at_each_voxels_shadow(
    view: str, volume_edge: int, detector_edge: int
) -> None:
    """Every voxel of every channel holds what `grid_sample` reads at its analytic (v, u), zero off the detector."""
    geometry = Geometry(1800.0, 1500.0, 384.0, 400.0)  # too small: the shadow of the cube's centre is 461 mm wide
    image = torch.rand(2, 5, detector_edge, detector_edge)
    seen = Projector(geometry, volume_edge, detector_edge).unproject(image, view)

    t = cell_centres(volume_edge, 384.0)
    z, y, x = torch.meshgrid(t, t, t, indexing="ij")
    depth, across = (-y, x) if view == "frontal" else (x, y)
    scale = 1800.0 / (1500.0 + depth) / 200.0
    grid = torch.stack([across * scale, z * scale], dim=-1).float().view(1, -1, volume_edge, 2).expand(2, -1, -1, -1)
    expected = grid_sample(image, grid, padding_mode="zeros", align_corners=False).view_as(seen)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert (expected == 0).any()


@pytest.mark.parametrize("view", VIEWS)
def test_a_bright_pixel_is_unprojected_along_its_ray(view: str) -> None:
    """Voxels that light up lie within a pixel of the ray from the source to that pixel, at every depth."""
    edge, pixel = 32, (20, 9)
    image = torch.zeros(1, 1, 32, 32)
    image[(0, 0, *pixel)] = 1.0
    lit = Projector(CHEST_STAND, edge).unproject(image, view)[0, 0].nonzero()

    source, pixels = rays(CHEST_STAND, 32, view)
    direction = torch.nn.functional.normalize(pixels[pixel] - source, dim=0)
    points = ((lit.flip(1).double() + 0.5) * 12.0 - 192.0) - source
    distances = torch.linalg.cross(points, direction.expand_as(points)).norm(dim=1)
    assert float(distances.max()) < 507.0 / 32 * 2**0.5
    assert len(lit[:, 1 if view == "frontal" else 2].unique()) == edge


def test_samples_of_a_batch_do_not_mix() -> None:
    """Each sample of a batch gives what it gives alone, in all three operations."""
    projector = Projector(CHEST_STAND, 12, 14)
    volume, p, image = torch.rand(3, 1, 12, 12, 12), torch.rand(3, 2, 14, 14), torch.rand(3, 4, 14, 14)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(projector(volume)[one], projector(volume[one]))
        torch.testing.assert_close(projector.adjoint(p)[one], projector.adjoint(p[one]))
        for view in VIEWS:
            torch.testing.assert_close(projector.unproject(image, view)[one], projector.unproject(image[one], view))


def test_autocast_does_not_reach_the_physics() -> None:
    """Under bf16 autocast the line integrals are fp32 and the same, and gradients come back in the caller's type."""
    projector = Projector(CHEST_STAND, 12)
    mu = torch.rand(1, 1, 12, 12, 12).bfloat16().requires_grad_()
    plain = projector(mu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = projector(mu)
        unprojected = projector.unproject(inside, "frontal")
    assert inside.dtype == unprojected.dtype == torch.float32
    assert torch.equal(inside, plain)
    inside.sum().backward()
    assert mu.grad is not None
    assert mu.grad.dtype == torch.bfloat16


def test_checkpoints_hold_no_matrices() -> None:
    """The matrices follow from the config, so they are not part of a model's state."""
    assert Projector(CHEST_STAND, 8).state_dict() == {}
