"""All randomness of training, as functions of (seed, stage, what, counters) and never of process history.

No generator state is saved anywhere: a resumed step draws what it would have drawn (edm2, Karras et al. 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.config import DiffusionConfig


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of names and counters."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `parts`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def volume_noise(shape: Sequence[int], device: torch.device, *parts: int | str) -> Tensor:
    """Standard normal noise of one sample."""
    return torch.randn(tuple(shape), generator=generator(device, *parts), device=device)


def epoch_order(cases: int, samples: int, *parts: int | str) -> list[int]:
    """Which case each sample of an epoch shows: whole permutations, one after another, cut to `samples`."""
    order: list[int] = []
    source = generator(torch.device("cpu"), *parts, "order")
    while len(order) < samples:
        order += torch.randperm(cases, generator=source).tolist()
    return order[:samples]


@dataclass(frozen=True)
class StepDraws:
    """The scalar draws of one optimizer step, one entry per sample of the whole batch."""

    t: Tensor
    """(B,) diffusion times in [0, 1], stratified over the batch."""
    views: Tensor
    """(B, 2), 1 where a view is shown; at least one is."""
    noise_level: Tensor
    """(B,) standard deviation of the low-resolution noise augmentation."""
    real_lowres: Tensor
    """(B,) 1 where the low-resolution volume is the previous stage's own output, 0 where it is the truth's."""


def step_draws(batch: int, config: DiffusionConfig, *parts: int | str) -> StepDraws:
    """Draw the scalars of a step on the CPU, whatever the device and however the batch is split.

    t_i = (u + i/B) mod 1 with one u per step (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """
    source = generator(torch.device("cpu"), *parts, "draws")
    offset = torch.rand((), generator=source)
    uniform = torch.rand((3, batch), generator=source)
    t = (offset + torch.arange(batch) / batch) % 1.0
    hide = config.view_dropout
    views = torch.stack([uniform[0] >= hide, (uniform[0] < hide) | (uniform[0] >= 2 * hide)], dim=1).float()
    return StepDraws(t, views, uniform[1] * config.lowres_noise_max, (uniform[2] < config.lowres_real_share).float())
