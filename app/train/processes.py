"""How many processes a machine starts for a run; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from app.config import Config
from app.errors import MachineError


def processes_of(config: Config, only: Sequence[str], gpus: int, machines: int) -> int:
    """As many as the config asks for; with `auto` one per GPU, as far as each stage's batch can be divided.

    Args:
        config: the run.
        only: names of the stages to train; empty is all.
        gpus: of this machine that the run may use.
        machines: that train it together.

    Raises:
        MachineError: the config asks for more processes than there are GPUs.
    """
    wanted = config.compute.processes
    if wanted != "auto":
        if 0 < gpus < wanted:
            raise MachineError(
                f"compute.processes is {wanted}, and torch finds {gpus} GPUs here. Give as many as there are, or `auto`"
            )
        return wanted
    batches = [stage.batch for stage in config.stages if not only or stage.name in only]
    divides = [count for count in range(1, gpus + 1) if all(batch % (count * machines) == 0 for batch in batches)]
    return max(divides, default=max(gpus, 1))


def batches_in_words(config: Config, only: Sequence[str]) -> str:
    """What has to be divided."""
    stages = [stage for stage in config.stages if not only or stage.name in only]
    return ", ".join(f"stages.{stage.name}.batch is {stage.batch}" for stage in stages)
