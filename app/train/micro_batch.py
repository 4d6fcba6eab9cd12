"""How many samples a forward pass takes, and what happens where they do not fit into the device's memory.

The samples of an optimizer step stay the same, so a smaller micro-batch changes memory and speed, and the result by
rounding alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from app.config import Config, StageConfig
from app.errors import MachineError
from app.train.memory import memory_of, out_of_memory
from app.train.parallel import Ranks
from app.workspace import atomic_write

log = logging.getLogger(__name__)
T = TypeVar("T")

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""A CPU's allocator has no error of its own."""


class MicroBatchTooLarge(Exception):
    """A forward or backward pass did not fit, here or in another process of the run; no weight has moved."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` for a CPU, too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


@contextmanager
def refused_when_full(config: Config, stage: StageConfig, precision: str, device: torch.device) -> Iterator[None]:
    """What does not fit whatever the micro-batch ends in a message with a table of what would.

    Raises:
        MachineError: memory ran out.
    """
    try:
        with memory_errors():
            yield
    except torch.OutOfMemoryError as error:
        raise MachineError(out_of_memory(config, stage, precision, memory_of(device))) from error


class MicroBatches:
    """The sizes that fit here, remembered in a file of the run for devices that are no larger.

    Args:
        config: the run.
        file: where they are kept.
        device: of this process.
        precision: `fp32`, `bf16` or `fp16`.
        ranks: this process among those of the run; the first one reads and writes.
        say: told in words of each change.
    """

    def __init__(
        self,
        config: Config,
        file: Path,
        device: torch.device,
        precision: str,
        ranks: Ranks,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._config, self._file, self._device, self._precision = config, file, device, precision
        self._ranks, self._say = ranks, say
        self._card_bytes = memory_of(device)
        self._fits: dict[str, int] = ranks.first(self._read)

    def size(self, stage: StageConfig) -> int:
        """Samples of a forward pass of this process."""
        return self._ranks.micro_batch(stage, self._fits.get(stage.name))

    def until_it_fits(self, stage: StageConfig, work: Callable[[], T]) -> T:
        """Do `work`, and again with half the samples at a time as often as it raises `MicroBatchTooLarge`.

        Raises:
            MachineError: a single sample did not fit; the message has a table of what would.
        """
        while True:
            # The tensors of the failed attempt live as long as its exception, which ends here.
            with suppress(MicroBatchTooLarge):
                return work()
            self._halve(stage)

    def _halve(self, stage: StageConfig) -> None:
        before = self.size(stage)
        if self._device.type == "cuda":
            # What is cached in pieces of the old size is in the way of larger pieces.
            torch.cuda.empty_cache()
        if before == 1:
            raise MachineError(out_of_memory(self._config, stage, self._precision, self._card_bytes))
        self._fits[stage.name] = before // 2
        now = self.size(stage)
        text = (
            f"{stage.name}: {before} samples at a time did not fit into the {self._card_bytes / 2**30:.1f} GiB of the "
            f"device; from now on it takes {now} at a time. The {stage.batch} samples of a step stay the same, and so "
            f"do the curves. Remembered in {self._file.name}"
        )
        log.warning("%s", text)
        self._say(text)
        if self._ranks.is_first:
            self._write()

    def _read(self) -> dict[str, int]:
        try:
            kept = json.loads(self._file.read_text())
            # A larger card may take what this one did not.
            if self._card_bytes <= int(kept["device_bytes"]):
                return {str(name): int(size) for name, size in kept["fits"].items()}
            log.info("%s is of a smaller device and is not used", self._file.name)
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            log.warning("%s cannot be read (%s): sizes that do not fit are found out again", self._file, error)
        return {}

    def _write(self) -> None:
        content = {"device_bytes": self._card_bytes, "fits": self._fits}
        try:
            atomic_write(self._file, json.dumps(content).encode() + b"\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error.strerror)
