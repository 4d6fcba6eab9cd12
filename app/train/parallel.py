"""One run on several processes, a GPU each: the only module that knows of ranks.

Every process holds the whole model and takes its share of the samples of each optimizer step. What a sample is does not
depend on its process, so a run may change their number from one attempt to the next. The first process alone writes;
the others get `app.train.silent`.

Shapes: B batch of an optimizer step, P elements of all parameters, T loss terms, F flags.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from app.config import Config, StageConfig
from app.env import LauncherRanks
from app.errors import AppError, ConfigError, MachineError
from app.train.processes import batches_in_words, processes_of

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)
"""How long the others wait while the first process prepares data, samples pictures or reads a checkpoint."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. By itself it is the first of one, and every method does the obvious nothing.

    Every process calls the same methods in the same order: each of them waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the number of its GPU."""
    local_size: int = 1
    """Processes of this machine."""
    node: int = 0
    """Number of this machine; the others write nothing to the volume."""
    _buffers: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    """The buffer of `reduce_step`, kept from step to step."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes: checkpoints, curves, log, status."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """The device of this process: the GPU of its number where GPUs were chosen.

        Raises:
            MachineError: this machine has fewer GPUs than processes.
        """
        if self.size == 1 or chosen.type != "cuda":
            return chosen
        if self.local_rank >= torch.cuda.device_count():
            raise MachineError(
                f"process {self.local_rank + 1} of this machine finds {torch.cuda.device_count()} GPUs: start one "
                "process per GPU (compute.processes, or torchrun's --nproc-per-node)"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def check(self, stages: Iterable[StageConfig]) -> None:
        """Say how the batch is divided.

        Raises:
            ConfigError: it cannot be divided into equal shares.
        """
        for stage in stages:
            if stage.batch % self.size:
                raise ConfigError(
                    f"stages.{stage.name}.batch: {stage.batch} samples cannot be divided equally among {self.size} "
                    f"processes. Start another number of processes, or a new run with a multiple of {self.size}"
                )
            size, share = self.micro_batch(stage), stage.batch // self.size
            if stage.micro_batch is not None and size != stage.micro_batch:
                log.info(
                    "%s: micro_batch is %d instead of %d, which does not divide a process's %d samples of a step",
                    stage.name,
                    size,
                    stage.micro_batch,
                    share,
                )

    def samples(self, batch: int) -> range:
        """This process's samples of a step, by their numbers in the whole batch."""
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def micro_batch(self, stage: StageConfig, fits: int | None = None) -> int:
        """Samples per forward pass here: the largest divisor of this process's share that config and memory allow."""
        share = stage.batch // self.size
        most = min(share, stage.micro_batch or share, fits or share)
        return max(size for size in range(1, most + 1) if share % size == 0)

    def micro_batches(self, order: Sequence[int], stage: StageConfig, size: int) -> list[Sequence[int]]:
        """This process's part of whole steps, a forward pass of `size` samples per entry.

        Args:
            order: what each sample of the steps shows.
            stage: says how many are a step.
            size: see `micro_batch`.
        """
        mine = self.samples(stage.batch)
        return [
            order[start : start + size]
            for step in range(0, len(order), stage.batch)
            for start in range(step + mine.start, step + mine.stop, size)
        ]

    def reduce_step(self, model: nn.Module, terms: Tensor, *flags: bool) -> tuple[Tensor, list[bool]]:
        """Gradients and loss terms (T,) become their means over the processes; each flag is whether any process has it.

        All in one sum, so that no process leaves while another waits for its gradients. Shares are equal, hence the
        mean of the processes' means is the mean of the batch.
        """
        if self.size == 1:
            return terms, list(flags)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        flat = self._buffer(sum(sizes) + len(terms) + len(flags), terms.device)
        *parts, end = torch.split(flat, [*sizes, len(terms) + len(flags)])
        for parameter, part in zip(parameters, parts, strict=True):
            # None is a parameter that no sample of this process reached, or a step that was broken off. It counts as
            # zero, and every process gets a gradient: an optimizer that skipped it in one process would take the
            # weights apart. By itself a process keeps its None, and AdamW skips the parameter.
            gradient = parameter.grad
            part.zero_() if gradient is None else part.view_as(parameter).copy_(gradient)
        end[: len(terms)] = terms
        end[len(terms) :] = torch.tensor(flags, device=end.device)
        with _together():
            dist.all_reduce(flat)
        flat /= self.size
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return end[: len(terms)].clone(), [value > 0 for value in end[len(terms) :].tolist()]

    def _buffer(self, count: int, device: torch.device) -> Tensor:
        """(P + T + F,), fp32."""
        if not self._buffers or self._buffers[0].numel() != count or self._buffers[0].device != device:
            self._buffers[:] = [torch.empty(count, device=device)]
        return self._buffers[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """The first process's tensors to all, in place."""
        if self.size == 1:
            return
        with _together(), torch.no_grad():
            for tensor in tensors:
                dense = tensor.contiguous()
                dist.broadcast(dense, src=0)
                tensor.copy_(dense)

    def broadcast(self, value: Result) -> Result:
        """The first process's value to all; tensors in it are on the CPU."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        with _together():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """Every process's value, in the order of ranks, to all; tensors in it are on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(values, value)
        return values

    def mine(self, items: Sequence[Result]) -> Sequence[Result]:
        """This process's share of work that is not divided by samples."""
        return items[self.rank :: self.size]

    def written(self, items: Sequence[Result]) -> Sequence[Result]:
        """This process's share of work whose result is written: the first machine's processes do it."""
        return items[self.local_rank :: self.local_size] if self.node == 0 else []

    def everyone(self, work: Callable[[], Result]) -> Result:
        """Each process's own result of `work`, once all of them are done.

        Raises:
            AppError: of the first process that failed, here as well.
        """
        if self.size == 1:
            return work()
        value, error = _attempt(work)
        self._raise_first(self.gather(_told(error)), error)
        return value  # type: ignore[return-value]

    def first(self, work: Callable[[], Result]) -> Result:
        """The first process's result of `work`, which only that process does.

        Raises:
            AppError: it failed there, and so it does here.
        """
        if self.size == 1:
            return work()
        value, error = _attempt(work) if self.is_first else (None, None)
        value, failure = self.broadcast((value, _told(error)))
        self._raise_first([failure], error)
        return value  # type: ignore[return-value]

    def _raise_first(self, failures: Sequence[tuple[int, str] | None], own: AppError | None) -> None:
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is None:
            return
        error = _same_kind(*failure) if own is None or _told(own) != failure else own
        error.told = not self.is_first
        raise error

    def leave(self) -> None:
        """The run is finished; nothing is left to wait for."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Ranks()


def join(place: LauncherRanks | None) -> Ranks:
    """Meet the other processes of the run; None is a process by itself."""
    if place is None or place.size == 1:
        return ALONE
    # Objects and flags travel by gloo: NCCL would take them through the memory of the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    return Ranks(place.rank, place.size, place.local_rank, place.local_size, place.node)


def processes_here(config: Config, only: Sequence[str], machines: int) -> int:
    """How many processes this machine starts for a run.

    Args:
        config: the run.
        only: names of the stages to train; empty is all.
        machines: that train it together.

    Raises:
        MachineError: it has fewer GPUs than the config asks for.
    """
    gpus = 0 if config.compute.device == "cpu" else torch.cuda.device_count()
    count = processes_of(config, only, gpus, machines)
    if config.compute.processes == "auto" and count < gpus:
        log.warning(
            "%d of %d GPUs are used: the samples of a step cannot be divided equally among more (%s)",
            count,
            gpus,
            batches_in_words(config, only),
        )
    return count


def interleaved(shares: Sequence[Sequence[Result]]) -> list[Result]:
    """The items whose `Ranks.mine` the shares are, in their order."""
    count = sum(map(len, shares))
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, AppError | None]:
    try:
        return work(), None
    except AppError as error:
        return None, error


def _told(error: AppError | None) -> tuple[int, str] | None:
    """What travels of an error: one with arguments of its own cannot be pickled."""
    return None if error is None else (error.exit_code, str(error))


def _same_kind(exit_code: int, text: str) -> AppError:
    kinds: list[type[AppError]] = [*AppError.__subclasses__(), AppError]
    return next(kind for kind in kinds if kind.exit_code == exit_code)(text)


@contextmanager
def _together() -> Iterator[None]:
    """A process that is gone is no mystery that needs a traceback: its own log says why."""
    try:
        yield
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise AppError(
            f"another process of this run is gone ({detail}); started again, the run goes on from its last checkpoint"
        ) from error
