"""REASON and DONE: what keeps a restarted container from training again, and until when."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.config import Config
from app.config_changes import differences
from app.config_file import config_as_dict
from app.config_yaml import YamlSyntaxError, read_yaml
from app.errors import AppError, CheckpointError, ConfigError, CrashBudgetError, NumericsError
from app.ops.crash_budget import read_lines
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

STANDING = (NumericsError.exit_code, CrashBudgetError.exit_code, CheckpointError.exit_code)
"""Exit codes that would come again: they stand until config, image or checkpoints change."""
CODE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Refusal:
    """Why the last attempt was refused."""

    exit_code: int
    text: str


def leave_reason(run_dir: RunDir, error: AppError) -> None:
    """A file beside the checkpoints that says why the run ended and what to do."""
    if not run_dir.path.is_dir():
        return
    try:
        run_dir.refusal.unlink(missing_ok=True)
        atomic_write(run_dir.reason, f"exit code {error.exit_code}\n{error}\n".encode())
    except OSError as reason:
        log.error("%s cannot be written: %s", run_dir.reason, reason.strerror)


def reason(run_dir: RunDir, exit_code: int) -> str | None:
    """What REASON says of an end with this exit code; None where it says nothing of it."""
    try:
        first, _, text = run_dir.reason.read_text().partition("\n")
    except OSError:
        return None
    return text.strip() if first == f"exit code {exit_code}" else None


def let_stand(run_dir: RunDir, exit_code: int, key: str) -> None:
    """The refusal in REASON stands for as long as `refusal_key` is `key`."""
    if exit_code in STANDING and run_dir.reason.exists():
        atomic_write(run_dir.refusal, json.dumps({"exit_code": exit_code, "key": key}, indent=1).encode())


def standing_refusal(run_dir: RunDir, key: str) -> Refusal | None:
    """The refusal that still stands, or None: nothing was refused, something changed, or REASON was deleted."""
    try:
        record: dict[str, Any] = json.loads(run_dir.refusal.read_bytes())
        text = run_dir.reason.read_text()
    except (FileNotFoundError, ValueError):
        return None
    return Refusal(record["exit_code"], text.strip()) if record.get("key") == key else None


def forget_config_refusal(run_dir: RunDir) -> None:
    """A config that could not be read named no run, so its REASON lies with the run without a name: it is outdated."""
    if run_dir.reason.is_file() and run_dir.reason.read_text().startswith(f"exit code {ConfigError.exit_code}\n"):
        run_dir.reason.unlink()


def refusal_key(config: Config, stages: Sequence[str], run_dir: RunDir, data: Path) -> str:
    """A hash of all that a refusal may be about: config, application, torch, checkpoints, names in the data folder."""
    digest = hashlib.sha256()
    digest.update(json.dumps([config_as_dict(config), list(stages), version("torch")], sort_keys=True).encode())
    for path in sorted(CODE.rglob("*.py")):
        digest.update(f"{path.relative_to(CODE)}\n".encode() + path.read_bytes())
    files = [path for _, _, path in run_dir.checkpoints()]
    folders = sorted(data.iterdir()) if data.is_dir() else []
    for path in [*files, *folders]:
        state = path.lstat()
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def finished(config: Config, run_dir: RunDir) -> bool:
    """Whether DONE still holds: every stage of the config has its final checkpoint, at the length that is asked for.

    Only names and sizes are looked at, so that a finished run needs neither a GPU nor a minute to say so. With changed
    scientific settings the answer is no, and the trainer says what to do.
    """
    if not run_dir.done.exists() or not run_dir.config.exists():
        return False
    final = {line["stage"]: line for line in read_lines(run_dir.manifest) if line.get("kind") == "final"}
    for stage in config.stages:
        path, line = run_dir.checkpoint(stage.name, "final"), final.get(stage.name)
        if line is None or line["epochs"] < stage.epochs or not path.exists():
            return False
        if "bytes" in line and path.stat().st_size != line["bytes"]:
            return False
    try:
        scientific, _ = differences(read_yaml(run_dir.config.read_text()).data or {}, config, run_dir.config)
    except (CheckpointError, YamlSyntaxError):
        return False
    return not scientific
