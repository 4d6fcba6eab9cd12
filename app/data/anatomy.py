"""Where the patient lies in a scan, the cube around that point, and whether the cube holds a thorax.

Shapes: volumes (Z, Y, X) and cubes (N, N, N) in HU on the patient's axes; points (z, y, x) in mm from the outer corner
of voxel 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk

from app.data.ct import AIR_HU, CTVolume
from app.errors import DataError

Array = np.ndarray[Any, np.dtype[np.float32]]
Point = tuple[float, float, float]

BODY_HU = -300.0
LUNG_HU = (-950.0, -500.0)
COARSE_MM = 4.0
OPENING_MM = 8.0
LUNG_EDGE = 96
BLOCK = 32


def resample_cube(ct: CTVolume, edge: int, field_of_view_mm: float, centre_mm: Point) -> tuple[Array, float]:
    """Cut the cube of `edge` voxels around `centre_mm` out of a scan, each voxel the average over its own box.

    The scan is read as its linear interpolant, and the average over a box is separable and exact, so that
    downsampling does not alias and upsampling is smooth. Outside the scan there is air.

    Returns:
        The cube (edge, edge, edge) float32 in HU, and the share of it that the scan covers, in [0, 1].
    """
    voxel_mm = field_of_view_mm / edge
    starts = [centre - field_of_view_mm / 2 for centre in centre_mm]
    weights = [
        box_weights(n, spacing, edge, voxel_mm, start)
        for n, spacing, start in zip(ct.hu.shape, ct.spacing_mm, starts, strict=True)
    ]
    coverage = float(np.prod([w.sum() / edge for w in weights]))
    return _average(ct.hu, weights), min(coverage, 1.0)


def box_weights(count: int, spacing_mm: float, edge: int, voxel_mm: float, start_mm: float) -> Array:
    """Weights (edge, count) that average the linear interpolant of `count` samples over `edge` boxes.

    w[k, j] = 1/v int_{a_k}^{b_k} tri((x - x_j) / s) dx, with the half cell outside the outermost samples held constant.
    A row sums to the share of its box that lies inside [0, count * spacing_mm].
    """
    edges = np.clip(start_mm + np.arange(edge + 1) * voxel_mm, 0.0, count * spacing_mm) / spacing_mm
    centres = np.arange(-1, count + 1) + 0.5  # one ghost sample on either side
    u = np.clip(edges[:, None] - centres, -1.0, 1.0)
    integral = np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)
    weights = np.diff(integral, axis=0) * (spacing_mm / voxel_mm)
    weights[:, 1] += weights[:, 0]
    weights[:, -2] += weights[:, -1]
    return np.asarray(weights[:, 1:-1], dtype=np.float32)


def _average(hu: Array, weights: list[Array]) -> Array:
    """Apply one weight matrix per axis (z, y, x); what no sample covers is air."""
    above_air = hu[tuple(_touched(w) for w in weights)] - AIR_HU
    matrices = [w[:, _touched(w)] for w in weights]
    # The axis that shrinks most goes first, so that the others have less to do.
    for axis in sorted(range(3), key=lambda axis: matrices[axis].shape[0] / max(matrices[axis].shape[1], 1)):
        above_air = _along(above_air, matrices[axis], axis)
    return np.asarray(above_air + AIR_HU, dtype=np.float32)


def _along(volume: Array, weights: Array, axis: int) -> Array:
    """Apply weights (M, n) along one axis of n samples, in blocks, since a row touches few samples."""
    parts = []
    flat = volume.reshape(len(volume), volume.shape[1] * volume.shape[2])
    for start in range(0, len(weights), BLOCK):
        span = _touched(weights[start : start + BLOCK])
        rows = weights[start : start + BLOCK, span]
        if axis == 0:
            parts.append((rows @ flat[span]).reshape(len(rows), *volume.shape[1:]))
        else:
            parts.append(rows @ volume[:, span] if axis == 1 else volume[:, :, span] @ rows.T)
    return np.concatenate(parts, axis=axis)


def _touched(weights: Array) -> slice:
    """The range of the samples that have a weight."""
    used = np.flatnonzero(weights.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)


def body_centre(ct: CTVolume) -> Point:
    """Centre of the patient (z, y, x) in mm: of the body's bounding box in the plane, of the scan along z.

    Raises:
        DataError: nothing in the scan is as dense as a body.
    """
    coarse = [max(int(n * s / COARSE_MM), 1) for n, s in zip(ct.hu.shape, ct.spacing_mm, strict=True)]
    sizes = [n * s for n, s in zip(ct.hu.shape, ct.spacing_mm, strict=True)]
    voxels = [size / n for size, n in zip(sizes, coarse, strict=True)]
    weights = [
        box_weights(n, s, m, v, 0.0) for n, s, m, v in zip(ct.hu.shape, ct.spacing_mm, coarse, voxels, strict=True)
    ]
    mask = body_mask(_average(ct.hu, weights), tuple(voxels))
    if not mask.any():
        raise DataError(f"no body in the scan: nothing larger than {OPENING_MM:g} mm above {BODY_HU:g} HU")
    y, x = (np.flatnonzero(mask.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    return sizes[0] / 2, float(y[0] + y[-1] + 1) / 2 * voxels[1], float(x[0] + x[-1] + 1) / 2 * voxels[2]


def body_mask(hu: Array, voxel_mm: tuple[float, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The largest connected piece above -300 HU, (Z, Y, X); an opening first cuts off table and cables."""
    image = sitk.GetImageFromArray((hu > BODY_HU).astype(np.uint8))
    radius = [max(round(OPENING_MM / v), 1) for v in reversed(voxel_mm)]
    opened = sitk.BinaryMorphologicalOpening(image, radius, sitk.sitkBall)
    pieces = sitk.GetArrayFromImage(sitk.ConnectedComponent(opened))
    if not pieces.any():
        return np.zeros(hu.shape, dtype=bool)
    return np.asarray(pieces == np.bincount(pieces.ravel())[1:].argmax() + 1)


def lung_fraction(cube_hu: Array, field_of_view_mm: float) -> float:
    """Share of the body's volume, cavities included, that is lung: -950 to -500 HU, enclosed by the body in its slice.

    A whole thorax has about 0.2, an abdomen 0.01 of bowel gas.
    """
    factor = max(cube_hu.shape[0] // LUNG_EDGE, 1)
    edge = cube_hu.shape[0] // factor
    hu = cube_hu[: edge * factor, : edge * factor, : edge * factor]
    hu = hu.reshape(edge, factor, edge, factor, edge, factor).mean(axis=(1, 3, 5))
    body = body_mask(hu, (field_of_view_mm / edge,) * 3)
    filled = np.stack([_filled(plane) for plane in body])
    lung = filled & ~body & (hu > LUNG_HU[0]) & (hu < LUNG_HU[1])
    return float(lung.sum() / max(int(filled.sum()), 1))


def _filled(plane: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A mask (Y, X) with its holes filled."""
    return np.asarray(sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(plane.astype(np.uint8)))) > 0)
