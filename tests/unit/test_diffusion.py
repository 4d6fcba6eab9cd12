"""The diffusion's formulas against their definitions and closed forms."""

import math

import pytest
import torch

from app.config import DiffusionConfig
from app.model.diffusion import add_noise, alpha_sigma, log_snr, loss_weight, sample

CONFIG = DiffusionConfig()


def test_alpha_and_sigma_keep_the_variance() -> None:
    """alpha^2 + sigma^2 = 1 and alpha^2 / sigma^2 = exp(lambda)."""
    lambdas = torch.linspace(-10, 10, 41, dtype=torch.float64)
    alpha, sigma = alpha_sigma(lambdas)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert torch.allclose((alpha**2 / sigma**2).log().flatten(), lambdas)


def test_log_snr_falls_and_is_zero_in_the_middle_at_the_reference_edge() -> None:
    """Unshifted, the cosine schedule crosses SNR 1 at t = 1/2; it never rises and stays within its bounds."""
    t = torch.linspace(0, 1, 101)
    values = log_snr(t, CONFIG.shift_resolution, CONFIG)
    assert values[50] == pytest.approx(0.0, abs=1e-5)
    assert (values.diff() <= 0).all()
    assert values[0] == CONFIG.log_snr_max
    assert values[-1] == CONFIG.log_snr_min


def test_a_cube_of_twice_the_edge_is_noised_more() -> None:
    """Doubling the edge shifts log SNR by -2 log 2 (Hoogeboom et al. 2023)."""
    t = torch.tensor([0.4])
    shift = log_snr(t, 64, CONFIG) - log_snr(t, 32, CONFIG)
    assert shift.item() == pytest.approx(-2 * math.log(2), abs=1e-5)


def test_loss_weight_is_one_plus_snr_up_to_its_cap() -> None:
    """At SNR 1 the weight is 2, at SNR 1000 it is the cap."""
    assert loss_weight(torch.tensor([0.0, math.log(1000)]), 5.0).tolist() == pytest.approx([2.0, 5.0])


def test_sampler_is_exact_for_a_gaussian() -> None:
    """For data N(0, s^2) the optimal denoiser is linear, and DDIM's limit maps unit noise to std s."""
    std = 0.3
    shape = (1, 1, 16, 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def optimal(x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        alpha, sigma = alpha_sigma(level)
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t

    drawn = sample(optimal, noise, 400, CONFIG, correct=lambda x_0: x_0)
    assert drawn.std().item() == pytest.approx(std * noise.std().item(), rel=0.02)


def test_sampler_returns_what_a_perfect_denoiser_knows() -> None:
    """A denoiser that knows the volume gives it back, whatever the number of steps, and `correct` is applied to it."""
    truth = torch.rand(2, 1, 8, 8, 8)
    for steps in (1, 3):
        drawn = sample(lambda x_t, level: truth, torch.randn_like(truth), steps, CONFIG, correct=lambda x_0: x_0 + 1)
        assert torch.equal(drawn, truth + 1)


def test_noised_volume_has_unit_variance_where_the_data_has() -> None:
    """Variance preserving: x_t of unit-variance data has unit variance at every level."""
    source = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn((1, 1, 32, 32, 32), generator=source) for _ in range(2))
    for level in (-5.0, 0.0, 5.0):
        assert add_noise(x_0, noise, torch.tensor([level])).var().item() == pytest.approx(1.0, abs=0.03)
