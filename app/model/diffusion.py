"""Variance-preserving diffusion in log-SNR: schedule, loss weight, sampler. Pure functions.

Symbols: lambda = log SNR = log(alpha^2 / sigma^2), x_t = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1.
Shapes: B batch, volumes (B, 1, D, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from app.config import DiffusionConfig


def log_snr(t: Tensor, edge: int, config: DiffusionConfig) -> Tensor:
    """Shifted cosine schedule at t in [0, 1]; t = 0 is clean (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 5-6).

    lambda(t) = -2 log tan(pi t / 2) + 2 log(shift_resolution / edge), clipped to [log_snr_min, log_snr_max].
    """
    shift = 2.0 * math.log(config.shift_resolution / edge)
    cosine = -2.0 * torch.log(torch.tan(0.5 * math.pi * t.double().clamp(1e-6, 1 - 1e-6)))
    return (cosine + shift).clamp(config.log_snr_min, config.log_snr_max).float()


def alpha_sigma(log_snr_t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = sqrt(sigmoid(lambda)), sigma = sqrt(sigmoid(-lambda)); log_snr_t: (B,) -> two (B, 1, 1, 1, 1)."""
    column = log_snr_t[:, None, None, None, None]
    return column.sigmoid().sqrt(), (-column).sigmoid().sqrt()


def add_noise(x_0: Tensor, noise: Tensor, log_snr_t: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps."""
    alpha, sigma = alpha_sigma(log_snr_t)
    return alpha * x_0 + sigma * noise


def loss_weight(log_snr_t: Tensor, maximum: float) -> Tensor:
    """min(1 + SNR, maximum), for a loss on x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4; capped)."""
    return (1.0 + log_snr_t.exp()).clamp(max=maximum)


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    config: DiffusionConfig,
    correct: Callable[[Tensor], Tensor],
) -> Tensor:
    """Deterministic DDIM sampler in x_0 (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0).

    Args:
        denoise: (x_t, log_snr (B,)) -> x_0.
        noise: (B, 1, D, H, W) standard normal, the start.
        steps: evaluations of `denoise`, uniform in t from 1 to 0.
        config: the noise schedule.
        correct: applied to each predicted x_0 before it is noised again, such as SART sweeps (DDS, arXiv 2303.05754).

    Returns:
        x_0: (B, 1, D, H, W), the corrected prediction of the last step.
    """
    times = torch.linspace(1.0, 0.0, steps + 1, device=noise.device)
    lambdas = log_snr(times, noise.shape[-1], config)
    x_t, x_0 = noise, noise
    for now, following in pairwise(lambdas):
        level = now.expand(noise.shape[0])
        x_0 = correct(denoise(x_t, level))
        alpha, sigma = alpha_sigma(level)
        eps = (x_t - alpha * x_0) / sigma
        x_t = add_noise(x_0, eps, following.expand(noise.shape[0]))
    return x_0
