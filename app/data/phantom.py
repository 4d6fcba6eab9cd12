"""Synthetic thorax patients: phantom (seed, index) is the same analytic scene at every resolution.

Tissue is painted from outside to inside: body, abdomen, mediastinum, lungs and their vessels, heart and great vessels,
bone, texture. A cube of `edge` voxels below 128 is the block average of a finer one, so that coarse cubes are
anti-aliased and agree with the pooled finer ones. Arrays are (z, y, x).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.data.phantom_bones import paint_bones
from app.data.phantom_canvas import Array, Canvas, Region
from app.data.phantom_patient import SIDES, Patient, draw_patient
from app.data.pooling import pool

REVISION = 1
"""Raised whenever the phantoms change, so that prepared cubes of older ones are not taken for them."""

FINE_EDGE = 128
LOWEST_HU, HIGHEST_HU = -1000, 1500
REACH_MM = 600.0
"""Half-edge of a box that holds any patient."""


def phantom_hu(seed: int, index: int, edge: int, field_of_view_mm: float) -> NDArray[np.int16]:
    """The phantom patient's CT in HU, (edge, edge, edge) over a cube of `field_of_view_mm`."""
    factor = max(1, -(-FINE_EDGE // edge))
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    patient = draw_patient(rng)
    canvas = Canvas(edge * factor, field_of_view_mm, patient.pose)
    paint_patient(canvas, patient, rng)
    # Clipped before averaging: what a coarse voxel shows is the average of what fine ones may show.
    np.clip(canvas.hu, LOWEST_HU, HIGHEST_HU, out=canvas.hu)
    return np.rint(pool(canvas.hu, factor, 3)).astype(np.int16)


def paint_patient(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Paint the whole scene; `rng` goes on where the patient's numbers were drawn."""
    body = _paint_body(canvas, patient)
    cage = _cage(canvas, patient)
    lungs = _paint_trunk(canvas, patient, cage)
    _paint_abdomen(canvas, patient, rng)
    _paint_findings(canvas, patient, lungs, rng)
    for side, sign in enumerate(SIDES):
        _paint_vessels(canvas, patient, lungs, sign, patient.vessel_scale[side], rng)
    _paint_heart(canvas, patient)
    _paint_airways(canvas, patient)
    paint_bones(canvas, patient, cage.region, cage.wall_mm)
    _paint_texture(canvas, patient, body, lungs, rng)


class Cage(NamedTuple):
    """The thoracic cage in a region of the canvas."""

    region: Region
    wall_mm: Array
    """Signed distance to the middle of the rib wall, negative inside, (k, j, i)."""


def squircle(u: Array, v: Array, squareness: float) -> Array:
    """Radius-like function, 1 on the boundary: sqrt(u^2 + v^2 - s^2 u^2 v^2) (Fernandez-Guasti), a circle for s = 0."""
    u2, v2 = np.square(u), np.square(v)
    product = u2 * v2
    u2 += v2
    # The product must not win far outside, where it would close the shape again.
    np.minimum(product, 1.0, out=product)
    product *= np.float32(squareness**2)
    u2 -= product
    return np.sqrt(u2, out=u2)


def _smooth(value: Array) -> Array:
    """0 below 0, 1 above 1, a smooth step between."""
    t = np.clip(value, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _paint_body(canvas: Canvas, p: Patient) -> Array:
    """Paint skin, fat and muscle; the share of each voxel inside the body, (N, N, N)."""
    region = canvas.region((-REACH_MM,) * 3, (REACH_MM,) * 3)
    up = _smooth((region.z - np.float32(p.apex_z - 45)) / np.float32(110))
    waist = _smooth((np.float32(p.dome_z[0]) - region.z) / np.float32(120))
    wide = np.float32(p.half_width) * (1 - np.float32(0.42) * up - np.float32(0.05) * waist)
    deep = np.float32(p.half_depth) * (1 - np.float32(0.30) * up - np.float32(0.03) * waist)
    radius = squircle(region.x / wide, (region.y - 12 * up) / deep, p.squareness)
    radius -= 1
    radius *= (wide + deep) / 2
    body = canvas.cover(radius)
    canvas.paint(region.box, body, p.fat_hu)
    for sign in SIDES:
        _paint_shoulder(canvas, p, sign)
    muscle = radius + np.float32(p.fat)
    canvas.paint(region.box, canvas.cover(muscle), p.soft_hu)
    if p.breast:
        for sign in SIDES:
            centre = (sign * 0.48 * p.half_width, -0.82 * p.half_depth, -5.0)
            canvas.ellipsoid(centre, (58 * p.breast, 46 * p.breast, 62 * p.breast), p.fat_hu)
            canvas.ellipsoid(centre, (26 * p.breast, 30 * p.breast, 28 * p.breast), 10.0)
    return (canvas.hu > -700).astype(np.float32)


def _paint_shoulder(canvas: Canvas, p: Patient, sign: int) -> None:
    """A raised arm's root: fat, muscle and the head of the humerus."""
    root = (sign * 0.72 * p.half_width, 18.0, p.apex_z - 12)
    raised = (sign * (0.72 + 0.2 * p.shoulders) * p.half_width, 6.0, p.apex_z + 110)
    canvas.capsule(root, raised, 52 * p.shoulders, 46 * p.shoulders, p.fat_hu)
    canvas.capsule(root, raised, 40 * p.shoulders, 34 * p.shoulders, p.soft_hu)
    head, elbow = (raised[0], raised[1], p.apex_z + 40), (raised[0] * 1.06, 0.0, p.apex_z + 160)
    canvas.capsule(head, elbow, 20 * p.shoulders, 12.0, p.bone_hu)


def _cage(canvas: Canvas, p: Patient) -> Cage:
    """The rib wall as a signed distance: an elliptic tube that closes over the apex of the lungs."""
    half_x, half_y = p.inner()
    bottom = p.dome_z[0] - 110
    region = canvas.region((-half_x - 12, -p.half_depth, bottom), (half_x + 12, p.half_depth, p.apex_z + 22))
    rise = np.clip((region.z - np.float32(p.dome_z[0] + 30)) / np.float32(p.apex_z - p.dome_z[0] - 16), 0, 1.05)
    narrow = np.power(rise, 3.0)
    wide = np.float32(half_x) * (1 - np.float32(0.62) * narrow)
    deep = np.float32(half_y) * (1 - np.float32(0.50) * narrow)
    middle = np.float32(3) + np.float32(26) * np.power(rise, 2.0)
    wall = squircle(region.x / wide, (region.y - middle) / deep, 0.45)
    wall -= 1
    wall *= (wide + deep) / 2
    return Cage(region, wall)


def _paint_trunk(canvas: Canvas, p: Patient, cage: Cage) -> Array:
    """Paint the inside of the cage: abdomen below the diaphragm, mediastinum, lungs; the lungs' share, (N, N, N)."""
    region, wall = cage
    inside = canvas.cover(wall + np.float32(4.0))
    x, y, z = region.x, region.y, region.z
    spine_x, spine_y = p.spine_at(z)
    dome = _diaphragm(p, x, y)
    above = canvas.cover(dome - z)
    canvas.paint(region.box, inside * above, p.mediastinum_hu)
    canvas.paint(region.box, inside * (1 - above), p.liver_hu - 15)
    apex = canvas.cover((wall + np.float32(8)) + np.maximum(z - np.float32(p.apex_z - 25), 0) * np.float32(0.8))
    low = np.clip((np.float32(10.0) - z) / np.float32(80), 0, 1)
    half = np.float32(p.mediastinum_half) * (1 + np.float32(0.25) * low)
    # Lungs meet in front of the heart and reach back beside the spine: the mediastinum is an hourglass in each slice.
    depth = (y + np.float32(0.16 * p.half_depth)) / np.float32(0.62 * p.half_depth)
    half = half * (np.float32(1.08) - np.float32(0.72) * np.clip(np.square(depth), 0, 1))
    half_spine = np.float32(p.vertebra_half[0] + 6) * np.clip((y - spine_y + np.float32(26)) / 20, 0, 1)
    half = np.maximum(half, half_spine)
    between = canvas.cover(half - np.abs(x - spine_x * np.float32(0.7)))
    share = inside * above
    share *= apex
    share *= between
    lungs = np.zeros_like(canvas.hu)
    lungs[region.box] = share
    air = np.where(x < 0, np.float32(p.lung_hu[0]), np.float32(p.lung_hu[1]))
    air += np.float32(p.lung_gradient) * (y / np.float32(p.half_depth))
    canvas.paint(region.box, share, air)
    return lungs


def _diaphragm(p: Patient, x: Array, y: Array) -> Array:
    """Height of the diaphragm in mm: one dome on each side, falling to the ribs and most of all to the back."""
    half_x, half_y = p.inner()
    domes = []
    for side, sign in enumerate(SIDES):
        across = (x - np.float32(sign * 0.5 * half_x)) / np.float32(0.55 * half_x)
        along = (y + np.float32(0.15 * half_y)) / np.float32(0.85 * half_y)
        fall = np.square(across)
        fall *= np.float32(0.7)
        fall += np.square(along)
        domes.append(np.float32(p.dome_z[side]) - np.float32(p.dome_drop) * fall)
    return np.asarray(np.where(x < 0, domes[0], domes[1]))


def _paint_abdomen(canvas: Canvas, p: Patient, rng: np.random.Generator) -> None:
    """Liver, stomach with its gas bubble, spleen and fat below the diaphragm."""
    half_x, half_y = p.inner()
    right, left = p.dome_z
    fat_z = min(right, left) - 95 - rng.uniform(0, 30)
    canvas.ellipsoid((0.0, -10.0, fat_z - 40), (0.86 * half_x, 0.8 * half_y, 70.0), p.fat_hu)
    canvas.ellipsoid((-0.42 * half_x, 0.0, right - 62), (0.52 * half_x, 0.8 * half_y, 70.0), p.liver_hu)
    canvas.ellipsoid((0.66 * half_x, 0.35 * half_y, left - 60), (26.0, 38.0, 44.0), p.liver_hu - 5)
    canvas.ellipsoid((0.36 * half_x, -0.25 * half_y, left - 52), (40.0, 36.0, 36.0), 25.0)
    gas = 8 + 20 * p.stomach_gas
    canvas.ellipsoid((0.36 * half_x, -0.42 * half_y, left - 46), (1.25 * gas, 0.7 * gas, 0.9 * gas), -950.0)
    for sign in SIDES:
        spine_x, spine_y = p.spine_at(right - 120)
        canvas.ellipsoid((float(spine_x) + sign * 58, float(spine_y) - 4, right - 130), (27.0, 25.0, 50.0), 40.0)


def _paint_findings(canvas: Canvas, p: Patient, lungs: Array, rng: np.random.Generator) -> None:
    """Nodules, a mass, an effusion with its meniscus: whatever the patient has."""
    half_x, half_y = p.inner()
    sizes = [float(rng.uniform(3, 14)) for _ in range(p.nodules)] + ([p.mass] if p.mass else [])
    for size in sizes:
        sign = SIDES[int(rng.integers(0, 2))]
        place = (sign * rng.uniform(0.35, 0.8) * half_x, rng.uniform(-0.5, 0.5) * half_y, rng.uniform(-60, 75))
        stretch = (size, size * float(rng.uniform(0.75, 1.2)), size * float(rng.uniform(0.75, 1.2)))
        canvas.ellipsoid(place, stretch, float(rng.uniform(10, 70)), mask=lungs)
    for side, sign in enumerate(SIDES):
        if p.effusion[side]:
            _paint_effusion(canvas, p, lungs, sign, p.dome_z[side] - p.dome_drop + p.effusion[side])


def _paint_effusion(canvas: Canvas, p: Patient, lungs: Array, sign: int, level: float) -> None:
    """Fluid in one lung below a level that climbs along the outer and the back wall."""
    half_x, _ = p.inner()
    low, high = (-p.half_width, 0.0) if sign < 0 else (0.0, p.half_width)
    region = canvas.region((low, -p.half_depth, level - 150), (high, p.half_depth, level + 90))
    climb = np.square(np.clip(np.abs(region.x) / np.float32(half_x), 0, 1)) * 45 + region.y * np.float32(0.25)
    share = canvas.cover(region.z - (np.float32(level) + climb)) * lungs[region.box] * (region.x * sign > 0)
    canvas.paint(region.box, share, 12.0)
    lungs[region.box] *= 1 - share


def _paint_vessels(canvas: Canvas, p: Patient, lungs: Array, sign: int, scale: float, rng: np.random.Generator) -> None:
    """A branching tree from the hilum into one lung, each child a little thinner than r / 2^(1/3) (Murray's law)."""
    half_x, half_y = p.inner()
    hilum = np.array([sign * (p.mediastinum_half + 8), 4.0, 12.0])
    main = np.array([sign * 10.0, 0.0, 14.0])
    canvas.capsule(_point(main), _point(hilum), 10.0, 9.0, p.blood_hu)
    grown = [(hilum, aim / np.linalg.norm(aim), 6.4 * scale, 34.0) for aim in _lobes(sign, rng)]
    for _ in range(5):
        tips = []
        for start, heading, radius, length in grown:
            stretch = length * rng.uniform(0.75, 1.2)
            end = start + heading * stretch
            canvas.capsule(_point(start), _point(end), radius, 0.86 * radius, p.blood_hu, mask=lungs)
            if abs(end[0]) > half_x or abs(end[1]) > half_y or radius < 0.7:
                continue
            side = rng.normal(size=3)
            side -= heading * (side @ heading)
            side *= rng.uniform(0.45, 0.75) / np.linalg.norm(side)
            for child in (heading + side, heading - side * rng.uniform(0.5, 1.0)):
                tips.append((end, child / np.linalg.norm(child), 0.76 * radius, 0.8 * length))
        grown = tips


def _lobes(sign: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Directions of the first branches: up, outwards to the front, down, down to the back."""
    aims = [(0.45, -0.15, 1.0), (0.9, -0.6, 0.15), (0.45, 0.25, -1.0), (0.7, 0.7, -0.35)]
    return [np.array([sign * x, y, z]) + rng.normal(0, 0.14, 3) for x, y, z in aims]


def _point(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def _paint_heart(canvas: Canvas, p: Patient) -> None:
    """Heart with its long axis to the left, down and forward; great vessels; aorta left of the spine."""
    axis = np.array([0.74, -0.42, -0.52])
    axis /= np.linalg.norm(axis)
    across = np.cross(axis, [0.0, 0.0, 1.0])
    across /= np.linalg.norm(across)
    axes = np.stack([axis, across, np.cross(axis, across)])
    left, forward, over = p.heart_centre
    centre = (left, forward * p.half_depth, max(p.dome_z) + over - 4)
    canvas.ellipsoid(centre, p.heart, 35.0, axes=axes)
    chambers = (0.72 * p.heart[0], 0.7 * p.heart[1], 0.7 * p.heart[2])
    canvas.ellipsoid(centre, chambers, p.blood_hu, axes=axes)
    canvas.ellipsoid((-22.0, centre[1] + 14, centre[2] + 8), (26.0, 30.0, 34.0), p.blood_hu)
    r, top = p.aorta_radius, centre[2] + 88
    spine = [(z, *(float(value) for value in p.spine_at(z))) for z in np.linspace(top - 12, p.dome_z[1] - 140, 9)]
    descending = [(x + 17 + 0.35 * r, y - p.vertebra_half[1] - 0.35 * r, float(z)) for z, x, y in spine]
    arch = [(-8.0, centre[1] + 8, centre[2] + 30), (-14.0, centre[1] + 2, top - 22), (-6.0, centre[1] + 14, top)]
    canvas.tube([*arch, (8.0, 10.0, top + 5), *descending], r, p.blood_hu)
    canvas.tube([(12.0, centre[1], centre[2] + 38), (14.0, -8.0, centre[2] + 58)], 0.95 * r, p.blood_hu)
    canvas.tube([(-24.0, centre[1] + 10, centre[2] + 20), (-24.0, -12.0, p.apex_z - 25)], 0.7 * r, p.blood_hu)
    for x, reach in ((-18.0, -26.0), (2.0, 6.0), (14.0, 28.0)):
        canvas.capsule((x, -4.0, top), (reach, -6.0, p.apex_z + 40), 5.5, 5.0, p.blood_hu)


def _paint_airways(canvas: Canvas, p: Patient) -> None:
    """Trachea, carina and the two main bronchi."""
    carina = (1.0, 8.0, max(p.dome_z) + p.heart_centre[2] + 66)
    canvas.capsule((0.0, -2.0, p.apex_z + 70), carina, 8.5, 8.0, -990.0)
    canvas.capsule(carina, (-p.mediastinum_half - 12, 12.0, carina[2] - 30), 7.0, 5.0, -980.0)
    canvas.capsule(carina, (p.mediastinum_half + 18, 14.0, carina[2] - 34), 6.5, 4.5, -980.0)


def _paint_texture(canvas: Canvas, p: Patient, body: Array, lungs: Array, rng: np.random.Generator) -> None:
    """Add smooth random waves inside the body, stronger in the lungs; none is shorter than 14 mm."""
    waves = 24
    axis = ((np.arange(canvas.edge) + 0.5) - canvas.edge / 2) * canvas.voxel_mm
    lengths = rng.uniform(14.0, 60.0, (3, waves))
    phases = rng.uniform(0.0, 2 * np.pi, (3, waves))
    z, y, x = (np.cos(axis[:, None] * (2 * np.pi / lengths[i]) + phases[i]).astype(np.float32) for i in range(3))
    plane = (z[:, None, :] * y[None, :, :]).reshape(-1, waves)
    field = (plane @ x.T).reshape(canvas.hu.shape)
    gain = lungs * np.float32(2.0)
    gain += body
    gain *= np.float32(p.texture_hu * (8 / waves) ** 0.5)
    canvas.hu += gain * field
