"""The checkpoints of a run as a table, each verified."""

from __future__ import annotations

from app.train.checkpoint import UNREADABLE, CheckpointFolder
from app.workspace import RunDir

HEADER = ("file", "epochs", "step", "MiB", "sha256", "verdict")


def checkpoint_table(run_dir: RunDir) -> tuple[str, bool]:
    """The table with the checkpoint that would be resumed from, and whether there is one; nothing is moved."""
    folder = CheckpointFolder(run_dir)
    rows, resumable = [HEADER], None
    stages = sorted({entry.stage for entry in folder.entries()}, key=_resolution, reverse=True)
    for entry in [entry for stage in stages for entry in folder.entries(stage)]:
        damage = folder.damage(entry)
        if damage is None and resumable is None:
            resumable = entry
        rows.append(
            (
                entry.path.name,
                "-" if entry.counters == UNREADABLE else str(entry.counters.epochs),
                "-" if entry.counters == UNREADABLE else str(entry.counters.step),
                f"{entry.path.stat().st_size / 2**20:.2f}",
                "-" if entry.sha256 is None else entry.sha256[:12],
                "whole" if damage is None else f"DAMAGED: {damage}",
            )
        )
    if len(rows) == 1:
        return f"no checkpoints in {run_dir.path}", False
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if resumable is None:
        lines.append("none of these can be resumed from")
    else:
        lines.append(
            f"resume point: {resumable.path.name} ({resumable.stage}, epoch {resumable.counters.epochs}, "
            f"step {resumable.counters.step})"
        )
    return "\n".join(lines), resumable is not None


def _resolution(stage: str) -> int:
    return int(stage.removeprefix("stage_"))
