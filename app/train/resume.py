"""Where a run goes on: the furthest verified checkpoint of its furthest stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.config import Config, StageConfig
from app.errors import CheckpointError
from app.train.checkpoint import RESUME_KEY, CheckpointFolder, Counters


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
