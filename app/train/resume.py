"""Where a run goes on, the furthest verified state or the one before it, and whether it may with this config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.config import Config, StageConfig
from app.config_changes import differences, refusal
from app.errors import CheckpointError
from app.train.checkpoint import RESUME_KEY, CheckpointFolder, Counters, FoundCheckpoint
from app.train.precision import choose_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Where the run goes on."""

    stage: StageConfig | None
    """The stage to train; None where all are finished."""
    found: dict[str, Any] | None
    """The furthest checkpoint of the run; None where there is none yet."""
    source: str
    """Name of its file, for messages."""
    counters: Counters
    """Of `stage`."""

    @property
    def payload(self) -> dict[str, Any] | None:
        """The checkpoint that `stage` goes on from; None where the stage begins."""
        if self.found is None or self.stage is None or self.found[RESUME_KEY]["stage"] != self.stage.name:
            return None
        return self.found

    @property
    def run_seconds(self) -> float:
        """Spent so far on the steps and validations behind the furthest checkpoint, of all stages."""
        # Checkpoints of older versions do not say.
        return 0.0 if self.found is None else float(self.found[RESUME_KEY].get("run_seconds", 0.0))


def find_resume_point(config: Config, checkpoints: CheckpointFolder) -> ResumePoint:
    """The furthest verified state of a run; damaged files on the way are set aside.

    Raises:
        CheckpointError: the run had checkpoints and none can be used.
    """
    for index in reversed(range(len(config.stages))):
        stage = config.stages[index]
        found = checkpoints.newest(stage.name)
        if found is None:
            continue
        entry, payload = found
        if entry.counters.epochs < stage.epochs or not checkpoints.whole(stage.name, "final"):
            return ResumePoint(stage, payload, entry.path.name, entry.counters)
        following = config.stages[index + 1] if index + 1 < len(config.stages) else None
        return ResumePoint(following, payload, entry.path.name, Counters(0, 0))
    if checkpoints.any_trace():
        raise CheckpointError(
            f"{checkpoints.run_dir.path}: this run had checkpoints and none of them can be used (the damaged ones and "
            f"the reasons are in {checkpoints.run_dir.quarantine.name}/). It is not started over silently: put a good "
            "checkpoint back, move the folder away, or start a run of another name (RUN_NAME=...)"
        )
    return ResumePoint(config.stages[0], None, "", Counters(0, 0))


def resumed_precision(point: ResumePoint, config: Config, folder: Path, device: torch.device) -> str:
    """The checkpoint's own precision, once its config is found to be the same run's; without one, the config's.

    Raises:
        CheckpointError: settings differ that may not change on resume.
    """
    if point.found is None:
        return choose_precision(config.compute, device)
    scientific, operational = differences(point.found["config"], config, folder / point.source)
    if scientific:
        raise CheckpointError(refusal(scientific))
    reached = point.found[RESUME_KEY]["stage"]
    _refuse_growth_of_a_parent(reached, config, [difference.key for difference in operational])
    for difference in operational:
        log.info("changed since the last attempt: %s", difference)
    precision: str = point.found[RESUME_KEY]["precision"]
    return precision


def _refuse_growth_of_a_parent(reached: str, config: Config, changed: Sequence[str]) -> None:
    names = [stage.name for stage in config.stages]
    for name in names[: names.index(reached)]:
        if f"stages.{name}.epochs" in changed:
            raise CheckpointError(
                f"stages.{name}.epochs: {name} is finished and {reached} is trained on its outputs, so it cannot "
                "be prolonged. Put the old value back, or start a new run with another run_name"
            )


def describe(point: ResumePoint) -> str:
    """One line for the log: fresh start, or what is resumed from where."""
    if point.stage is None:
        return "finished"
    if point.payload is None:
        return f"starting {point.stage.name}" if point.source else "fresh start"
    return (
        f"resuming {point.stage.name} at epoch {point.counters.epochs}, step {point.counters.step}, "
        f"from {point.source}, verified"
    )


def set_newest_aside(checkpoints: CheckpointFolder, stages: Sequence[str], reason: str) -> FoundCheckpoint | None:
    """Set the furthest state aside, so that the run goes on from the one before it.

    All files of that state go, or one of them would be the furthest again; what is trained again writes the same files
    again. A finished stage stays as it is, because the next one is trained on it.

    Args:
        checkpoints: of a run whose lock is held.
        stages: names of the run's stages, coarse to fine.
        reason: for the text beside the files that are set aside.

    Returns:
        The state that the run goes on from now; None where there is none that is whole, and nothing was moved.
    """
    for index in reversed(range(len(stages))):
        found = checkpoints.newest(stages[index])
        if found is None:
            continue
        counters = found[0].counters
        entries = checkpoints.entries(stages[index])
        furthest = [entry for entry in entries if entry.counters == counters]
        if any(entry.kind == "final" for entry in furthest):
            return None
        older = [entry for entry in entries if entry.counters < counters]
        # A stage that has no older state of its own begins anew where the one before it ended.
        older += [entry for name in stages[:index][-1:] for entry in checkpoints.entries(name) if entry.kind == "final"]
        target = next((entry for entry in older if _is_usable(checkpoints, entry)), None)
        if target is not None:
            for entry in furthest:
                checkpoints.set_aside(entry, reason)
        return target
    return None


def _is_usable(checkpoints: CheckpointFolder, entry: FoundCheckpoint) -> bool:
    try:
        return checkpoints.damage(entry) is None and bool(checkpoints.load(entry))
    except CheckpointError:
        return False
