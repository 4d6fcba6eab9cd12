"""Arithmetic of a run: fp32, bf16 by autocast, or fp16 by autocast with a gradient scaler; device and kernels."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from app.config import ComputeConfig
from app.env import fix_cublas_workspace
from app.errors import MachineError, NumericsError

log = logging.getLogger(__name__)

NEVER = 2**31 - 1
NO_SUCH_KERNEL = "does not have a deterministic implementation"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(config: ComputeConfig) -> torch.device:
    """The device that the config asks for.

    Raises:
        MachineError: it asks for a GPU and there is none; a GPU config is never trained on a CPU.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise MachineError(
            "compute.device is cuda and torch finds no GPU here. Start on a machine with a GPU and a driver that this "
            "torch supports, or choose a config made for the CPU, such as configs/demo.yaml"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def choose_precision(config: ComputeConfig, device: torch.device) -> str:
    """fp32 on a CPU, bf16 on a GPU that has it, else fp16; a fixed choice in the config stands."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def choose_algorithms(config: ComputeConfig, device: torch.device) -> None:
    """On a GPU the kernels that the config asks for; on a CPU all give the same bits for the same number of threads.

    Call it before the GPU computes anything. From PyTorch's notes on reproducibility.
    """
    if device.type == "cpu":
        return
    if config.deterministic:
        fix_cublas_workspace()
        # What is not written is not read, and to fill it takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # With warnings in place of errors attention would keep the backward pass whose sums have no fixed order.
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic


def without_determinism(error: RuntimeError) -> bool:
    """Whether an operation has no deterministic kernel; from then on it only warns, aloud, and can be taken again."""
    if NO_SUCH_KERNEL not in str(error):
        return False
    log.warning(
        "compute.deterministic: %s. From here on such operations are taken as they are, and a resumed run may differ "
        "from an undisturbed one in its last bits",
        str(error).partition(",")[0],
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    return True


def precision_for_use(device: str) -> Precision:
    """Arithmetic of a trained cascade, whatever it was trained with: fp32 on a CPU, on a GPU bf16 where it has that.

    Args:
        device: `auto` takes a GPU where there is one, `cpu`, or `cuda`.

    Raises:
        MachineError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: torch finds no GPU here; leave --device out to use the CPU")
    compute = ComputeConfig.model_validate({"device": device})
    chosen = choose_device(compute)
    return Precision(choose_precision(compute, chosen), chosen)


class Precision:
    """Autocast and scaler of a run; the scaler's state is never empty, whatever the precision."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Outside fp16 the scaler holds the scale 1 for ever and takes no part in a step."""
        self.name = name
        self.device = device
        fp16 = name == "fp16"
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=65536.0 if fp16 else 1.0, growth_interval=2000 if fp16 else NEVER
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""
        return nullcontext() if self.name == "fp32" else torch.autocast(self.device.type, DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled in fp16."""
        scaled = self.scaler.scale(loss) if self.name == "fp16" else loss
        scaled.backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to the loss's own scale."""
        if self.name == "fp16":
            self.scaler.unscale_(optimizer)

    def overflowed(self, gradient_norm: float) -> bool:
        """Whether this step must be computed again at a smaller scale.

        Raises:
            NumericsError: the scale cannot get smaller.
        """
        if self.name != "fp16" or math.isfinite(gradient_norm):
            return False
        scale = self.scaler.get_scale() / 2
        if scale < 1.0:
            raise NumericsError("fp16 gradients overflow at scale 1: use compute.precision bf16 or fp32 in a new run")
        log.info("fp16 gradients overflowed: the scale is now %g and the step is computed again", scale)
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale)
        self.scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": 0})
        return True

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply finite gradients."""
        if self.name == "fp16":
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state."""
        return dict(self.scaler.state_dict())
