"""The bones of a synthetic thorax: ribs, spine, sternum, collar bones and shoulder blades."""

from __future__ import annotations

import numpy as np

from app.data.phantom_canvas import Array, Canvas, Region
from app.data.phantom_patient import SIDES, Patient


def paint_bones(canvas: Canvas, p: Patient, region: Region, wall_mm: Array) -> None:
    """Paint all bones; `wall_mm` is the signed distance to the middle of the rib wall in `region`."""
    _paint_ribs(canvas, p, region, wall_mm)
    _paint_spine(canvas, p)
    _paint_sternum(canvas, p)
    for sign in SIDES:
        _paint_shoulder_bones(canvas, p, sign)


def _paint_ribs(canvas: Canvas, p: Patient, region: Region, wall_mm: Array) -> None:
    """Oblique rings in the rib wall, high at the spine and low at the breast bone, where they turn to cartilage."""
    thick = 0.62 * p.rib_half
    near = np.abs(wall_mm) < thick + canvas.voxel_mm
    near &= np.broadcast_to(region.z > p.apex_z - p.rib_pitch * (p.ribs + 3.5), near.shape)
    at = np.nonzero(near)
    x, y, z = region.x[at], region.y[at], np.broadcast_to(region.z, near.shape)[at]
    ahead = np.float32(p.spine_depth) - y
    phase = (np.float32(p.apex_z + 2) - z - np.float32(p.rib_slope) * ahead) / np.float32(p.rib_pitch)
    number = np.rint(phase)
    aside = np.abs(phase - number) * np.float32(p.rib_pitch)
    shell = canvas.cover(np.abs(wall_mm[at]) - np.float32(thick))
    share = shell * canvas.cover(aside - np.float32(p.rib_half))
    # Lower ribs end further back; the last two float.
    front = np.where(number < 7, -p.half_depth, -0.55 * p.half_depth + (number - 7) * np.float32(0.28 * p.half_depth))
    share *= (number >= 0) & (number < p.ribs) & (y > front) & (np.abs(x) > 7)
    cortex = canvas.cover(np.float32(0.45 * p.rib_half) - np.maximum(aside, np.abs(wall_mm[at])))
    hu = np.float32(p.bone_hu + 120) + cortex * np.float32(260)
    hu = np.where((y < -0.5 * p.half_depth) & (np.abs(x) < 0.62 * p.half_width), np.float32(115), hu)
    view = canvas.hu[region.box]
    view[at] += share * (hu - view[at])


def _paint_spine(canvas: Canvas, p: Patient) -> None:
    """Vertebral bodies and discs along a bent line, the canal behind them, arches and spinous processes."""
    half_x, half_y = p.vertebra_half
    region = canvas.region((-48.0, -60.0, -400.0), (48.0, p.half_depth - p.fat, 400.0))
    centre_x, centre_y = p.spine_at(region.z)
    x, y = region.x - centre_x, region.y - centre_y
    phase = region.z / np.float32(p.vertebra_pitch)
    level = np.abs(phase - np.rint(phase)) * np.float32(p.vertebra_pitch)
    disc = canvas.cover(np.float32(p.vertebra_pitch / 2 - 2.6) - level)
    plate = np.clip((level - np.float32(p.vertebra_pitch / 2 - 6.5)) / 4, 0, 1)
    neck = np.float32(0.3) * np.clip((region.z - np.float32(p.apex_z - 20)) / 60, 0, 1)
    waist = np.float32(1.0) - neck - np.float32(0.10) * (1 - np.clip(level / np.float32(p.vertebra_pitch / 2), 0, 1))
    radius = np.sqrt(np.square(x / (np.float32(half_x) * waist)) + np.square(y / (np.float32(half_y) * waist)))
    distance = (radius - 1) * np.float32((half_x + half_y) / 2)
    body = canvas.cover(distance)
    rim = canvas.cover(np.float32(-2.5) - distance)
    bone = np.float32(p.bone_hu) + np.float32(240) * np.maximum(rim, plate)
    canvas.paint(region.box, body, bone + disc * (np.float32(95) - bone))
    behind = y - np.float32(half_y + 9)
    arch = np.sqrt(np.square(x) + np.square(behind))
    laminae = canvas.cover(arch - np.float32(16)) * (1 - body) * (1 - disc * np.float32(0.7))
    canvas.paint(region.box, laminae, p.bone_hu + 190)
    canvas.paint(region.box, canvas.cover(arch - np.float32(9)) * (1 - body), 20.0)
    # Spinous processes point down and back, transverse ones sideways.
    slanted = (region.z + np.float32(0.7) * behind) / np.float32(p.vertebra_pitch)
    slanted = np.abs(slanted - np.rint(slanted)) * np.float32(p.vertebra_pitch)
    process = np.maximum(np.maximum(np.abs(x) - np.float32(3.2), slanted - 6), np.abs(behind - 23) - np.float32(11))
    canvas.paint(region.box, canvas.cover(process), p.bone_hu + 160)
    sideways = np.maximum(np.abs(np.abs(x) - 26) - 11, np.maximum(np.abs(behind + 2) - np.float32(5), level - 6))
    canvas.paint(region.box, canvas.cover(sideways), p.bone_hu + 140)


def _paint_sternum(canvas: Canvas, p: Patient) -> None:
    """A flat bone behind the front wall, leaning back towards the neck."""
    _, half_y = p.inner()
    bottom, top = p.dome_z[0] + 25, p.apex_z - 22
    region = canvas.region((-28.0, -p.half_depth, bottom - 8), (28.0, 20.0, top + 8))
    rise = np.clip((region.z - np.float32(p.dome_z[0] + 30)) / np.float32(p.apex_z - p.dome_z[0] - 16), 0, 1)
    front = np.float32(3 - half_y) + np.float32(26) * np.square(rise) + np.float32(0.5 * half_y) * np.power(rise, 3.0)
    wide = np.float32(13) + np.float32(10) * np.clip((region.z - np.float32(top - 45)) / 45, 0, 1)
    flat = np.sqrt(np.square(region.x / wide) + np.square((region.y - front) / np.float32(5.5))) - 1
    end = np.abs(region.z - np.float32((top + bottom) / 2)) - np.float32((top - bottom) / 2)
    distance = np.maximum(flat * np.float32(6.5), end)
    canvas.paint(region.box, canvas.cover(distance.astype(np.float32)), p.bone_hu + 60)


def _paint_shoulder_bones(canvas: Canvas, p: Patient, sign: int) -> None:
    """Collar bone and shoulder blade of one side."""
    half_x, half_y = p.inner()
    neck = (sign * 20.0, -0.34 * half_y, p.apex_z - 18)
    middle = (sign * 0.42 * half_x, -0.42 * half_y, p.apex_z + 4)
    acromion = (sign * 0.86 * p.half_width, 0.1 * half_y, p.apex_z + 34 * p.shoulders)
    canvas.tube([neck, middle, acromion], 6.0, p.bone_hu + 180)
    turn = np.deg2rad(34.0) * sign
    along = np.array([0.12 * sign, 0.0, 1.0])
    along /= np.linalg.norm(along)
    flat = np.array([np.cos(turn), -np.sin(turn), 0.0])
    flat -= along * (flat @ along)
    flat /= np.linalg.norm(flat)
    axes = np.stack([flat, np.cross(along, flat), along])
    blade = (sign * 0.66 * p.half_width, 0.62 * p.half_depth, p.apex_z - 55)
    canvas.ellipsoid(blade, (42.0, 4.2, 66.0), p.bone_hu + 90, axes=axes)
