"""Going on from the state before the newest one, after the same crash twice or on request."""

from __future__ import annotations

import logging

from app.config import Config
from app.ops.crash_budget import Attempts
from app.train.checkpoint import CheckpointFolder
from app.train.resume import set_newest_aside
from app.workspace import RunDir

log = logging.getLogger(__name__)


def fall_back_to_older(config: Config, run_dir: RunDir) -> None:
    """Set the newest state aside, and put on record that it was."""
    repeated = Attempts(run_dir).repetition()
    why = "on request" if repeated is None else f"after {repeated.times} crashes of the same kind ({repeated.error})"
    checkpoints = CheckpointFolder(run_dir)
    checkpoints.recover_manifest()
    older = set_newest_aside(checkpoints, [stage.name for stage in config.stages], f"set aside {why}")
    Attempts(run_dir).fell_back(None if older is None else older.path.name)
    if older is None:
        log.warning("no state was set aside: there is none before it that the run could go on from")
    else:
        log.warning("the newest state was set aside in %s, %s", run_dir.quarantine.name, why)
