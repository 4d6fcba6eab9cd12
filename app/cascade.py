"""The whole run: prepare, find where it was, then for each stage: train, hand over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import torch

from app.attempt_record import AttemptRecord, device_name
from app.config import Config, StageConfig
from app.config_file import resolved_yaml
from app.data.cases import Case, CaseStore, Split, prepare, split_patients
from app.env import Environment
from app.errors import AppError, ConfigError, MachineError
from app.fall_back import fall_back_to_older
from app.ops.event_files import rewind
from app.ops.layout import layout
from app.ops.ledger import Ledger
from app.ops.notify import FINISHED, Notifier
from app.ops.panels import validation_panel
from app.ops.progress import ProgressPicture
from app.ops.run_lock import RunLock
from app.ops.status import RunStatus
from app.ops.telemetry import Telemetry
from app.ops.wandb_log import WandbLog, at_end_s
from app.ops.writers import RunLog, TensorBoardLog
from app.tags import CONFIG, keep_before
from app.train.checkpoint import CheckpointFolder
from app.train.handover import Parents, measure_training_cases, new_state
from app.train.micro_batch import MicroBatches, refused_when_full
from app.train.pace import Pace
from app.train.parallel import ALONE, Ranks
from app.train.precision import Precision, choose_algorithms, choose_device
from app.train.protocols import Grace, Stop
from app.train.rehearsal import Rehearsal
from app.train.resume import ResumePoint, describe, find_resume_point, resumed_precision
from app.train.samples import StageCases
from app.train.silent import SilentCheckpoints, SilentLog, SilentRecord, SilentStatus, SilentTelemetry
from app.train.stage import StageRun, train_stage
from app.train.take_over import take_over
from app.train.volume import expect_writable, volume_error
from app.workspace import RunDir, Workspace, atomic_write, remove_temporary_files

log = logging.getLogger(__name__)

SILENCE: tuple[SilentStatus, Callable[[], None], None] = (SilentStatus(), lambda: None, None)
"""In place of `_take`, in all processes of a run but the first."""
FOLLOWERS_ON_STOP_S = 1.0
"""For Weights & Biases where a killed pod leaves seconds; the next attempt sends the rest."""


def train(
    config: Config,
    workspace: Workspace,
    env: Environment,
    stop: Stop,
    grace: Grace,
    notifier: Notifier,
    began: float,
    only: Sequence[str] = (),
    fall_back: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Train the cascade from wherever it is to its end.

    Args:
        config: the run.
        workspace: where everything lies.
        env: secrets of Weights & Biases.
        stop: polled everywhere; True ends the run with its state saved.
        grace: how long that may take.
        notifier: sends what happens to a webhook.
        began: start of the process, in seconds since 1970.
        only: names of the stages to train; empty is all.
        fall_back: go on from the state before the newest one.
        ranks: this process among those that train the run together; only the first writes.

    Raises:
        AppError: see `app.errors` for the kinds and their exit codes.
    """
    device = ranks.everyone(lambda: _device(config, only, ranks))
    choose_algorithms(config.compute, device)
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    run_dir = workspace.run_dir(config.run_name)
    with ExitStack() as held:
        status, fence, ledger = ranks.everyone(
            lambda: _take(config, workspace, run_dir, held, stop, fall_back, env, began) if ranks.is_first else SILENCE
        )
        if isinstance(status, RunStatus):
            fields = status.fields
            notifier.where = lambda: fields
        made, split = ranks.first(lambda: _prepared(config, workspace, run_dir, stop))
        store = ranks.everyone(lambda: made if ranks.node == 0 else made.seen_from(workspace.cache))
        _Run(
            config, workspace, env, stop, grace, fence, run_dir, status, store, split, device, ranks, ledger, notifier
        ).train(only)


def _device(config: Config, only: Sequence[str], ranks: Ranks) -> torch.device:
    unknown = sorted(set(only) - {stage.name for stage in config.stages})
    if unknown:
        raise ConfigError(f"--stages {' '.join(unknown)}: no such stage; this config has {', '.join(_names(config))}")
    ranks.check(stage for stage in config.stages if not only or stage.name in only)
    return ranks.device(choose_device(config.compute))


def _take(
    config: Config,
    workspace: Workspace,
    run_dir: RunDir,
    held: ExitStack,
    stop: Stop,
    fall_back: bool,
    env: Environment,
    began: float,
) -> tuple[RunStatus, Callable[[], None], Ledger]:
    """Take the run folder while `held` is open; its status, the question whether it is still ours, its ledger."""
    workspace.ensure()
    run_dir.ensure()
    lock = held.enter_context(RunLock(run_dir.run_lock, stop))
    price = env.pod_cost_per_hour
    ledger = Ledger(run_dir, lock.check, _exit_code, began=began, pod=env.runpod_pod_id, usd_per_hour=price)
    held.enter_context(ledger)
    run_dir.reason.unlink(missing_ok=True)
    if fall_back:
        lock.check()
        fall_back_to_older(config, run_dir)
    status = RunStatus(run_dir)
    status(state="preparing data")
    return status, lock.check, ledger


def _exit_code(error: BaseException) -> int:
    if isinstance(error, AppError):
        return error.exit_code
    return AppError.exit_code if volume_error(error) is None else MachineError.exit_code


def _prepared(config: Config, workspace: Workspace, run_dir: RunDir, stop: Stop) -> tuple[CaseStore, Split]:
    report = prepare(config, workspace, stop=stop)
    if config.data.source == "ct":
        log.info("prepared cases:\n%s", report.table())
    store = CaseStore.open(config, workspace)
    return store, split_patients(store, config, run_dir)


class _Run:
    """One attempt at a run, with the lock held."""

    def __init__(
        self,
        config: Config,
        workspace: Workspace,
        env: Environment,
        stop: Stop,
        grace: Grace,
        fence: Callable[[], None],
        run_dir: RunDir,
        status: RunStatus | SilentStatus,
        store: CaseStore,
        split: Split,
        device: torch.device,
        ranks: Ranks,
        ledger: Ledger | None,
        notifier: Notifier,
    ) -> None:
        self.config, self.workspace, self.env, self.stop, self.grace = config, workspace, env, stop, grace
        self.run_dir, self.status, self.store, self.split, self.device = run_dir, status, store, split, device
        self.fence, self.ranks, self.ledger, self.notifier = fence, ranks, ledger, notifier
        self.checkpoints = CheckpointFolder(run_dir, fence) if ranks.is_first else SilentCheckpoints(run_dir)
        self.progress = ProgressPicture(run_dir.progress_png, run_dir.tensorboard, _names(config))
        self.cases = {side: _cases(store, ids) for side, ids in (("train", split.train), ("val", split.val))}
        self.parents = Parents(
            config, self.checkpoints, store, [*self.cases["train"], *self.cases["val"]], workspace.cache, ranks
        )

    def train(self, only: Sequence[str]) -> None:
        """Find the resume point, rewind the curves to it, train what is left."""
        point, precision_name = self.ranks.first(self._begin)
        precision = Precision(precision_name, self.device)
        if point.stage is None:
            log.info("all stages are finished; nothing to train in %s", self.run_dir.path)
            self._finish(news=not self.run_dir.done.exists())
            return
        log.info("%s", describe(point))
        first, self.run_seconds = point.stage, point.run_seconds
        pending = self.ranks.first(lambda: self._pending(first, only))
        self._rehearse(pending, precision)
        run_log, self.record, self.telemetry = self.ranks.everyone(lambda: self._records(point, first))
        try:
            for stage in pending:
                self._train_stage(stage, point if stage == point.stage else None, precision, run_log)
            if pending:
                self._draw(self.progress.write)
            if not only or self.config.stages[-1].name in only:
                self._finish(news=True)
                log.info("finished: all stages are trained; checkpoints in %s", self.run_dir.path)
            else:
                self.status.close("finished")
                self.notifier.send(FINISHED, f"--stages {' '.join(only)}: trained")
                log.info("finished: --stages %s", " ".join(only))
        finally:
            self.telemetry.close()
            self.record.close()
            on_stop = min(FOLLOWERS_ON_STOP_S, self.grace.seconds_left() / 2)
            run_log.close(on_stop if self.stop() else at_end_s(self.config))

    def _rehearse(self, stages: Sequence[StageConfig], precision: Precision) -> None:
        self.micro_batches = MicroBatches(
            self.config,
            self.run_dir.micro_batches,
            self.device,
            precision.name,
            self.ranks,
            lambda text: self.status(memory=text),
        )
        Rehearsal(
            self.config,
            self.store,
            self.cases["train"],
            self.cases["val"],
            self.device,
            precision,
            self.run_dir,
            self.status,
            self.micro_batches,
            self.stop,
            self.ranks,
        ).run(stages)

    def _begin(self) -> tuple[ResumePoint, str]:
        """Where the run goes on, and the name of its precision; what the first process does to find out."""
        self.fence()
        remove_temporary_files(self.run_dir.path)
        self.checkpoints.recover_manifest()
        if self.config.init_from is not None:
            other = CheckpointFolder(self.workspace.run_dir(self.config.init_from))
            take_over(self.config, self.checkpoints, other, self.split.fingerprint)
        point = find_resume_point(self.config, self.checkpoints)
        precision = resumed_precision(point, self.config, self.run_dir.path, self.device)
        atomic_write(self.run_dir.config, resolved_yaml(self.config.without_paths()).encode())
        return point, precision

    def _records(
        self, point: ResumePoint, stage: StageConfig
    ) -> tuple[RunLog | SilentLog, AttemptRecord | SilentRecord, Telemetry | SilentTelemetry]:
        """Where this process's curves and steps go from the resume point on, and what is read beside them."""
        if self.ledger is None or not isinstance(self.status, RunStatus):
            self.pace = Pace(1.0)
            return SilentLog(), SilentRecord(), SilentTelemetry()
        self.pace = Pace(expect_writable(self.run_dir.path))
        self._rewind(point)
        run_log = self._open_log()
        price = self.env.pod_cost_per_hour
        record = AttemptRecord(self.run_dir, self.ledger, self.notifier, run_log, self.status, self.config, price)
        here = self.config.first_global_step(stage) + point.counters.step
        record.begin(point, stage, here, device_name(self.device, self.ranks.size))
        gpus = min(self.ranks.size, torch.cuda.device_count()) if self.device.type == "cuda" else 0
        return run_log, record, Telemetry.of_run(self.config, self.run_dir, gpus)

    def _pending(self, first: StageConfig, only: Sequence[str]) -> list[StageConfig]:
        """The stages to train now: from `first` on, all of them or those in `only`, without a gap.

        Raises:
            ConfigError: a stage is asked for whose predecessor is not finished.
        """
        pending = list(self.config.stages[self.config.stages.index(first) :])
        chosen = [stage for stage in pending if not only or stage.name in only]
        for needed, stage in zip(pending, chosen, strict=False):
            if needed != stage:
                raise ConfigError(
                    f"--stages {stage.name}: {needed.name} comes before it and is not finished. Train it first, or "
                    "take it over from another run with init_from"
                )
        return chosen

    def _finish(self, news: bool) -> None:
        if self.ranks.is_first:
            if news:
                self.notifier.send(FINISHED, "all stages are trained")
            atomic_write(self.run_dir.done, b"all stages are finished\n")
        self.status.close("finished")

    def _train_stage(
        self, stage: StageConfig, point: ResumePoint | None, precision: Precision, run_log: RunLog | SilentLog
    ) -> None:
        self.status(state="training", stage=stage.name)
        lowres = self.parents.lowres(stage, self.device, precision, self.stop)
        train = StageCases(self.store, self.cases["train"], stage.resolution, lowres)
        val = StageCases(self.store, self.cases["val"], stage.resolution, lowres)
        state = new_state(
            self.config, stage, self.device, precision, self.split.fingerprint, self.parents.parent_hash(stage)
        )
        if point is None or point.payload is None:
            measure_training_cases(state, train)
            state.progress.run_seconds = self.run_seconds
        else:
            payload, source = point.payload, point.source
            self.ranks.everyone(lambda: state.restore(payload, source))
        self.ranks.share([*state.model.state_dict().values(), *state.ema.model.state_dict().values()])
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        log.info(
            "%s: %.2f M parameters, %d training and %d validation cases, %d epochs of %d steps, %s on %s%s",
            stage.name,
            parameters / 1e6,
            len(train),
            len(val),
            stage.epochs,
            stage.steps_per_epoch,
            precision.name,
            self.device,
            f" and {self.ranks.size - 1} more" if self.ranks.size > 1 else "",
        )
        run = StageRun(
            train=train,
            val=val,
            checkpoints=self.checkpoints,
            pace=self.pace,
            run_log=run_log,
            draw=validation_panel,
            status=self.status,
            telemetry=self.telemetry,
            stop=self.stop,
            grace=self.grace,
            mark=self.record,
            after_epoch=lambda: self._draw(self.progress.write_sometimes),
            first_global_step=self.config.first_global_step(stage),
            micro_batches=self.micro_batches,
            ranks=self.ranks,
        )
        with refused_when_full(self.config, stage, precision.name, self.device):
            train_stage(state, run)
        self.run_seconds = state.progress.run_seconds
        self.record.stage_ended(stage, state.progress, run.first_global_step + state.progress.step)

    def _draw(self, write: Callable[[str, float | None], None]) -> None:
        """Have the progress picture written."""
        if isinstance(self.status, SilentStatus):
            return
        fields = self.status.fields
        headline = f"{fields['stage']}, epoch {fields['epoch']} of {fields['epochs']}"
        try:
            write(headline, self.status.eta_s())
        except OSError as error:
            log.warning("%s cannot be written: %s", self.run_dir.progress_png, error.strerror)

    def _rewind(self, point: ResumePoint) -> None:
        stage, counters = point.stage, point.counters
        if stage is None:
            return
        # Before the first step the validation is done again, and with it the points at epoch 0.
        epochs = counters.epochs if counters.step > 0 else -1
        keep = keep_before(
            _names(self.config),
            stage.name,
            step=counters.step,
            epochs=epochs,
            global_step=self.config.first_global_step(stage) + counters.step,
        )
        self.fence()
        report = rewind(self.run_dir.tensorboard, keep)
        if report.files:
            log.info("curves: %d points beyond the checkpoint were taken back", report.dropped)

    def _open_log(self) -> RunLog:
        curves = TensorBoardLog(self.run_dir.tensorboard, self.config.logging.flush_s, fence=self.fence)
        followers = []
        if self.env.wandb_on:
            mode: Literal["online", "offline"] = "offline" if self.env.wandb_mode == "offline" else "online"
            followers.append(WandbLog(self.run_dir, self.config, mode, device_name(self.device, self.ranks.size)))
        run_log = RunLog(curves, followers)
        run_log.layout(layout(_names(self.config)))
        run_log.text(
            CONFIG, "\n".join(f"    {line}" for line in resolved_yaml(self.config.without_paths()).splitlines()), 0
        )
        return run_log


def _names(config: Config) -> list[str]:
    return [stage.name for stage in config.stages]


def _cases(store: CaseStore, ids: Sequence[str]) -> list[Case]:
    """In the order of their content, which does not depend on the workspace's pseudonyms."""
    by_id = {case.id: case for case in store.cases}
    return sorted((by_id[case_id] for case_id in ids), key=lambda case: case.content)
