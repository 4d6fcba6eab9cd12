"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from app.model.denoiser import StageModel


class EMA:
    """A second model whose weights follow the trained ones; its buffers are theirs."""

    def __init__(self, model: StageModel) -> None:
        """Start from the weights of `model`, and follow them."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Once: a walk through a model's modules takes longer than the arithmetic of a small one.
        self.weights: list[Tensor] = list(model.parameters())
        """What is followed, in the order of the model."""
        self._averages: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """ema <- decay ema + (1 - decay) weights."""
        torch._foreach_lerp_(self._averages, self.weights, 1.0 - decay)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state_dict: the name of a model's content."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
