"""SART moves a volume towards its measurements and touches nothing else."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from app.physics.geometry import VIEWS, Geometry
from app.physics.projector import Projector
from app.physics.sart import sart

GEOMETRY = Geometry(1800.0, 1500.0, 384.0, 507.0)


def two_balls(edge: int) -> Tensor:
    """A ball of water with a denser ball off its centre, (1, 1, D, H, W) in 1/mm."""
    t = (torch.arange(edge) + 0.5 - edge / 2) * (384.0 / edge)
    z, y, x = torch.meshgrid(t, t, t, indexing="ij")
    body = 0.0192 * (x**2 + y**2 + z**2 < 140**2)
    return (body + 0.0192 * ((x - 50) ** 2 + (y + 40) ** 2 + (z - 30) ** 2 < 45**2))[None, None]


def test_the_residual_falls_with_every_sweep() -> None:
    """On consistent line integrals each sweep brings the projection closer, from air to under 3 % in eight.

    Two views do not determine a volume, so its own error stays large; it falls all the same.
    """
    projector, truth = Projector(GEOMETRY, 32), two_balls(32)
    p = projector(truth)
    mu, residuals, errors = torch.zeros_like(truth), [1.0], [1.0]
    for _ in range(8):
        mu = sart(mu, p, projector, 1)
        residuals.append(float((projector(mu) - p).norm() / p.norm()))
        errors.append(float((mu - truth).norm() / truth.norm()))
    assert all(after < before for before, after in pairwise(residuals))
    assert all(after < before for before, after in pairwise(errors))
    assert residuals[-1] < 0.03
    assert errors[-1] < 0.35


def test_sweeps_are_the_same_as_calls() -> None:
    """Three sweeps in one call equal three calls with one sweep."""
    projector, truth = Projector(GEOMETRY, 16), two_balls(16)
    p, stepwise = projector(truth), torch.zeros_like(truth)
    for _ in range(3):
        stepwise = sart(stepwise, p, projector, 1)
    assert torch.equal(sart(torch.zeros_like(truth), p, projector, 3), stepwise)


@pytest.mark.parametrize("view", VIEWS)
def test_row_and_column_sums_are_those_of_the_operator(view: str) -> None:
    """The stored reciprocals times A 1 and A^T 1 are 1 in both views, wherever a ray crosses more than a voxel."""
    projector = Projector(Geometry(1800.0, 1500.0, 384.0, 560.0), 16, 61)
    inverse_rows, inverse_columns = projector.inverse_sums(view)
    rows = projector.project(torch.ones(1, 1, 16, 16, 16), view)[0]
    used = rows > 24.0
    assert ((rows > 0) & ~used).any()
    columns = projector.backproject(used.float()[None], view)[0, 0]
    torch.testing.assert_close(inverse_rows * rows, used.float())
    torch.testing.assert_close(inverse_columns * columns, (columns > 1e-3 * columns.max()).float())


def test_the_truth_stays_where_it_is() -> None:
    """A volume that already explains its line integrals is a fixed point."""
    projector, truth = Projector(GEOMETRY, 16), two_balls(16)
    torch.testing.assert_close(sart(truth, projector(truth), projector, 2), truth, rtol=0, atol=1e-7)


def test_relaxation_scales_the_step() -> None:
    """From air, where nothing is clamped, one frontal step with relaxation 0.25 is a quarter of the full one."""
    projector, truth = Projector(GEOMETRY, 16), two_balls(16)
    p, air, frontal = projector(truth), torch.zeros_like(truth), torch.tensor([[1.0, 0.0]])
    full = sart(air, p, projector, 1, view_mask=frontal)
    torch.testing.assert_close(sart(air, p, projector, 1, relaxation=0.25, view_mask=frontal), 0.25 * full)


def test_masked_views_do_not_move_their_samples() -> None:
    """With a mask per sample a hidden view is never read: its line integrals may be anything."""
    projector, truth = Projector(GEOMETRY, 16), two_balls(16)
    p = projector(truth).repeat(3, 1, 1, 1)
    start = torch.full((3, 1, 16, 16, 16), 0.01)
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    p[0, 1], p[1, 0], p[2] = 99.0, -99.0, 99.0
    moved = sart(start, p, projector, 1, view_mask=mask)

    for sample, view in enumerate(VIEWS):
        inverse_rows, inverse_columns = projector.inverse_sums(view)
        residual = (p[sample : sample + 1, sample] - projector.project(start[:1], view)) * inverse_rows
        alone = (start[:1] + projector.backproject(residual, view) * inverse_columns).clamp(min=0)
        torch.testing.assert_close(moved[sample : sample + 1], alone)
    assert torch.equal(moved[2], start[2])


def test_attenuation_is_never_negative() -> None:
    """Line integrals below those of the start, even negative ones, end at zero; no sweep at all clamps as well."""
    projector = Projector(GEOMETRY, 16)
    start = torch.full((1, 1, 16, 16, 16), 0.01)
    assert float(sart(start, torch.full((1, 2, 16, 16), -5.0), projector, 2).min()) == 0.0
    assert torch.equal(sart(-start, torch.zeros(1, 2, 16, 16), projector, 0), torch.zeros_like(start))


def test_what_no_ray_meets_stays() -> None:
    """Outside a small detector's cone a volume keeps its values, and nothing becomes infinite there."""
    projector = Projector(Geometry(1800.0, 1500.0, 384.0, 200.0), 16)
    start = torch.full((1, 1, 16, 16, 16), 0.01)
    moved = sart(start, torch.full((1, 2, 16, 16), 4.0), projector, 3)
    assert torch.isfinite(moved).all()
    assert torch.equal(moved[..., 0, 0, 0], start[..., 0, 0, 0])
    assert float(moved[..., 8, 8, 8]) > 0.01


def test_noise_on_grazing_rays_stays_bounded() -> None:
    """Rays that barely touch the cube are left out, so an offset of the radiograph cannot blow up its border.

    An offset of 0.5 asks for more than 0.5 / 12 mm only of rays that cross less than a voxel of 12 mm.
    """
    projector = Projector(Geometry(1800.0, 1500.0, 384.0, 700.0), 32, 64)
    air = torch.zeros(1, 1, 32, 32, 32)
    moved = sart(air, torch.full((1, 2, 64, 64), 0.5), projector, 4)
    assert float(moved.max()) < 0.5 / 12.0
