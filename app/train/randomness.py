"""All randomness of training, as functions of (seed, stage, what, counters) and never of process history.

No generator state is saved anywhere: a resumed step draws what it would have drawn (edm2, Karras et al. 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.config import DiffusionConfig

CPU = torch.device("cpu")


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
    source = generator(CPU, *parts, "order")
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

    def __getitem__(self, samples: slice) -> StepDraws:
        """Those of some samples."""
        return StepDraws(*(draws[samples] for draws in (self.t, self.views, self.noise_level, self.real_lowres)))


def step_draws(batch: int, config: DiffusionConfig, device: torch.device, *parts: int | str) -> StepDraws:
    """Draw the scalars of a step, the same whatever the device and however the batch is split.

    t_i = (u + i/B) mod 1 with one u per step (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """
    source = generator(CPU, *parts, "draws")
    offset = torch.rand((), generator=source).numpy()
    hidden, noise, real = torch.rand((3, batch), generator=source).numpy()
    hide = np.float32(config.view_dropout)
    numbers = np.empty((5, batch), dtype=np.float32)
    numbers[0] = (offset + np.arange(batch, dtype=np.float32) / np.float32(batch)) % np.float32(1)
    numbers[1] = hidden >= hide
    numbers[2] = (hidden < hide) | (hidden >= 2 * hide)
    numbers[3] = noise * np.float32(config.lowres_noise_max)
    numbers[4] = real < np.float32(config.lowres_real_share)
    # All in one copy that nobody waits for: a GPU would finish its queue before it takes pageable memory.
    packed = torch.from_numpy(numbers)
    packed = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed
    return StepDraws(packed[0], packed[1:3].T, packed[3], packed[4])
