"""Weights & Biases, the trainer's half: starts a process that follows the event files, and ends it.

A process of its own because `wandb` replaces `sys.exit`, hooks exceptions, waits at exit for its uploads, and reports
its own errors home; none of that may reach the trainer. The process may hang or die without a step noticing, and as it
reads what TensorBoard reads, both show the same numbers and nothing is lost while the network is away.
"""

from __future__ import annotations

import json
import logging
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Literal

import app
from app.config import Config
from app.config_file import config_as_dict
from app.ops.provenance import provenance
from app.ops.wandb_offline import sync_command
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

MODULE = "app.ops.wandb_follow"
AT_END_S = 60.0
AT_END_WITH_CHECKPOINTS_S = 600.0


def at_end_s(config: Config) -> float:
    """How long a finished run may wait until everything is sent, which nothing will send later."""
    longest = AT_END_WITH_CHECKPOINTS_S if config.wandb.checkpoints else AT_END_S
    # A trainer that waits gives no sign of life.
    return min(longest, config.compute.hang_after_s * 2 / 3)


class WandbLog:
    """A `Follower` that sends a run's event files to Weights & Biases.

    Args:
        run_dir: the run; its id at Weights & Biases is kept in there, so that every attempt continues the same run.
        config: shown with the run, without paths.
        mode: `offline` writes a folder for `wandb sync` instead of sending.
        device: what this attempt trains on.
    """

    def __init__(self, run_dir: RunDir, config: Config, mode: Literal["online", "offline"], device: str) -> None:
        job = {
            "root": str(run_dir.path.resolve()),
            "tensorboard": str(run_dir.tensorboard.resolve()),
            "run_id": _run_id(run_dir),
            "run_name": config.run_name,
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "mode": mode,
            "config": {**config_as_dict(config.without_paths()), "provenance": provenance(device)},
            "epochs": {stage.name: stage.epochs for stage in config.stages},
            "images": config.wandb.images,
            "checkpoints": config.wandb.checkpoints,
        }
        self._offline = run_dir if mode == "offline" else None
        # `env` sets variables for the child alone; the config goes through the pipe, where `ps` cannot show it.
        self._process = subprocess.Popen(
            ["env", "WANDB_ERROR_REPORTING=false", "WANDB_SILENT=true", sys.executable, "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            cwd=Path(app.__file__).resolve().parents[1],
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._tell(json.dumps(job))

    def close(self, limit_s: float) -> None:
        """Lets the process send what is left, for at most `limit_s` seconds; the next attempt sends the rest."""
        # A line, since the end of the pipe would not be seen while a forked worker holds a copy of it.
        self._tell(f"{limit_s:.3f}")
        self._pipe.close()
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            log.warning("Weights & Biases did not finish within %.1f s; the next attempt sends the rest", limit_s)
            return
        if code:
            log.warning("Weights & Biases ended early (exit %d); TensorBoard has all points", code)
        elif self._offline is not None and (command := sync_command(self._offline)) is not None:
            log.info("this run is sent to Weights & Biases by: %s", command)

    def _tell(self, line: str) -> None:
        try:
            self._pipe.write(f"{line}\n".encode())
        except BrokenPipeError:
            log.debug("the process is gone; `close` reports its exit code")


def _run_id(run_dir: RunDir) -> str:
    path = run_dir.wandb_id
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, secrets.token_hex(4).encode())
    return path.read_text().strip()
