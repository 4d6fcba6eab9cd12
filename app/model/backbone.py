"""Hybrid CNN + ViT: fine detail by convolutions, the whole volume by attention on the coarsest grid.

Shapes: B batch, C channels, N cube edge, P patch, G = N/P the finest grid, E conditioning width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from app.config import BackboneConfig
from app.model.blocks import GroupNorm, ResBlock, ViTBlock, depth_to_space, sincos_positions, space_to_depth, zero


class _Level(nn.Module):
    def __init__(self, channels: int, blocks: int, conditioning: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, conditioning) for _ in range(blocks))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, conditioning)
        return x


class HybridBackbone(nn.Module):
    """Space-to-depth, CNN levels down, ViT, CNN levels up with additive skips, depth-to-space; zero last layer."""

    positions: Tensor

    def __init__(
        self, config: BackboneConfig, edge: int, in_channels: int, token_features: int, embedding: int
    ) -> None:
        """`token_features`: channels that are added to the token grid from outside (the lifted X-ray features)."""
        super().__init__()
        self.patch = config.patch
        self.checkpointed = config.checkpoint_activations
        widths = config.widths
        self.stem = nn.Conv3d(in_channels * config.patch**3, widths[0], 3, padding=1)
        self.levels_down = nn.ModuleList(_Level(width, config.blocks, embedding) for width in widths)
        coarser = (*widths[1:], config.vit_width)
        self.down = nn.ModuleList(nn.Conv3d(a, b, 2, stride=2) for a, b in zip(widths, coarser, strict=True))
        self.lift = nn.Conv3d(token_features, config.vit_width, 1)
        grid = edge // config.patch // 2 ** len(widths)
        self.register_buffer("positions", sincos_positions((grid, grid, grid), config.vit_width), persistent=False)
        self.vit = nn.ModuleList(
            ViTBlock(config.vit_width, config.vit_heads, embedding) for _ in range(config.vit_depth)
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in zip(widths, coarser, strict=True))
        self.levels_up = nn.ModuleList(_Level(width, config.blocks, embedding) for width in widths)
        self.norm = GroupNorm(8, widths[0])
        self.head = nn.Conv3d(widths[0], config.patch**3, 3, padding=1)
        zero(self.head)

    def forward(self, x: Tensor, lifted: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, N, N, N); lifted: (B, token_features, G', G', G') on the token grid; embedding: (B, E).

        Returns F: (B, 1, N, N, N), zero at initialisation.
        """
        x = self.stem(space_to_depth(x, self.patch))
        skips = []
        for level, down in zip(self.levels_down, self.down, strict=True):
            x = self._run(level, x, embedding)
            skips.append(x)
            x = down(x)
        x = x + self.lift(lifted)
        shape = x.shape
        tokens = x.flatten(2).transpose(1, 2) + self.positions
        for block in self.vit:
            tokens = self._run(block, tokens, embedding)
        x = tokens.transpose(1, 2).reshape(shape)
        for level, up, skip in zip(reversed(self.levels_up), reversed(self.up), reversed(skips), strict=True):
            x = self._run(level, up(x) + skip, embedding)
        return depth_to_space(self.head(nn.functional.silu(self.norm(x))), self.patch)

    def _run(self, block: Callable[..., Tensor], x: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpointed and self.training:
            return checkpoint(block, x, embedding, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, embedding)
