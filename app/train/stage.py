"""The training loop of one stage. A stage is one run: the cascade is a for loop over this.

Shapes: B batch, b micro-batch, N cube edge.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.errors import NumericsError, Stopped
from app.tags import ALARM, VAL_GAIN, VAL_PROJECTION_ERROR, VAL_PSNR, VAL_XRAY_USE
from app.train.checkpoint import CheckpointFolder, kinds_at_epoch_end
from app.train.flops import peak_tflop_per_s, training_tflop
from app.train.micro_batch import MicroBatches
from app.train.pace import Pace
from app.train.parallel import ALONE, Ranks
from app.train.protocols import Draw, Grace, RunLog, Status, Stop, Telemetry
from app.train.randomness import epoch_order
from app.train.samples import Batch, StageCases, batches
from app.train.saver import Saver, SaveReport
from app.train.schedule import learning_rate, physics_weight
from app.train.silent import SilentSaver
from app.train.speed import Speed, Waited
from app.train.state import StageState
from app.train.step import StepValues, train_step
from app.train.validation import Validation, validate

log = logging.getLogger(__name__)

ALARM_BELOW_DB = 0.3
ALARM_AFTER = 0.1
"""Share of the stage's epochs that is left alone, like the steps of the warm-up."""
ALARM_AFTER_VALIDATIONS = 3
"""So many in a row are needed: one alone may be a swing of the averaged weights."""


@dataclass(frozen=True)
class StageRun:
    """What a stage trains with: data, places to write to, and the question whether to stop."""

    train: StageCases
    val: StageCases
    checkpoints: CheckpointFolder
    pace: Pace
    run_log: RunLog
    draw: Draw
    status: Status
    telemetry: Telemetry
    stop: Stop
    grace: Grace
    mark: Callable[[int, float], None]
    """Told of each completed step, counted over all stages, and of the seconds that all of them took."""
    after_epoch: Callable[[], None]
    """Called when an epoch is complete and saved."""
    first_global_step: int
    """Optimizer steps of all earlier stages; `perf/`, `gpu/` and `host/` tags stand on the sum."""
    micro_batches: MicroBatches
    """How many samples fit into a forward pass."""
    ranks: Ranks = ALONE
    """This process among those that train the stage together; what writes is silent but in the first."""


def train_stage(state: StageState, run: StageRun) -> None:
    """Train from wherever `state` is to the end of the stage.

    Raises:
        Stopped: asked to stop; the state of the last completed step is saved.
        NumericsError: a loss or gradient is not finite; no weight has moved since the last completed step.
    """
    stage, progress, config = state.stage, state.progress, state.config
    state.model.train()
    saver = (
        Saver(run.checkpoints, config.checkpoint, run.pace, run.run_log.flush, run.grace, run.status)
        if run.ranks.is_first
        else SilentSaver()
    )
    speed = _speed(state, run.ranks)
    try:
        if progress.step == 0:
            _log_validation(state, run, _validate(state, run))
            saver.save(state, ["last"])
        elif state.step_in_epoch == 0:
            _complete_files(state, run, saver)
        while progress.epochs < stage.epochs:
            run.micro_batches.until_it_fits(stage, lambda: _train_epoch(state, run, saver, speed))
            _end_epoch(state, run, saver)
        # The first process may be stopped while it waits for the volume, and the others would wait for it.
        run.ranks.everyone(saver.drain)
    except Stopped:
        here = f"epoch {progress.epochs}, step {progress.step}"
        if saver.save_before_leaving(state):
            log.info("%s: stopped at %s; the state is saved", stage.name, here)
        else:
            log.warning("%s: stopped at %s; an earlier state is saved, and some steps are repeated", stage.name, here)
        raise
    finally:
        saver.close()
        _tell_status(run, saver.report())


def _speed(state: StageState, ranks: Ranks) -> Speed:
    peak = peak_tflop_per_s(state.precision.device, state.precision.name)
    tflop = state.stage.batch * training_tflop(state.model)
    return Speed(state.stage.batch, tflop, None if peak is None else peak * ranks.size)


def _train_epoch(state: StageState, run: StageRun, saver: Saver, speed: Speed) -> None:
    """The steps that are left of the epoch under way."""
    config, stage, progress = state.config, state.stage, state.progress
    weight = physics_weight(progress.epochs, stage, config.physics)
    loader = Waited(_epoch_batches(state, run), run.telemetry.waits)
    tick = time.monotonic()
    while state.step_in_epoch < stage.steps_per_epoch:
        values = train_step(state, loader, weight, run.stop, run.ranks)

        now = time.monotonic()
        seconds, tick = now - tick, now
        progress.step += 1
        global_step, waited_s = run.first_global_step + progress.step, loader.take_s()
        progress.run_seconds += seconds
        run.mark(global_step, progress.run_seconds)
        speed.step(seconds, waited_s)
        run.telemetry.step(global_step, seconds, waited_s)
        progress.diffusion_sum += values.diffusion
        progress.physics_sum += values.physics
        progress.epoch_seconds += seconds
        run.pace.step(seconds, saver.writing())
        if progress.step == 1 or progress.step % config.logging.log_every_n_steps == 0:
            _log_step(state, run, values, weight)
            run.run_log.scalars({**speed.scalars(), **run.telemetry.scalars()}, global_step)
        run.status(
            stage=stage.name,
            epoch=progress.epochs,
            epochs=stage.epochs,
            step=progress.step,
            steps=stage.epochs * stage.steps_per_epoch,
            loss=values.diffusion + weight * values.physics,
            step_seconds=seconds,
            run_seconds=progress.run_seconds,
        )
        _report_save(state, run, saver)
        steps_left = stage.steps_per_epoch - state.step_in_epoch
        if saver.save_if_due(state, epoch_ends_in_s=steps_left * seconds):
            tick = time.monotonic()


def _epoch_batches(state: StageState, run: StageRun) -> Iterator[Batch]:
    """This process's micro-batches of the epoch under way, from the next step on."""
    config, stage = state.config, state.stage
    samples = stage.steps_per_epoch * stage.batch
    order = epoch_order(len(run.train), samples, config.seed, stage.name, state.progress.epochs)
    order = order[state.step_in_epoch * stage.batch :]
    chunks = run.ranks.micro_batches(order, stage, run.micro_batches.size(stage))
    device = state.model.mean.device
    return batches(run.train, chunks, device, config.data.hu_window, config.compute.workers)


def _end_epoch(state: StageState, run: StageRun, saver: Saver) -> None:
    """Validate, log, count the epoch as completed, save."""
    config, stage, progress = state.config, state.stage, state.progress
    started = time.monotonic()
    validation = _validate(state, run)
    validation_seconds = time.monotonic() - started
    progress.epoch_seconds += validation_seconds
    progress.run_seconds += validation_seconds
    run.mark(run.first_global_step + progress.step, progress.run_seconds)
    weight = physics_weight(progress.epochs, stage, config.physics)
    diffusion = progress.diffusion_sum / stage.steps_per_epoch
    physics = progress.physics_sum / stage.steps_per_epoch
    train_loss, epoch_seconds = diffusion + weight * physics, progress.epoch_seconds

    progress.epochs += 1
    progress.diffusion_sum = progress.physics_sum = progress.epoch_seconds = 0.0
    progress.val_loss = validation.diffusion + config.physics.weight * validation.physics
    is_best = progress.val_loss < progress.best_val_loss
    if is_best:
        progress.best_val_loss, progress.best_epochs = progress.val_loss, progress.epochs
    run.run_log.scalars(
        {
            f"{stage.name}/train_loss": train_loss,
            f"{stage.name}/train_diffusion": diffusion,
            f"{stage.name}/train_physics": physics,
            f"{stage.name}/epoch_time": epoch_seconds,
            f"{stage.name}/learning_rate": learning_rate(progress.step, stage, config.optimizer),
            f"{stage.name}/physics_weight": weight,
        },
        progress.epochs,
    )
    _log_validation(state, run, validation)
    log.info(
        "%s epoch %d/%d step %d: train_loss %.5f val_loss %.5f%s%s (%.1f s)",
        stage.name,
        progress.epochs,
        stage.epochs,
        progress.step,
        train_loss,
        progress.val_loss,
        f" psnr {validation.sampled.psnr_db:.2f} dB",
        " best" if is_best else "",
        epoch_seconds,
    )
    _raise_alarm(state, run, validation)
    saver.save(state, _kinds(state))
    run.status(
        epoch=progress.epochs,
        val_loss=progress.val_loss,
        best_val_loss=progress.best_val_loss,
        train_loss=train_loss,
    )
    run.run_log.write()
    run.after_epoch()


def _kinds(state: StageState) -> list[str]:
    """The files that the state at the end of an epoch belongs in."""
    progress, every = state.progress, state.config.checkpoint.save_every_n_epochs
    is_best = progress.best_epochs == progress.epochs
    return kinds_at_epoch_end(progress.epochs, state.stage.epochs, every, is_best)


def _complete_files(state: StageState, run: StageRun, saver: Saver) -> None:
    """Write what a kill between two files of an epoch's end has left out."""
    counters = state.progress.counters
    there = {entry.kind for entry in run.checkpoints.entries(state.stage.name) if entry.counters == counters}
    missing = [kind for kind in _kinds(state) if kind not in there]
    if missing:
        saver.save(state, missing)


def _validate(state: StageState, run: StageRun) -> Validation:
    config, epochs = state.config, state.progress.epochs + 1
    is_last = epochs == state.stage.epochs
    shown = config.validation.pictures if is_last or epochs % config.logging.images_every_n_epochs == 0 else 0
    with state.precision.autocast():
        validation = validate(state.ema.model, run.val, run.train, config, shown, run.stop, run.ranks)
    if not math.isfinite(validation.diffusion + validation.physics):
        raise NumericsError(
            f"{state.stage.name}: the validation loss after {state.progress.epochs} epochs is not finite. The last "
            "checkpoint holds the state before it. Lower the stage's learning_rate in a new run"
        )
    return validation


def _log_validation(state: StageState, run: StageRun, validation: Validation) -> None:
    """The held-out figures and pictures at the number of completed epochs."""
    stage, epochs = state.stage.name, state.progress.epochs
    values = {
        f"{stage}/val_loss": validation.diffusion + state.config.physics.weight * validation.physics,
        f"{stage}/val_diffusion": validation.diffusion,
        f"{stage}/val_physics": validation.physics,
    }
    if run.ranks.is_first:
        sampled = validation.sampled
        values[f"{stage}/{VAL_PSNR}"] = sampled.psnr_db
        values[f"{stage}/{VAL_GAIN}"] = sampled.gain_over_c_db
        values[f"{stage}/{VAL_XRAY_USE}"] = sampled.xray_use_db
        values[f"{stage}/{VAL_PROJECTION_ERROR}"] = sampled.projection_error_percent
    run.run_log.scalars(values, epochs)
    for number, case in enumerate(validation.pictures, start=1):
        run.run_log.image(f"{stage}/held_out_{number}", run.draw(case), epochs)


def _raise_alarm(state: StageState, run: StageRun, validation: Validation) -> None:
    """Say aloud that a network which looks trained adds nothing to its volume, or does not look at its X-rays."""
    stage, progress, sampled = state.stage, state.progress, validation.sampled
    warm = progress.step > state.config.optimizer.warmup_steps and progress.epochs > ALARM_AFTER * stage.epochs
    idle = min(sampled.gain_over_c_db, sampled.xray_use_db) < ALARM_BELOW_DB
    # The count is the first process's own: it alone samples, and it alone saves.
    progress.idle_validations = progress.idle_validations + 1 if warm and idle else 0
    alarm = None
    if progress.idle_validations >= ALARM_AFTER_VALIDATIONS:
        alarm = (
            f"{stage.name}: after {progress.epochs} of {stage.epochs} epochs the network adds "
            f"{sampled.gain_over_c_db:.2f} dB to the volume that it is given, and loses {sampled.xray_use_db:.2f} dB "
            f"with another patient's X-rays; below {ALARM_BELOW_DB} dB it has learned next to nothing from them. Look "
            "at the pictures and at whether the X-rays belong to the CTs; then more steps, a higher learning_rate or a "
            "smaller patch"
        )
        log.warning("%s", alarm)
        run.run_log.text(f"{stage.name}/{ALARM}", alarm, progress.epochs)
    run.status(alarm=alarm)


def _log_step(state: StageState, run: StageRun, values: StepValues, weight: float) -> None:
    stage, step = state.stage, state.progress.step
    run.run_log.scalars(
        {
            f"{stage.name}/train_loss_step": values.diffusion + weight * values.physics,
            f"{stage.name}/train_diffusion_step": values.diffusion,
            f"{stage.name}/train_physics_step": values.physics,
            f"{stage.name}/gradient_norm_step": values.gradient_norm,
        },
        step,
    )


def _report_save(state: StageState, run: StageRun, saver: Saver) -> None:
    """What the newest save cost, where there was one since the last call; at most once per step."""
    report = saver.report()
    if report is not None:
        run.run_log.scalars(report.scalars, run.first_global_step + state.progress.step)
        _tell_status(run, report)


def _tell_status(run: StageRun, report: SaveReport | None) -> None:
    if report is not None:
        run.status(checkpoint=report.step, checkpoint_file=report.file)
