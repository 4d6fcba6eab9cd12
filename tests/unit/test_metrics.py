"""Figures of merit against closed forms, loops that are written down word for word, and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from app.train.metrics import mae_hu, projection_error_percent, psnr_db, ssim, x2ct_psnr_db


def noisy_pair(edge: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Two volumes (2, 1, N, N, N) in HU that differ by noise."""
    source = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 1, edge, edge, edge, generator=source) * 2500 - 1000
    return truth + 100 * torch.randn(truth.shape, generator=source), truth


def test_psnr_of_a_constant_error() -> None:
    """20 log10(2500 / 25) = 40 dB, and a tenth of the error is 20 dB more."""
    truth = torch.zeros(2, 1, 4, 4, 4)
    error = torch.tensor([25.0, 2.5])[:, None, None, None, None]
    assert psnr_db(truth + error, truth, 2500.0).tolist() == pytest.approx([40.0, 60.0])


def test_x2ct_psnr_is_the_mean_over_slices_of_three_axes() -> None:
    """By loops, as their code has it: a slice without an error counts as 100 dB."""
    prediction, truth = noisy_pair(6)
    prediction[0, 0, 2] = truth[0, 0, 2]
    expected = []
    for a, b in zip(prediction[:, 0].numpy(), truth[:, 0].numpy(), strict=True):
        axes = []
        for axis in range(3):
            errors = [
                np.mean((np.take(a, i, axis) - np.take(b, i, axis)) ** 2, dtype=np.float64) for i in range(len(a))
            ]
            axes.append(
                np.mean([100.0 if error == 0 else 20 * math.log10(4095 / math.sqrt(error)) for error in errors])
            )
        expected.append(np.mean(axes))
    assert x2ct_psnr_db(prediction, truth).tolist() == pytest.approx(expected, abs=1e-4)


def test_x2ct_psnr_reads_higher_than_ours() -> None:
    """By 20 log10(4095 / 2500) = 4.29 dB for the same error everywhere."""
    truth = torch.zeros(1, 1, 4, 4, 4)
    assert (x2ct_psnr_db(truth + 9, truth) - psnr_db(truth + 9, truth, 2500.0)).item() == pytest.approx(
        4.2866, abs=1e-3
    )


def test_ssim_is_that_of_scikit_image() -> None:
    """Gaussian weights of sigma 1.5 over 11 voxels, population moments, whole windows only."""
    prediction, truth = noisy_pair()
    for a, b, found in zip(prediction[:, 0].numpy(), truth[:, 0].numpy(), ssim(prediction, truth, 2500.0), strict=True):
        theirs = structural_similarity(
            a, b, data_range=2500.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11
        )
        assert found.item() == pytest.approx(theirs, abs=1e-6)


def test_ssim_of_a_volume_with_itself_is_one() -> None:
    """And a cube that is smaller than the window is refused."""
    _, truth = noisy_pair()
    assert ssim(truth, truth, 2500.0).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="more than 10 voxels"):
        ssim(truth[..., :10], truth[..., :10], 2500.0)


def test_mae_by_tissue_of_the_truth() -> None:
    """Errors of 10 HU in the lung, 20 in soft tissue, 30 in bone and 0 in the air around: each tissue has its own."""
    truth = torch.tensor([-1000.0, -800.0, 40.0, 700.0]).view(1, 1, 1, 2, 2)
    error = torch.tensor([0.0, 10.0, -20.0, 30.0]).view(1, 1, 1, 2, 2)
    found = {name: value.item() for name, value in mae_hu(truth + error, truth).items()}
    assert found == {"all": 15.0, "lung": 10.0, "soft": 20.0, "bone": 30.0}
    assert math.isnan(mae_hu(truth * 0, truth * 0)["bone"].item())


def test_projection_error_of_a_wrong_gain() -> None:
    """3 % too bright is an error of 3 %."""
    xrays = torch.rand(2, 2, 8, 8) + 1
    assert projection_error_percent(1.03 * xrays, xrays).tolist() == pytest.approx([3.0, 3.0], rel=1e-4)
