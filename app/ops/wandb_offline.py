"""The offline run of Weights & Biases in a run's folder, and the command that sends it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from app.workspace import RunDir


def sync_command(run_dir: RunDir) -> str | None:
    """What to type to send the newest offline run; None where there is none or the whole of it was sent.

    It works in the run's folder, because the checkpoints in the record have paths that are relative to it, and it also
    takes a run that was sent before it ended.
    """
    # Their names begin with the time, and each holds all that the ones before it hold.
    newest = max(run_dir.wandb.glob("offline-run-*/*.wandb"), default=None)
    if newest is None:
        return None
    synced = newest.with_name(f"{newest.name}.synced")
    if synced.exists() and synced.stat().st_mtime_ns > newest.stat().st_mtime_ns:
        return None
    program = Path(sys.executable).with_name("wandb")
    words = [str(program), "sync", "--include-synced", str(newest.parent.relative_to(run_dir.path))]
    return f"cd {shlex.quote(str(run_dir.path.resolve()))} && {shlex.join(words)}"
