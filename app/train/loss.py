"""The loss of a sample: weighted error of x_0, and the error of its projections.

Shapes: B batch, N cube edge; volumes (B, 1, N, N, N) in [-1, 1], radiographs (B, 2, N, N) line integrals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.model.denoiser import Condition, StageModel
from app.model.diffusion import add_noise, loss_weight
from app.physics.attenuation import x_to_mu


@dataclass(frozen=True)
class SampleLosses:
    """Per-sample loss terms, each (B,), fp32; `loss = diffusion + physics_weight * physics` on their means."""

    diffusion: Tensor
    physics: Tensor


def diffusion_loss(x_0: Tensor, predicted: Tensor, log_snr: Tensor, maximum: float) -> Tensor:
    """min(1 + SNR, maximum) * mean (x_0 - predicted)^2, per sample: (B,)."""
    return loss_weight(log_snr, maximum) * (predicted - x_0).square().flatten(1).mean(1)


def physics_loss(model: StageModel, predicted: Tensor, xrays: Tensor, views: Tensor, log_snr: Tensor) -> Tensor:
    """Relative squared line-integral error |P mu(x_0) - p|^2 / |p|^2 over the shown views: (B,).

    Zero where log SNR <= 0: a prediction from mostly noise is a mean, whose projection says little.
    The error is squared and P is linear in x_0, so that its minimum is the expected volume, as for the diffusion loss.
    """
    shown = views[:, :, None, None]
    error = (model.projector(x_to_mu(predicted, model.hu_window)) - xrays) * shown
    relative = error.square().sum((1, 2, 3)) / (xrays * shown).square().sum((1, 2, 3)).clamp(min=1e-6)
    return torch.where(log_snr > 0, relative, torch.zeros_like(relative))


def sample_losses(
    model: StageModel, x_0: Tensor, noise: Tensor, log_snr: Tensor, condition: Condition, xrays: Tensor
) -> SampleLosses:
    """Noise x_0 to `log_snr` (B,), predict it, and measure both losses."""
    predicted = model(add_noise(x_0, noise, log_snr), log_snr, condition)
    with torch.autocast(x_0.device.type, enabled=False):
        return SampleLosses(
            diffusion_loss(x_0, predicted, log_snr, model.diffusion.loss_weight_max),
            physics_loss(model, predicted, xrays, condition.views, log_snr),
        )
