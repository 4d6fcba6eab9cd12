"""What a run costs: so far, an epoch of it, and at its end, where a price per hour is known.

An attempt costs from the start of its process to its last sign of life. What a pod costs before and after, while it
waits for data or keeps the dashboard up, and what its disk costs, is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.ops.ledger_history import History, read_history
from app.ops.ledger_table import duration
from app.ops.step_mark import read_mark
from app.tags import COST, COST_AT_END, COST_PER_EPOCH
from app.workspace import RunDir

HOUR_S = 3600.0


@dataclass(frozen=True)
class StageWork:
    """What there is to do in a stage."""

    first_global_step: int
    """Optimizer steps of all stages before it."""
    steps: int
    steps_per_epoch: int
    tflop: float
    """Of one step; what counts is its ratio to that of other stages."""


class CostMeter:
    """The points of the cost curves of an attempt.

    Args:
        usd_per_hour: price of the machine.
        spent_usd: what all attempts cost until now, this one included.
        stages: the stage that goes on and all later ones, in their order.
        every_n_steps: `logging.log_every_n_steps`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        usd_per_hour: float,
        spent_usd: float,
        stages: Sequence[StageWork],
        every_n_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._usd_per_s, self._spent_usd, self._every = usd_per_hour / HOUR_S, spent_usd, every_n_steps
        self._stages, self._clock, self._began = list(stages), clock, clock()
        self._first: tuple[float, int] | None = None
        """(time, steps over all stages) at the first step of this attempt in the stage under way."""
        self._newest = -1

    def __call__(self, global_step: int) -> dict[str, float]:
        """So many steps over all stages are completed: the points at this step; none between two points."""
        now = self._clock()
        if global_step <= self._newest:
            return {}
        self._newest = global_step
        while global_step > self._stages[0].first_global_step + self._stages[0].steps:
            self._stages.pop(0)
            self._first = None
        stage, first = self._stages[0], self._first
        self._first = first or (now, global_step)
        step = global_step - stage.first_global_step
        if step != 1 and step % self._every:
            return {}
        spent = self._spent_usd + self._usd_per_s * (now - self._began)
        if first is None:
            return {COST: spent}
        usd_per_step = self._usd_per_s * (now - first[0]) / (global_step - first[1])
        left = stage.steps - step + sum(later.steps * later.tflop / stage.tflop for later in self._stages[1:])
        return {
            COST: spent,
            COST_PER_EPOCH: usd_per_step * stage.steps_per_epoch,
            COST_AT_END: spent + usd_per_step * left,
        }


@dataclass(frozen=True)
class Spent:
    """What all attempts at a run took, up to their last sign of life."""

    attempts: int
    seconds: float
    usd: float | None
    """None where no price is known."""


def spent(run_dir: RunDir, usd_per_hour: float | None = None) -> Spent:
    """What the ledger of a run says.

    Args:
        run_dir: the run.
        usd_per_hour: of attempts on a pod whose price was not known.

    Raises:
        OSError: the volume does not answer.
    """
    return spent_by(read_history(run_dir.ledger), run_dir, usd_per_hour)


def spent_by(history: History, run_dir: RunDir, usd_per_hour: float | None = None) -> Spent:
    """The same of a ledger that is read already."""
    if not history.attempts:
        return Spent(0, 0.0, None if usd_per_hour is None else 0.0)
    mark = read_mark(run_dir.step_mark)
    until = max(history.attempts[-1].last_sign, (mark and mark.time) or 0.0)
    return Spent(len(history.attempts), sum(history.spent_s(until)), history.cost_usd(until, usd_per_hour))


def cost_lines(costs: Spent, fields: Mapping[str, Any]) -> list[str]:
    """What a person wants to know of it, in a line; none where no price is known.

    Args:
        costs: by the ledger.
        fields: of the status.
    """
    if costs.usd is None:
        return []
    text = f"{costs.usd:.2f} USD so far, in {duration(costs.seconds)}"
    if "usd_per_hour" in fields:
        text += f"; {fields['usd_per_hour']:g} USD per hour"
    if "cost_at_end_usd" in fields and fields.get("state") == "training":
        text += (
            f"; an epoch of {fields['stage']} costs {fields['cost_per_epoch_usd']:.2f} USD, the run "
            f"{fields['cost_at_end_usd']:.2f} USD at this pace"
        )
    return [text]
