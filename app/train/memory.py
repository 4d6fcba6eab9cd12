"""How much memory a training step of a stage takes, counted without taking it.

The step's own arithmetic runs on tensors that have shapes and no numbers (`FakeTensorMode`), and what is alive at any
time is added up, storage by storage. Not counted: workspaces inside kernels, the allocator's rounding and
fragmentation, the context of the GPU.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.config import Config, StageConfig
from app.train.handover import new_state
from app.train.loss import sample_losses
from app.train.precision import Precision
from app.train.state import StageState

CPU = torch.device("cpu")
CONTEXT_BYTES = 600 * 2**20
"""What CUDA, cuDNN and cuBLAS take of a card beside tensors; between 0.4 and 0.8 GiB."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of the tensors of a stage in training."""

    weights: int
    """The model and its EMA, with their buffers and the matrices of the projectors."""
    optimizer: int
    """Both moments of AdamW."""
    peak: int
    """At the step's most expensive moment, weights and optimizer included."""

    @property
    def activations(self) -> int:
        """What comes and goes with each step: activations, gradients, the batch."""
        return self.peak - self.weights - self.optimizer


def step_memory(config: Config, stage: StageConfig, precision: str, micro_batch: int | None = None) -> StepMemory:
    """Count a training step of `stage`.

    Args:
        config: the run.
        stage: one of its stages.
        precision: `fp32`, `bf16` or `fp16`.
        micro_batch: samples in a forward pass; the stage's own unless given.
    """
    count = micro_batch or stage.micro_batch or stage.batch
    live = _Live()
    with _without_numbers(), live:
        state = new_state(config, stage, CPU, Precision(precision, CPU), "", None)
        weights = live.now
        state.model.train()
        # The second step is the first one with the optimizer's moments in place.
        for _ in range(2):
            live.peak = 0
            _step(state, config, count)
        moments = sum(leaf.nbytes for leaf in tree_leaves(dict(state.optimizer.state)) if isinstance(leaf, Tensor))
    return StepMemory(weights, moments, live.peak)


def checkpoint_bytes(config: Config, stage: StageConfig) -> int:
    """Bytes of the tensors in a checkpoint of `stage`: the model, its EMA and both moments of AdamW."""
    with _without_numbers():
        state = new_state(config, stage, CPU, Precision("fp32", CPU), "", None)
        kept = [*state.model.state_dict().values(), *state.ema.model.state_dict().values()]
        moments = 2 * sum(parameter.nbytes for parameter in state.model.parameters())
        total: int = moments + sum(tensor.nbytes for tensor in kept)
    return total


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Tensors made in here have shapes alone, and no generator moves."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _Shapes():
        # `copy.deepcopy`, by which EMA starts, asks every tensor for its address.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def _step(state: StageState, config: Config, count: int) -> None:
    """As `train_step` does for one micro-batch, without its randomness."""
    stage, model = state.stage, state.model
    edge, before = stage.resolution, config.stages[: config.stages.index(stage)]
    state.optimizer.zero_grad(set_to_none=True)
    x_0, xrays, views = torch.zeros(count, 1, edge, edge, edge), torch.zeros(count, 2, edge, edge), torch.ones(count, 2)
    lowres = level = lowres_noise = None
    if before:
        lowres, lowres_noise = (torch.zeros(count, 1, *[before[-1].resolution] * 3) for _ in range(2))
        level = torch.zeros(count)
    noise, snr = torch.zeros_like(x_0), torch.zeros(count)
    with state.precision.autocast():
        condition = model.condition(xrays, views, lowres, level, lowres_noise)
        losses = sample_losses(model, x_0, noise, snr, condition, xrays)
    (losses.diffusion.mean() + losses.physics.mean()).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
    state.optimizer.step()
    state.ema.update(0.5)


class _Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Copies of a model's tensors, as EMA makes them, stay in the same mode."""

    def __deepcopy__(self, _memo: Any) -> _Shapes:
        return self


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[weakref.ref[Any], int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._remove)
        if reference not in self._alive:
            self._alive[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _remove(self, reference: weakref.ref[Any]) -> None:
        self.now -= self._alive.pop(reference)


def micro_batches(stage: StageConfig) -> list[int]:
    """The stage's micro-batch and the smaller ones that divide its batch, largest first."""
    most = stage.micro_batch or stage.batch
    return [count for count in range(most, 0, -1) if stage.batch % count == 0]


def memory_table(config: Config, stage: StageConfig, precision: str, card_bytes: int) -> str:
    """GiB of a step for each micro-batch, with and without checkpointed activations, against the card's memory."""
    lines = [f"{'micro_batch':>13}{'plain':>10}{'checkpointed':>14}"]
    for count in micro_batches(stage):
        cells = []
        for checkpointed in (False, True):
            backbone = stage.backbone.model_copy(update={"checkpoint_activations": checkpointed})
            changed = stage.model_copy(update={"backbone": backbone})
            stages = tuple(changed if other == stage else other for other in config.stages)
            peak = step_memory(config.model_copy(update={"stages": stages}), changed, precision, count).peak
            cells.append(f"{peak / 2**30:.1f}{'' if peak + CONTEXT_BYTES <= card_bytes else ' !'}")
        lines.append(f"{count:>13}{cells[0]:>10}{cells[1]:>14}")
    return "\n".join(lines)


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def out_of_memory(config: Config, stage: StageConfig, precision: str, card_bytes: int) -> str:
    """What to do when a device was too small."""
    return (
        f"{stage.name} did not fit into the device's {card_bytes / 2**30:.1f} GiB. Stop what else runs on it, or lower "
        f"stages.{stage.name}.micro_batch, or set stages.{stage.name}.backbone.checkpoint_activations=true: both may "
        "change on resume, the samples of a step and the curves stay the same. Predicted GiB of a step (! does not "
        f"fit):\n{memory_table(config, stage, precision, card_bytes)}"
    )
