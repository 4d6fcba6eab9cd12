"""A voxel canvas onto which analytic shapes are painted with anti-aliased edges.

Shapes are given in mm in the patient's frame (x to the left, y posterior, z superior); the canvas knows how that frame
lies in the cube. Arrays are (z, y, x) or boxes of it. A shape's edge is a ramp one voxel wide, so that the same scene
at half the resolution is close to the average of its 2^3 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Pose:
    """How the patient lies in the cube: shift (x, y, z) in mm, turn about z in radians, lean in mm per mm of z."""

    shift_mm: Point = (0.0, 0.0, 0.0)
    turn: float = 0.0
    lean_x: float = 0.0
    lean_y: float = 0.0

    def to_cube(self, point: Point) -> Point:
        """A point of the patient's frame in the frame of the cube, in mm."""
        z = point[2]
        x, y = point[0] + self.lean_x * z, point[1] + self.lean_y * z
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return (
            float(cos * x - sin * y + self.shift_mm[0]),
            float(sin * x + cos * y + self.shift_mm[1]),
            float(z + self.shift_mm[2]),
        )


class Region(NamedTuple):
    """A box of the canvas with the patient coordinates of its voxels; z is (k, 1, 1), y and x are (k, j, i)."""

    box: Box
    z: Array
    y: Array
    x: Array


class Canvas:
    """A cube of HU, air at first, of `edge` voxels over `field_of_view_mm`."""

    def __init__(self, edge: int, field_of_view_mm: float, pose: Pose) -> None:
        self.edge = edge
        self.voxel_mm = field_of_view_mm / edge
        self.pose = pose
        self.hu: Array = np.full((edge, edge, edge), -1000.0, np.float32)
        axis = ((np.arange(edge) + 0.5) - edge / 2) * self.voxel_mm
        x, y = axis[None, :] - pose.shift_mm[0], axis[:, None] - pose.shift_mm[1]
        cos, sin = np.cos(pose.turn), np.sin(pose.turn)
        self._x: Array = (cos * x + sin * y).astype(np.float32)
        self._y: Array = (cos * y - sin * x).astype(np.float32)
        self._z: Array = (axis - pose.shift_mm[2]).astype(np.float32)[:, None, None]

    def region(self, low: Point, high: Point) -> Region:
        """The voxels that a patient-frame box (x, y, z) from low to high, in mm, may touch; possibly none."""
        corners = np.array([self.pose.to_cube((x, y, z)) for x, y, z in product(*zip(low, high, strict=True))])
        first = np.floor((corners.min(0) / self.voxel_mm) + self.edge / 2 - 1.0).astype(int).clip(0, self.edge)
        last = np.ceil((corners.max(0) / self.voxel_mm) + self.edge / 2 + 1.0).astype(int).clip(0, self.edge)
        box = (slice(first[2], last[2]), slice(first[1], last[1]), slice(first[0], last[0]))
        z = self._z[box[0]]
        x, y = self._x[box[1:]][None], self._y[box[1:]][None]
        return Region(box, z, y - np.float32(self.pose.lean_y) * z, x - np.float32(self.pose.lean_x) * z)

    def cover(self, distance_mm: Array) -> Array:
        """Share of a voxel inside a shape whose surface is at this signed distance (negative inside), in [0, 1]."""
        share = distance_mm * np.float32(-1.0 / self.voxel_mm)
        share += np.float32(0.5)
        return np.clip(share, 0.0, 1.0, out=share)

    def paint(self, box: Box, share: Array, hu: float | Array) -> None:
        """Mix `hu` into a box of the canvas: v + share (hu - v)."""
        view = self.hu[box]
        view += share * (np.float32(hu) - view if isinstance(hu, float) else hu - view)

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        hu: float,
        *,
        axes: NDArray[np.float64] | None = None,
        mask: Array | None = None,
    ) -> None:
        """Paint an ellipsoid; `axes` (3, 3) has its half-axes' directions as rows, `mask` is a cube of shares."""
        reach = max(radii) if axes is not None else None
        rx, ry, rz = (reach, reach, reach) if reach is not None else radii
        region = self.region(
            (centre[0] - rx, centre[1] - ry, centre[2] - rz), (centre[0] + rx, centre[1] + ry, centre[2] + rz)
        )
        offsets = (region.x - np.float32(centre[0]), region.y - np.float32(centre[1]), region.z - np.float32(centre[2]))
        # Below the voxel's size a shape keeps its volume, not its edge.
        drawn = [max(radius, 0.6 * self.voxel_mm) for radius in radii]
        weight = np.float32(np.prod([radius / wide for radius, wide in zip(radii, drawn, strict=True)]))
        if min(drawn) < self.voxel_mm:
            # The edge's ramp makes a sphere larger: the mean of (r + t)^3 over |t| < h/2 is r^3 + r h^2 / 4.
            weight /= np.float32(1 + (self.voxel_mm / float(np.mean(drawn))) ** 2 / 4)
        total = np.zeros(region.x.shape, np.float32)
        for row, radius in zip(np.eye(3) if axes is None else axes, drawn, strict=True):
            along = sum(np.float32(part / radius) * offset for part, offset in zip(row, offsets, strict=True) if part)
            total += along * along
        np.sqrt(total, out=total)
        total -= np.float32(1.0)
        total *= np.float32(min(drawn) * 0.5 + sum(drawn) / 6)
        self._paint_masked(region.box, self.cover(total) * weight, hu, mask)

    def capsule(
        self, start: Point, end: Point, radius_start: float, radius_end: float, hu: float, *, mask: Array | None = None
    ) -> None:
        """Paint a tapered tube with round ends."""
        widest = max(radius_start, radius_end)
        low = [min(a, b) - widest for a, b in zip(start, end, strict=True)]
        high = [max(a, b) + widest for a, b in zip(start, end, strict=True)]
        region = self.region((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        if min(part.stop - part.start for part in region.box) <= 0:
            return
        axis = np.subtract(end, start)
        squared = float(axis @ axis) or 1.0
        dx, dy, dz = region.x - np.float32(start[0]), region.y - np.float32(start[1]), region.z - np.float32(start[2])
        along = dx * np.float32(axis[0] / squared)
        along += dy * np.float32(axis[1] / squared)
        along += dz * np.float32(axis[2] / squared)
        np.clip(along, 0.0, 1.0, out=along)
        dx -= along * np.float32(axis[0])
        dy -= along * np.float32(axis[1])
        dz = dz - along * np.float32(axis[2])
        distance = np.sqrt(dx * dx + dy * dy + dz * dz)
        mean = (radius_start + radius_end) / 2
        wide = max(mean, 0.5 * self.voxel_mm)
        distance -= along * np.float32(radius_end - radius_start)
        distance -= np.float32(radius_start + wide - mean)
        self._paint_masked(region.box, self.cover(distance) * np.float32((mean / wide) ** 2), hu, mask)

    def tube(self, points: list[Point], radius: float, hu: float) -> None:
        """Paint capsules of one radius along a line of points."""
        for start, end in pairwise(points):
            self.capsule(start, end, radius, radius, hu)

    def _paint_masked(self, box: Box, share: Array, hu: float, mask: Array | None) -> None:
        self.paint(box, share if mask is None else share * mask[box], float(hu))
