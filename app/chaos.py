"""A rehearsal of losing machines: a run is killed again and again, then compared with one that nobody killed."""

from __future__ import annotations

import bisect
import json
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.chaos_compare import Reference, lasting_checkpoints
from app.chaos_plan import Plan
from app.chaos_trainer import KILL, TERM, Attempt, Moments, Trainer, shortest_interval_s
from app.chaos_verdict import KillRecord, Verdict
from app.config import Config
from app.errors import AppError, ConfigError, MachineError
from app.ops.crash_budget import progress, read_lines
from app.ops.event_files import EventReader
from app.ops.step_mark import marked
from app.tags import axis, step_axis
from app.train.checkpoint import UNREADABLE_PAYLOAD
from app.train.protocols import Stop
from app.workspace import RunDir, Workspace

log = logging.getLogger(__name__)

STARTUP_S = 5.0
"""Of a trainer until it trains, where no reference was timed."""
GIVE_UP = 3
"""Starts in a row that end by themselves with an error."""
OVERDUE_S, OVERDUE_RUNS = 600.0, 10
"""An attempt that nobody kills may take this many times the undisturbed run, and this long besides."""


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody killed."""

    state: Reference
    clock: Sequence[tuple[int, float]]
    """When it had completed how many steps over all stages, at first and at last; at least one."""
    wall_s: float | None
    """None where nobody measured it."""
    startup_s: float
    """Until it trained, preparation included."""

    def left_s(self, global_step: int) -> float:
        """Training that it had left after this many steps."""
        at = bisect.bisect_right(self.clock, (global_step, math.inf)) - 1
        return self.clock[-1][1] - self.clock[max(0, at)][1]


def rehearse(config: Config, plan: Plan, home: Workspace, stop: Stop) -> Verdict:
    """Train undisturbed, train through kills until all are used up, compare.

    Args:
        config: of the run.
        plan: how to kill it, and where.
        home: the user's workspace, whose data folder is read.
        stop: True ends the rehearsal and its trainers.

    Raises:
        ConfigError: the plan cannot be followed.
        AppError: the undisturbed run did not finish.
        Stopped: the rehearsal was asked to stop.
    """
    if config.init_from is not None:
        raise ConfigError(
            f"init_from: {config.init_from}: a rehearsal runs in an empty workspace, which has no other run to take "
            "stages from. Add --set init_from=null to rehearse the run from its beginning"
        )
    arguments = list(plan.arguments)
    if config.data.source == "ct" and config.data.path is None:
        # The scratch workspaces have no data of their own.
        arguments += ["--set", f"data.path={json.dumps(str(home.data.resolve()))}"]
    given = None if plan.reference is None else _given(plan.reference, config)
    scratch, passed = _scratch(plan.workspace), False
    try:
        verdict = _Rehearsal(config, plan, arguments, scratch, stop).run(given)
        passed = verdict.passed
    finally:
        if plan.workspace is None and passed:
            shutil.rmtree(scratch)
        else:
            log.info("kept for you to look at, and yours to delete: %s", scratch)
    return verdict


def _scratch(given: Path | None) -> Path:
    if given is None:
        return Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        given.mkdir(parents=True, exist_ok=True)
        if any(given.iterdir()):
            raise ConfigError(f"--workspace {given}: expected an empty folder or none, found files in it")
    except OSError as error:
        raise MachineError(f"--workspace {given}: cannot be used: {error.strerror}") from error
    return given.resolve()


def _given(folder: Path, config: Config) -> Undisturbed:
    """A finished run that lies somewhere; how long it trained, by its curves."""
    run_dir = RunDir(folder)
    if not any(path.name.endswith("_final.pt") for path in lasting_checkpoints(run_dir).values()):
        raise ConfigError(
            f"--reference {folder}: expected the run folder of a finished run, found no stage_..._final.pt in it. A "
            "kept rehearsal has one in reference/hybrid_vit_cascade/checkpoints/"
        )
    try:
        state = Reference(run_dir)
    except UNREADABLE_PAYLOAD as error:
        raise ConfigError(f"--reference {folder}: a checkpoint cannot be read: {error}") from error
    return Undisturbed(state, _clock(run_dir, config), None, STARTUP_S)


def _clock(run_dir: RunDir, config: Config) -> list[tuple[int, float]]:
    first = {step_axis(stage.name): config.first_global_step(stage) for stage in config.stages}
    points, times = [], [0.0]
    for event in EventReader(run_dir.tensorboard).poll():
        times.append(event.wall_time)
        for value in event.summary.value:
            if axis(value.tag) in first:
                points.append((first[axis(value.tag)] + event.step, event.wall_time))
                break
    began = min(times[1:], default=0.0)
    return [(0, began), *sorted(points), (sys.maxsize, max(times))]


class _Rehearsal:
    """The rounds of one rehearsal."""

    def __init__(self, config: Config, plan: Plan, arguments: Sequence[str], scratch: Path, stop: Stop) -> None:
        self.config, self.plan, self.arguments, self.scratch, self.stop = config, plan, arguments, scratch, stop
        self.warm_startup_s: float | None = None
        """The shortest time that a start took until it trained; preparing data is not in it, once that is done."""

    def run(self, given: Undisturbed | None) -> Verdict:
        """Everything."""
        undisturbed = self._train_reference() if given is None else given
        plan, names = self.plan, [f"{stage.name}_final.pt" for stage in self.config.stages]
        finals = {name: undisturbed.state.hashes[name] for name in names if name in undisturbed.state.hashes}
        verdict = Verdict(plan.config_name, plan.how, plan.seed, plan.kills, finals, undisturbed.wall_s)
        moments = Moments(plan.seed, plan.how, shortest_interval_s(self.config.checkpoint.save_every_s))
        while len(verdict.kills) < plan.kills:
            before = len(verdict.kills)
            victim = _Victim(self, verdict.rounds + 1, undisturbed, moments, verdict)
            if not victim.run():
                break
            victim.compare()
            if len(verdict.kills) == before:
                moments.hurry()
        return verdict

    def trainer(self, name: str) -> tuple[Trainer, RunDir]:
        """Of a workspace below the scratch folder."""
        root = self.scratch / name
        return Trainer(self.arguments, root, self.stop), Workspace(root).run_dir(self.config.run_name)

    def _train_reference(self) -> Undisturbed:
        log.info("training the reference, which nobody kills, in %s", self.scratch / "reference")
        trainer, run_dir = self.trainer("reference")
        attempt = trainer.run()
        if attempt.code != 0:
            raise AppError(
                f"the reference, which nobody killed, ended with exit code {attempt.code}; there is nothing to "
                f"rehearse before it finishes. Its last lines:\n{attempt.tail}"
            )
        started = _train_events(run_dir)
        startup_s = started[0]["time"] - attempt.began if started else STARTUP_S
        log.info("the reference took %.1f s, %.1f s of them before it trained", attempt.wall_s, startup_s)
        return Undisturbed(Reference(run_dir), _clock(run_dir, self.config), attempt.wall_s, startup_s)


class _Victim:
    """One run that is killed until it finishes."""

    def __init__(
        self, rehearsal: _Rehearsal, number: int, undisturbed: Undisturbed, moments: Moments, verdict: Verdict
    ) -> None:
        self.rehearsal, self.undisturbed, self.moments, self.verdict = rehearsal, undisturbed, moments, verdict
        self.name = f"victim-{number}"
        self.trainer, self.run_dir = rehearsal.trainer(self.name)
        self.config, self.planned = rehearsal.config, rehearsal.plan.kills
        kills = self.planned - len(verdict.kills)
        self.last_kill = len(verdict.kills) + moments.kills_in(undisturbed.left_s(0), kills)
        """How many kills there will have been after those that this run takes."""
        self.unresolved: list[KillRecord] = []
        """Kills after which no attempt has trained yet."""
        self.reached = 0
        """Completed steps over all stages, saved or not, when the last attempt died that trained."""

    def run(self) -> bool:
        """Start, kill, start again, until it ends with 0; False where it does not."""
        stalled = failures = 0
        while failures < GIVE_UP:
            saved, step, mark = progress(self.run_dir), self._saved_step(), self._mark_written()
            events = len(_train_events(self.run_dir))
            attempt = self._attempt(stalled)
            self.verdict.victims_s += attempt.wall_s
            trained = _train_events(self.run_dir)[events:]
            if trained:
                self._went_on(trained[0], step, attempt)
            if attempt.code == 0:
                self._report_unresolved(None)
                self.verdict.rounds += 1
                return True
            if attempt.sent == TERM or (attempt.sent == KILL and attempt.code == -9 and not attempt.overdue):
                failures = 0
                self._killed(attempt, trained, self._mark_written() != mark)
            else:
                failures += 1
                self._failed(attempt)
            stalled = 0 if progress(self.run_dir) > saved else stalled + 1
        self._report_unresolved(None)
        return False

    def compare(self) -> None:
        """With the reference; a victim that is equal is deleted where the scratch folder will be."""
        state, verdict = self.undisturbed.state, self.verdict
        checkpoints, curves = state.different_checkpoints(self.run_dir), state.different_curves(self.run_dir)
        verdict.checkpoints += len(state.hashes)
        verdict.curves += len(state.curves)
        verdict.different_checkpoints += [f"{self.name}: {text}" for text in checkpoints]
        verdict.different_curves += [f"{self.name}: {text}" for text in curves]
        if checkpoints or curves:
            log.error("%s: finished, and differs from the reference: %s", self.name, (checkpoints + curves)[0])
            return
        log.info("%s: finished, equal to the reference", self.name)
        if self.rehearsal.plan.workspace is None:
            shutil.rmtree(self.rehearsal.scratch / self.name)

    def _attempt(self, stalled: int) -> Attempt:
        if len(self.verdict.kills) >= self.planned:
            usual = self.undisturbed.wall_s or self.undisturbed.left_s(0)
            return self.trainer.run(limit_s=OVERDUE_S + OVERDUE_RUNS * usual)
        # Until it has trained once, a start prepares data.
        warm = self.rehearsal.warm_startup_s if _train_events(self.run_dir) else None
        startup_s = self.undisturbed.startup_s if warm is None else warm
        left_s = self.undisturbed.left_s(self._saved_step())
        kills = self.last_kill - len(self.verdict.kills)
        return self.trainer.run(self.moments.seconds(startup_s, left_s, kills, stalled), self.moments.method())

    def _saved_step(self) -> int:
        """Completed steps over all stages at the furthest save."""
        edge, _, step = progress(self.run_dir)
        first = {stage.resolution: self.config.first_global_step(stage) for stage in self.config.stages}
        return first[edge] + step if edge else 0

    def _went_on(self, event: dict[str, Any], saved_step: int, attempt: Attempt) -> None:
        startup_s = event["time"] - attempt.began
        known = self.rehearsal.warm_startup_s
        self.rehearsal.warm_startup_s = startup_s if known is None else min(known, startup_s)
        self._report_unresolved(event)
        if event["global_step"] < saved_step:
            self._unresumable(
                f"it went on in {event['stage']} at step {event['step']}, step {event['global_step']} over all stages, "
                f"although step {saved_step} was saved"
            )

    def _killed(self, attempt: Attempt, trained: Sequence[dict[str, Any]], mark_is_new: bool) -> None:
        stage, step = None, 0
        if trained:
            event = trained[0]
            # A kill between the record and the mark leaves the mark of the attempt before.
            mark = marked(self.run_dir.step_mark) if mark_is_new else None
            self.reached = max(event["global_step"], mark or 0)
            stage, step = event["stage"], event["step"]
            if self.reached > event["global_step"]:
                stage, step = self._place(self.reached)
        record = KillRecord(
            len(self.verdict.kills) + 1,
            str(attempt.sent),
            attempt.sent_after_s,
            attempt.left_s,
            attempt.code,
            stage,
            step,
        )
        self.verdict.kills.append(record)
        self.unresolved.append(record)

    def _place(self, global_step: int) -> tuple[str, int]:
        """The stage whose step this is, and its number there."""
        before = [stage for stage in self.config.stages if self.config.first_global_step(stage) < global_step]
        return before[-1].name, global_step - self.config.first_global_step(before[-1])

    def _report_unresolved(self, event: dict[str, Any] | None) -> None:
        """The kills until now, with the place at which the run goes on after them; None: it is finished."""
        for kill in self.unresolved:
            if event is not None:
                kill.resumed_stage, kill.resumed_step = event["stage"], event["step"]
                # At most one of them hit an attempt that trained.
                kill.lost_steps = max(0, self.reached - event["global_step"]) if kill.stage is not None else 0
            log.info("%s", kill.line(self.planned))
        self.unresolved.clear()

    def _failed(self, attempt: Attempt) -> None:
        if attempt.overdue:
            self._unresumable(f"a start did not end within {attempt.wall_s:.0f} s. Its last lines:\n{attempt.tail}")
        else:
            self._unresumable(f"a start ended by itself with exit code {attempt.code}. Its last lines:\n{attempt.tail}")

    def _unresumable(self, text: str) -> None:
        self.verdict.unresumable.append(f"{self.name}: {text}")
        log.error("%s: %s", self.name, text)

    def _mark_written(self) -> int | None:
        try:
            return self.run_dir.step_mark.stat().st_mtime_ns
        except FileNotFoundError:
            return None


def _train_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """Each time that a trainer began or went on, from its own record."""
    return [line for line in read_lines(run_dir.attempts) if line.get("event") == "train"]
