"""2D features of a radiograph on a grid that can be lifted to the token grid.

Shapes: B batch, N detector edge in pixels, M edge of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.blocks import GroupNorm, coordinates


class _ResBlock2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))  # type: ignore[no-any-return]


class XrayEncoder(nn.Module):
    """One radiograph to a feature map whose edge is the token grid's; the same weights serve both views.

    The view is told by a constant channel, the pixel's place by two coordinate channels.
    """

    def __init__(self, detector_edge: int, token_edge: int, widths: Sequence[int]) -> None:
        """`detector_edge` must be `token_edge` times a power of two of at least `len(widths) - 1` halvings."""
        super().__init__()
        stem = detector_edge // token_edge // 2 ** (len(widths) - 1)
        self.stem = nn.Conv2d(4, widths[0], max(3, 2 * stem - 1), stride=stem, padding=max(1, (stem - 1)))
        self.blocks = nn.ModuleList(_ResBlock2d(width) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairwise(widths))

    def forward(self, radiograph: Tensor, view: int) -> Tensor:
        """radiograph: (B, 1, N, N) affine-scaled line integrals; view: its index -> (B, widths[-1], M, M)."""
        b, _, rows, columns = radiograph.shape
        place = coordinates((rows, columns), radiograph.device).expand(b, 2, rows, columns)
        which = radiograph.new_full((b, 1, rows, columns), 2.0 * view - 1.0)
        x = self.stem(torch.cat([radiograph, which, place], dim=1))
        x = self.blocks[0](x)
        for down, block in zip(self.down, self.blocks[1:], strict=True):
            x = block(down(x))
        return x  # type: ignore[no-any-return]
