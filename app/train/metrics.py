"""Figures of merit of reconstructed volumes; every one takes its data range or works in HU.

Shapes: B batch; volumes (B, 1, D, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

X2CT_PEAK_HU = 4095.0
X2CT_BEST_DB = 100.0
"""What X2CT-GAN's code counts for a slice without any error."""
SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
"""Voxels: a Gaussian window of 11 (Wang et al. 2004, section III-B)."""
TISSUES_HU = {"lung": (-950.0, -500.0), "soft": (-200.0, 200.0), "bone": (200.0, float("inf"))}
"""By the truth's HU: [low, high). Air around the patient is below the lung's."""


def psnr_db(prediction: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """10 log10(range^2 / mean square error) per sample: two (B, 1, D, H, W) in one unit -> (B,) in dB."""
    mse = (prediction - truth).square().flatten(1).mean(1)
    return 10.0 * (data_range**2 / mse).log10()


def x2ct_psnr_db(prediction_hu: Tensor, truth_hu: Tensor) -> Tensor:
    """PSNR as the papers print it (Ying et al. 2019, arXiv 1905.06902, their code): (B,) in dB.

    Peak 4095, the mean over slices of each slice's PSNR, then over the three axes. About 6 dB above `psnr_db`.
    """
    squared = (prediction_hu - truth_hu).square().squeeze(1)
    axes = []
    for axis in (1, 2, 3):
        mse = squared.mean([other for other in (1, 2, 3) if other != axis])
        axes.append((10.0 * (X2CT_PEAK_HU**2 / mse).log10()).clamp(max=X2CT_BEST_DB).mean(1))
    return torch.stack(axes).mean(0)


def ssim(prediction: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """Structural similarity in 3D (Wang et al. 2004, eq. 13; K1 0.01, K2 0.03), mean over whole windows: (B,).

    Raises:
        ValueError: a volume is smaller than the window.
    """
    if min(truth.shape[2:]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"SSIM needs more than {2 * SSIM_RADIUS} voxels along each edge, found {tuple(truth.shape)}")
    # Variances are small differences of large numbers.
    prediction, truth = prediction.double(), truth.double()
    mean_x, mean_y = _blurred(prediction), _blurred(truth)
    var_x = _blurred(prediction.square()) - mean_x.square()
    var_y = _blurred(truth.square()) - mean_y.square()
    covariance = _blurred(prediction * truth) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).flatten(1).mean(1)


def _blurred(volume: Tensor) -> Tensor:
    """Gaussian means over the windows that lie inside, in double."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=volume.device)
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    weights /= weights.sum()
    result = volume
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(weights)
        result = F.conv3d(result, weights.view(shape))
    return result


def mae_hu(prediction_hu: Tensor, truth_hu: Tensor) -> dict[str, Tensor]:
    """Mean absolute error in HU, of all voxels and of each tissue of the truth: (B,) each, nan where there is none."""
    error = (prediction_hu - truth_hu).abs().flatten(1)
    truth = truth_hu.flatten(1)
    found = {"all": error.mean(1)}
    for tissue, (low, high) in TISSUES_HU.items():
        inside = (truth >= low) & (truth < high)
        found[tissue] = (error * inside).sum(1) / inside.sum(1)
    return found


def projection_error_percent(drr: Tensor, xrays: Tensor) -> Tensor:
    """100 |P mu - p| / |p| over both views, two (B, 2, N, N) of line integrals -> (B,)."""
    return 100.0 * (drr - xrays).square().flatten(1).sum(1).sqrt() / xrays.square().flatten(1).sum(1).sqrt()
