"""What the first process of a run says of its attempt: in ledger, curves and status, and to a webhook."""

from __future__ import annotations

import logging
import time

import torch

from app.config import Config, StageConfig
from app.ops import ledger_table
from app.ops.costs import CostMeter, StageWork
from app.ops.crash_budget import Attempts
from app.ops.ledger import Ledger
from app.ops.ledger_history import History, Place
from app.ops.notify import RESUMED, STAGE_FINISHED, STARTED, Notifier
from app.ops.status import RunStatus
from app.ops.step_mark import StepMark, read_mark
from app.ops.writers import RunLog
from app.tags import COST, COST_AT_END, COST_PER_EPOCH, GOODPUT, INTERRUPTIONS, LEDGER, LOST_STEPS
from app.tags import RESUMED as RESUMED_TAG
from app.train.flops import step_tflop
from app.train.resume import ResumePoint, describe
from app.train.state import Progress
from app.workspace import RunDir

log = logging.getLogger(__name__)


class AttemptRecord:
    """An attempt from its resume point on.

    Args:
        run_dir: the run, with its lock held.
        ledger: the attempt's lines.
        notifier: sends what happens.
        run_log: the curves, rewound to the resume point.
        status: of the run.
        config: of the run.
        usd_per_hour: price of the machine; None where it is not known.
    """

    def __init__(
        self,
        run_dir: RunDir,
        ledger: Ledger,
        notifier: Notifier,
        run_log: RunLog,
        status: RunStatus,
        config: Config,
        usd_per_hour: float | None,
    ) -> None:
        self._run_dir, self._ledger, self._notifier, self._run_log = run_dir, ledger, notifier, run_log
        self._status, self._config, self._usd_per_hour = status, config, usd_per_hour
        self._meter: CostMeter | None = None
        self._history = History()
        self._mark: StepMark | None = None
        self._here = 0

    def begin(self, point: ResumePoint, stage: StageConfig, here: int, device: str) -> None:
        """Put on record that, where and after what loss the run goes on.

        Args:
            point: where it goes on.
            stage: in this stage.
            here: completed steps of all stages.
            device: what it runs on.
        """
        counters, seconds = point.counters, point.run_seconds
        attempts, mark = Attempts(self._run_dir), read_mark(self._run_dir.step_mark)
        before, seen = attempts.trained(), attempts.seen_end()
        lost = max(0, mark.global_step - here) if before and mark is not None else 0
        attempts.trains(stage.name, counters.step, here, lost)
        place = Place(device, stage.name, counters.epochs, counters.step, here, seconds)
        self._history = self._ledger.start(place, lost, mark if before else None, seen)
        self._status(run_seconds=seconds)
        where = {"stage": stage.name, "step": counters.step, "epoch": counters.epochs}
        if before:
            log.info("interruption %d of this run cost %d steps", len(before), lost)
            self._run_log.scalars({INTERRUPTIONS: len(before), LOST_STEPS: sum(before) + lost}, here)
            self._run_log.text(RESUMED_TAG, f"{describe(point)}; {lost} steps were lost", here)
            self._log_history(seconds, here)
            cost = f"{_ended(self._history)}; {lost} steps were lost"
            self._notifier.send(RESUMED, f"{describe(point)}, on {device}; {cost}", **where)
        else:
            self._notifier.send(STARTED, f"{describe(point)}, on {device}", **where)
        self._mark, self._here = StepMark(self._run_dir.step_mark, here, seconds), here
        self._meter = self._cost_meter(stage)

    def __call__(self, global_step: int, run_seconds: float) -> None:
        """This many steps of the run are completed, and this long they took."""
        if self._mark is not None:
            self._mark(global_step, run_seconds)
        self._ledger.stepped(global_step)
        if self._meter is not None and (points := self._meter(global_step)):
            self._run_log.scalars(points, global_step)
            self._status.note(usd_per_hour=self._usd_per_hour, **{_field(tag): usd for tag, usd in points.items()})

    def stage_ended(self, stage: StageConfig, progress: Progress, global_step: int) -> None:
        """All epochs of a stage are trained and saved."""
        goodput = self._history.goodput(progress.run_seconds, time.time())
        # At its resume point an attempt has a point already.
        if goodput is not None and global_step > self._here:
            self._run_log.scalars({GOODPUT: goodput}, global_step)
        best = f"best validation loss {progress.best_val_loss:.5f} after epoch {progress.best_epochs}"
        self._notifier.send(STAGE_FINISHED, best, stage=stage.name, step=progress.step, epoch=progress.epochs)

    def close(self) -> None:
        """Close the mark; the ledger's last line is written with the end of the attempt."""
        if self._mark is not None:
            self._mark.close()

    def _cost_meter(self, first: StageConfig) -> CostMeter | None:
        # What an earlier attempt said of its machine is not this one's.
        self._status.note(usd_per_hour=None, **{_field(tag): None for tag in (COST, COST_PER_EPOCH, COST_AT_END)})
        spent_usd = self._history.cost_usd(time.time(), self._usd_per_hour)
        # An unreadable ledger was warned of: what the run cost so far is not known.
        if self._usd_per_hour is None or spent_usd is None or not self._history.attempts:
            return None
        config = self._config
        left = config.stages[config.stages.index(first) :]
        stages = [
            StageWork(
                config.first_global_step(stage),
                stage.epochs * stage.steps_per_epoch,
                stage.steps_per_epoch,
                # To count takes a second or two, and the last stage is compared with nothing.
                step_tflop(config, stage) if len(left) > 1 else 1.0,
            )
            for stage in left
        ]
        return CostMeter(self._usd_per_hour, spent_usd, stages, config.logging.log_every_n_steps)

    def _log_history(self, run_seconds: float, here: int) -> None:
        history = self._history
        goodput = history.goodput(run_seconds, time.time())
        # Without the attempts of an older version or of an unreadable ledger there is nothing to say yet.
        if goodput is not None and len(history.attempts) > 1:
            self._run_log.scalars({GOODPUT: goodput}, here)
            self._run_log.text(LEDGER, ledger_table.markdown(history, goodput), here)


def device_name(device: torch.device, processes: int) -> str:
    """`NVIDIA H100 80GB HBM3 x 2`, or cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if processes == 1 else f"{name} x {processes}"


def _field(tag: str) -> str:
    """`cost_usd` in the status for `ops/cost_usd` in the curves."""
    return tag.rpartition("/")[2]


def _ended(history: History) -> str:
    previous = history.attempts[-1].previous if history.attempts else None
    if previous is None:
        return "how the attempt before ended is not known"
    code = "" if previous.code is None else f" (exit code {previous.code})"
    return f"the attempt before {previous.kind}{code}"
