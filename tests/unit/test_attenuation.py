"""HU, the network's unit and attenuation agree with their definitions and with each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.physics.attenuation import MU_WATER_PER_MM, hu_to_mu, hu_to_x, mu_to_x, x_to_hu, x_to_mu

WINDOW = (-1000.0, 1500.0)


@pytest.mark.parametrize(
    ("hu", "mu_per_mm"), [(0.0, 0.0192), (-1000.0, 0.0), (-2048.0, 0.0), (-500.0, 0.0096), (1000.0, 0.0384)]
)
def test_attenuation_of_known_substances(hu: float, mu_per_mm: float) -> None:
    """Water attenuates 0.0192 per mm, air and less nothing, and the rest in proportion."""
    assert hu_to_mu(torch.tensor(hu)).item() == pytest.approx(mu_per_mm, rel=1e-6)
    assert hu_to_mu(np.array([hu]))[0] == pytest.approx(mu_per_mm, abs=1e-12)


def test_stored_int16_hu_is_accepted() -> None:
    """Cached volumes are int16; they become floating point without wrapping round."""
    hu = np.array([-32768, -1000, 0, 1500, 32767], dtype=np.int16)
    assert hu_to_x(torch.from_numpy(hu), WINDOW).tolist() == pytest.approx([-1, -1, -0.2, 1, 1])
    assert hu_to_x(hu, WINDOW).tolist() == pytest.approx([-1, -1, -0.2, 1, 1])
    assert hu_to_mu(hu)[3] == pytest.approx(2.5 * MU_WATER_PER_MM)


def test_the_window_maps_to_minus_one_and_one_and_clips() -> None:
    """The ends of the window are -1 and 1, and what lies outside goes to the nearer end."""
    hu = torch.tensor([-3000.0, -1000.0, 250.0, 1500.0, 3000.0])
    assert hu_to_x(hu, WINDOW).tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("window", [WINDOW, (-900.0, 1234.0)])
def test_conversions_are_inverse_to_each_other(window: tuple[float, float]) -> None:
    """HU -> x -> HU and x -> mu -> x return to the start, beyond [-1, 1] as well where nothing is clipped."""
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    inside = x[x.abs() <= 1]
    torch.testing.assert_close(hu_to_x(x_to_hu(inside, window), window), inside)
    torch.testing.assert_close(mu_to_x(x_to_mu(x, window), window), x)


def test_attenuation_by_x_is_that_by_hu() -> None:
    """Inside the window the way through x and the way through HU give the same attenuation."""
    hu = torch.linspace(-1000, 1500, 26, dtype=torch.float64)
    torch.testing.assert_close(x_to_mu(hu_to_x(hu, WINDOW), WINDOW), hu_to_mu(hu))


def test_attenuation_is_linear_in_x_below_air_too() -> None:
    """The attenuation of a mean is the mean attenuation, even where a prediction lies below air."""
    x = torch.tensor([-1.8, 0.4], dtype=torch.float64)
    assert x_to_mu(x, WINDOW)[0] < 0
    assert x_to_mu(x.mean(), WINDOW).item() == pytest.approx(x_to_mu(x, WINDOW).mean().item())


def test_air_is_exactly_transparent_in_float32() -> None:
    """x = -1 with the default window gives 0 and no rounding residue, which would add up along a ray."""
    assert x_to_mu(torch.tensor(-1.0), WINDOW).item() == 0.0
