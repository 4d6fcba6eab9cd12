"""Separable cone-beam projector of a cube onto square detectors, its adjoint, and the unprojection of images.

Source and detector lie on an axis of the cube, so the plane of voxels at depth c_k is magnified by SDD / (SOD + c_k)
as a whole, and bilinear interpolation in it is one matrix per image axis:

    P = w sum_k A_k V_k A_k^T,     A_k[i, j] = hat(s_i (SOD + c_k) / SDD - t_j),     w(v, u) = dx |ray| / SDD

with pixel centres s_i, voxel centres t_j, voxel edge dx, |ray|^2 = SDD^2 + u^2 + v^2 and hat(d) = max(0, 1 - |d| / dx).
Beyond the centre of the last voxel the value falls linearly to zero within one voxel (`grid_sample` with zeros padding
and align_corners=False); along the beam the sum over planes is the integral of the same hat functions.

Shapes: B batch, C channels; D, H, W = N, N, N the cube's z, y, x; Nv = Nu the detector's rows (z) and columns;
planes (N depths along the beam, N z, B, N transverse): the order in which one batched product and one GEMM do a view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from app.physics.geometry import VIEWS, Geometry


def hat_weights(positions: Tensor, nodes: int) -> Tensor:
    """Linear interpolation at `positions` (..., P) in units of node numbers: weights (..., P, nodes) in float32.

    Positions are float64. Nodes that do not exist count as zeros.
    """
    weights = torch.zeros(*positions.shape, nodes + 2)
    inside = positions.clamp(-1, nodes)
    lower = inside.floor().clamp(max=nodes - 1)
    fraction = (inside - lower).unsqueeze(-1)
    index = (lower.long() + 1).unsqueeze(-1)
    weights.scatter_(-1, index, (1 - fraction).float())
    weights.scatter_(-1, index + 1, fraction.float())
    return weights[..., 1:-1].contiguous()


def centres(count: int, edge_mm: float) -> Tensor:
    """Centres (count,) in mm, float64, of equal cells that fill `edge_mm` around the isocentre."""
    return (torch.arange(count, dtype=torch.float64) + 0.5 - count / 2) * (edge_mm / count)


class Projector(nn.Module):
    """Line integrals of a cube in both views, linear, in fp32 whatever autocast says.

    The buffers hold three cubes' worth of numbers; a call needs about two more per sample.
    """

    to_detector: Tensor
    to_voxels: Tensor
    path_mm: Tensor
    inverse_rows: Tensor
    inverse_columns: Tensor

    def __init__(self, geometry: Geometry, volume_edge: int, detector_edge: int | None = None) -> None:
        """Prepare the matrices of a cube of `volume_edge` voxels and a detector of `detector_edge` pixels."""
        super().__init__()
        self.geometry = geometry
        self.volume_edge = volume_edge
        self.detector_edge = detector_edge or volume_edge
        voxels_mm = centres(volume_edge, geometry.field_of_view_mm)
        pixels_mm = centres(self.detector_edge, geometry.detector_mm)
        voxel_mm = geometry.field_of_view_mm / volume_edge
        pixel_mm = geometry.detector_mm / self.detector_edge
        sdd = geometry.source_to_detector_mm
        magnification = sdd / (geometry.source_to_isocenter_mm + voxels_mm)

        in_plane_mm = pixels_mm / magnification[:, None]
        a = hat_weights(in_plane_mm / voxel_mm + (volume_edge - 1) / 2, volume_edge)
        on_detector_mm = voxels_mm * magnification[:, None]
        b = hat_weights(on_detector_mm / pixel_mm + (self.detector_edge - 1) / 2, self.detector_edge)
        ray_mm = (sdd**2 + pixels_mm[:, None] ** 2 + pixels_mm**2).sqrt()

        self._constant("to_detector", a.transpose(1, 2).contiguous())  # (N depths, N voxels, Nu): A_k transposed
        self._constant("to_voxels", b)  # (N depths, N voxels, Nu)
        self._constant("path_mm", (voxel_mm * ray_mm / sdd).float())  # (Nv, Nu): w
        self._add_inverse_sums(voxel_mm)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def _add_inverse_sums(self, voxel_mm: float) -> None:
        """SART's 1 / (A 1) and 1 / (A^T 1), zero where a sum is too small to divide by.

        One view's sums do for both: each sees the same cube, turned. They are kept in the lateral order, where the
        depth is x. Rays that cross less than a voxel are left out.
        """
        n = self.volume_edge
        lateral = VIEWS.index("lateral")
        rows = self.project(torch.ones(1, 1, n, n, n), VIEWS[lateral])
        used = rows > voxel_mm
        columns = self.backproject(used.float(), VIEWS[lateral])
        hit = columns > 1e-3 * columns.max()
        self._constant("inverse_rows", torch.where(used, 1 / rows, 0.0)[0])  # (Nv, Nu)
        self._constant("inverse_columns", torch.where(hit, 1 / columns, 0.0)[0, 0])  # (D, H, W), lateral

    def forward(self, mu: Tensor) -> Tensor:
        """Line integrals (B, 2, Nv, Nu), dimensionless, of attenuation `mu` (B, 1, D, H, W) in 1/mm."""
        return torch.stack([self.project(mu, view) for view in VIEWS], dim=1)

    def adjoint(self, p: Tensor) -> Tensor:
        """Exact transpose of `forward`: images (B, 2, Nv, Nu) smeared back into a cube (B, 1, D, H, W)."""
        return self.backproject(p[:, 0], VIEWS[0]) + self.backproject(p[:, 1], VIEWS[1])

    def project(self, mu: Tensor, view: str) -> Tensor:
        """One view of `forward`: P = w sum_k A_k V_k A_k^T, (B, Nv, Nu) from (B, 1, D, H, W)."""
        n, m, batch = self.volume_edge, self.detector_edge, len(mu)
        with torch.autocast(mu.device.type, enabled=False):
            a = _in_view_order(self.to_detector, view)
            planes = _to_planes(mu.to(a.dtype), view).reshape(n, n * batch, n)
            columns = torch.bmm(planes, a)  # V_k A_k^T: (k, z B, u)
            image = a.view(n * n, m).t() @ columns.view(n * n, batch * m)  # sum over k and z: (v, B u)
            return image.view(m, batch, m).transpose(0, 1) * self.path_mm

    def backproject(self, p: Tensor, view: str) -> Tensor:
        """Exact transpose of `project`: sum over k of A_k^T (w P) A_k, (B, 1, D, H, W) from (B, Nv, Nu)."""
        n, m, batch = self.volume_edge, self.detector_edge, len(p)
        with torch.autocast(p.device.type, enabled=False):
            a = _in_view_order(self.to_detector, view)
            image = (p.to(a.dtype) * self.path_mm).transpose(0, 1).reshape(m, batch * m)
            columns = (a.view(n * n, m) @ image).view(n, n * batch, m)
            planes = torch.bmm(columns, a.transpose(1, 2)).view(n, n, batch, n)
            return _from_planes(planes, view).unsqueeze(1)

    def unproject(self, image: Tensor, view: str) -> Tensor:
        """Bilinear sample of `image` (B, C, Nv, Nu) where each voxel's ray meets the detector: (B, C, D, H, W).

        Zero outside the detector; fp32, any number of channels.
        """
        n, m, (batch, channels) = self.volume_edge, self.detector_edge, image.shape[:2]
        maps = batch * channels
        with torch.autocast(image.device.type, enabled=False):
            b = _in_view_order(self.to_voxels, view)
            rows = image.to(b.dtype).reshape(maps, m, m).transpose(0, 1).reshape(m, maps * m)
            columns = (b.view(n * n, m) @ rows).view(n, n * maps, m)
            planes = torch.bmm(columns, b.transpose(1, 2)).view(n, n, maps, n)
            return _from_planes(planes, view).view(batch, channels, n, n, n)

    def inverse_sums(self, view: str) -> tuple[Tensor, Tensor]:
        """1 / (A 1) of one view (Nv, Nu) in 1/mm and 1 / (A^T 1) (D, H, W) in 1/mm; zero where SART skips."""
        if view == "lateral":
            return self.inverse_rows, self.inverse_columns
        return self.inverse_rows, self.inverse_columns.transpose(1, 2).flip(1)


def _in_view_order(matrices: Tensor, view: str) -> Tensor:
    """Matrices (N depths by rising c, ...) in the order of the array axis: frontal depth is -y, lateral depth is +x."""
    return matrices.flip(0) if view == "frontal" else matrices


def _to_planes(volume: Tensor, view: str) -> Tensor:
    """Planes (k, z, B, transverse), a strided look at `volume` (B, 1, D, H, W), its transverse axis the innermost.

    For the lateral view each slice is turned first: the matrix products are several times faster along memory, and
    turned slice by slice a volume stays in the cache.
    """
    volume = volume.squeeze(1)
    return (volume.transpose(2, 3).contiguous() if view == "lateral" else volume).permute(2, 1, 0, 3)


def _from_planes(planes: Tensor, view: str) -> Tensor:
    """Volume (B, D, H, W), contiguous, from planes (k, z, B, transverse)."""
    order = {"frontal": (2, 1, 0, 3), "lateral": (2, 1, 3, 0)}[view]
    return planes.permute(order).contiguous()
