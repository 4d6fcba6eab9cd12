"""HU, the network's unit x and linear attenuation mu: the one place with their numbers.

`x` in [-1, 1] is HU clipped to a window, linear. `mu` in 1/mm is linear in HU, so it is linear in x as well, and the
projection of the expected volume is the expected projection. All functions take torch tensors and numpy arrays.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy.typing as npt
from torch import Tensor

MU_WATER_PER_MM = 0.0192
"""Linear attenuation of water at 70 keV in 1/mm."""

Values = TypeVar("Values", Tensor, npt.NDArray[Any])


def hu_to_mu(hu: Values) -> Values:
    """Attenuation in 1/mm of HU, mu_water (1 + HU / 1000); air and whatever lies below it is 0."""
    return (MU_WATER_PER_MM * (1 + hu / 1000)).clip(min=0)


def hu_to_x(hu: Values, window: tuple[float, float]) -> Values:
    """Network's unit in [-1, 1] of HU, clipped to `window`."""
    low, high = window
    return (hu.clip(low, high) - low) * (2 / (high - low)) - 1


def x_to_hu(x: Values, window: tuple[float, float]) -> Values:
    """HU of the network's unit, linear and not clipped."""
    low, high = window
    return (x + 1) * ((high - low) / 2) + low


def x_to_mu(x: Values, window: tuple[float, float]) -> Values:
    """Attenuation in 1/mm of the network's unit, linear and not clamped: negative below air."""
    low, high = window
    return (x + 1) * (MU_WATER_PER_MM * (high - low) / 2000) + MU_WATER_PER_MM * (1 + low / 1000)


def mu_to_x(mu: Values, window: tuple[float, float]) -> Values:
    """Network's unit of attenuation in 1/mm, the inverse of `x_to_mu`, not clipped."""
    low, high = window
    return (mu - MU_WATER_PER_MM * (1 + low / 1000)) * (2000 / (MU_WATER_PER_MM * (high - low))) - 1
