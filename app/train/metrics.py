"""Figures of merit; every one takes its data range."""

from __future__ import annotations

from torch import Tensor


def psnr_db(prediction: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """10 log10(range^2 / mean square error) per sample: two (B, 1, D, H, W) in one unit -> (B,) in dB."""
    mse = (prediction - truth).square().flatten(1).mean(1)
    return 10.0 * (data_range**2 / mse).log10()
