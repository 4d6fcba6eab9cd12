"""The checkpoints of a run as a table, each verified."""

from __future__ import annotations

import json
from dataclasses import dataclass

from app.train.checkpoint import UNREADABLE, CheckpointFolder, FoundCheckpoint
from app.workspace import RunDir

HEADER = ("file", "epochs", "step", "MiB", "sha256", "verdict")


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a run, each with what is wrong with it; None where it is whole."""

    run_dir: RunDir
    files: list[tuple[FoundCheckpoint, str | None]]

    @property
    def resume_point(self) -> FoundCheckpoint | None:
        """The one that would be resumed from."""
        return next((entry for entry, damage in self.files if damage is None), None)

    def table(self) -> str:
        """For people."""
        if not self.files:
            return f"no checkpoints in {self.run_dir.path}"
        rows = [HEADER, *(_row(entry, damage) for entry, damage in self.files)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        point = self.resume_point
        if point is None:
            lines.append("none of these can be resumed from")
        else:
            lines.append(
                f"resume point: {point.path.name} ({point.stage}, epoch {point.counters.epochs}, step "
                f"{point.counters.step})"
            )
        return "\n".join(lines)

    def as_json(self) -> str:
        """For programs."""
        files = [
            {
                "file": entry.path.name,
                "epochs": None if entry.counters == UNREADABLE else entry.counters.epochs,
                "step": None if entry.counters == UNREADABLE else entry.counters.step,
                "sha256": entry.sha256,
                "damage": damage,
            }
            for entry, damage in self.files
        ]
        point = self.resume_point
        return json.dumps({"files": files, "resume_point": None if point is None else point.path.name}, indent=1)


def list_checkpoints(run_dir: RunDir) -> Listing:
    """Verify every checkpoint, the furthest first; nothing is moved."""
    folder = CheckpointFolder(run_dir)
    stages = sorted({entry.stage for entry in folder.entries()}, key=_resolution, reverse=True)
    entries = [entry for stage in stages for entry in folder.entries(stage)]
    return Listing(run_dir, [(entry, folder.damage(entry)) for entry in entries])


def _row(entry: FoundCheckpoint, damage: str | None) -> tuple[str, ...]:
    return (
        entry.path.name,
        "-" if entry.counters == UNREADABLE else str(entry.counters.epochs),
        "-" if entry.counters == UNREADABLE else str(entry.counters.step),
        f"{entry.path.stat().st_size / 2**20:.2f}",
        "-" if entry.sha256 is None else entry.sha256[:12],
        "whole" if damage is None else f"DAMAGED: {damage}",
    )


def _resolution(stage: str) -> int:
    return int(stage.removeprefix("stage_"))
