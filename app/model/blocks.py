"""Building blocks of the backbone.

Shapes: B batch, C channels, D H W grid (z, y, x), T tokens, E conditioning width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOURIER_FREQUENCIES = 32


def space_to_depth(x: Tensor, patch: int) -> Tensor:
    """Fold voxel blocks into channels: (B, C, D, H, W) -> (B, C patch^3, D/patch, H/patch, W/patch)."""
    if patch == 1:
        return x
    b, c, d, h, w = x.shape
    x = x.reshape(b, c, d // patch, patch, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * patch**3, d // patch, h // patch, w // patch)


def depth_to_space(x: Tensor, patch: int) -> Tensor:
    """Unfold channels into voxel blocks, the inverse of `space_to_depth`."""
    if patch == 1:
        return x
    b, c, d, h, w = x.shape
    x = x.reshape(b, c // patch**3, patch, patch, patch, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // patch**3, d * patch, h * patch, w * patch)


def zero(layer: nn.Module) -> None:
    """Set the weights and the bias of a layer to zero: a branch that ends in it starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def coordinates(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Voxel centres of a grid in [-1, 1] per axis: (len(shape), *shape)."""
    axes = [(torch.arange(n, device=device, dtype=torch.float32) + 0.5) * (2.0 / n) - 1.0 for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sincos_positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Fixed sine-cosine position code of each token: (T, width), T = D H W in z, y, x order.

    Each axis takes a third of the channels (He et al. 2022, arXiv 2111.06377, extended to 3D); the rest is zero.
    """
    frequencies = width // 6
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64) / max(frequencies, 1))
    indices = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in grid], indexing="ij")
    parts = []
    for index in indices:
        angle = index.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    code = torch.cat(parts, dim=1)
    return F.pad(code, (0, width - code.shape[1])).float()


class FourierEmbedding(nn.Module):
    """A few scalars per sample to a vector of width E, through sines of fixed frequencies and an MLP."""

    frequencies: Tensor

    def __init__(self, inputs: int, width: int) -> None:
        """`inputs` scalars, each roughly within [-1, 1]."""
        super().__init__()
        steps = torch.arange(FOURIER_FREQUENCIES, dtype=torch.float32) / (FOURIER_FREQUENCIES - 1)
        self.register_buffer("frequencies", math.pi / 2 * 32.0**steps, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(inputs * 2 * FOURIER_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, scalars: Tensor) -> Tensor:
        """scalars: (B, inputs) -> (B, E)."""
        angles = scalars[:, :, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1))  # type: ignore[no-any-return]


class GroupNorm(nn.GroupNorm):
    """In fp32 whatever autocast says: what a GPU's autocast does by itself and a CPU's does not."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ...) -> the same shape, fp32."""
        return super().forward(x.float())


class LayerNorm(nn.LayerNorm):
    """In fp32 whatever autocast says, as `GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> the same shape, fp32."""
        return super().forward(x.float())


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; FiLM from the conditioning vector on the second norm; zero last layer."""

    def __init__(self, channels: int, conditioning: int) -> None:
        """`channels` must be a multiple of 8."""
        super().__init__()
        self.norm1 = GroupNorm(8, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.film = nn.Linear(conditioning, 2 * channels)
        self.norm2 = GroupNorm(8, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        zero(self.film)
        zero(self.conv2)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x: (B, C, D, H, W); conditioning: (B, E) -> (B, C, D, H, W)."""
        scale, shift = self.film(conditioning)[:, :, None, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = torch.addcmul(shift, self.norm2(hidden), 1 + scale)
        return x + self.conv2(F.silu(hidden))  # type: ignore[no-any-return]


class ViTBlock(nn.Module):
    """Transformer block with AdaLN-zero (Peebles & Xie, arXiv 2212.09748) and qk-norm (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, conditioning: int) -> None:
        """`width` must be a multiple of `heads`."""
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(conditioning, 6 * width)
        zero(self.modulation)
        self.norm1 = LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads)
        self.k_norm = LayerNorm(width // heads)
        self.project = nn.Linear(width, width)
        self.norm2 = LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """x: (B, T, width); conditioning: (B, E) -> (B, T, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning)[:, None].chunk(6, dim=2)
        x = x + gate1 * self._attend(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.project(attended.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]
