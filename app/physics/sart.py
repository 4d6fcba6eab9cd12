"""SART: pulls a volume towards measured line integrals, view after view (Andersen and Kak 1984)."""

from __future__ import annotations

from torch import Tensor

from app.physics.geometry import VIEWS
from app.physics.projector import Projector


def sart(
    mu: Tensor, p: Tensor, projector: Projector, sweeps: int, relaxation: float = 1.0, view_mask: Tensor | None = None
) -> Tensor:
    """Per view x <- max(0, x + relaxation A^T((p - A x) / (A 1)) / (A^T 1)), frontal then lateral in each sweep.

    Args:
        mu: start (B, 1, D, H, W) in 1/mm; its negative values count as 0.
        p: measured line integrals (B, 2, Nv, Nu).
        projector: A of both views.
        sweeps: how often each view is used; 0 returns the start, clamped.
        relaxation: step length, 0 to 2; below 1 for measurements that fit the geometry badly.
        view_mask: (B, 2); a view that is 0 for a sample does not move that sample.

    Returns:
        mu (B, 1, D, H, W) in 1/mm, nowhere negative.
    """
    volume = mu.clamp(min=0)
    for _ in range(sweeps):
        for index, view in enumerate(VIEWS):
            inverse_rows, inverse_columns = projector.inverse_sums(view)
            residual = (p[:, index] - projector.project(volume, view)) * (relaxation * inverse_rows)
            if view_mask is not None:
                residual = residual * view_mask[:, index, None, None]
            volume = (volume + projector.backproject(residual, view) * inverse_columns).clamp(min=0)
    return volume
