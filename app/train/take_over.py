"""`init_from`: a new run that begins with the finished stages of an earlier one."""

from __future__ import annotations

import logging
from typing import Any

from app.config import Config, StageConfig
from app.config_changes import differences, refusal
from app.errors import CheckpointError
from app.train.checkpoint import RESUME_KEY, CheckpointFolder

log = logging.getLogger(__name__)


def take_over(config: Config, checkpoints: CheckpointFolder, other: CheckpointFolder, fingerprint: str) -> None:
    """Copy the finished stages of another run; only before this run has checkpoints of its own.

    Args:
        config: of this run; its `init_from` names the other one.
        checkpoints: of this run.
        other: of the other one.
        fingerprint: of this run's cases and split.

    Raises:
        CheckpointError: the other run has no finished stage, or it was trained with other settings or cases.
    """
    if checkpoints.any_trace():
        return
    taken = []
    for stage in config.stages:
        files = [other.newest(stage.name, kinds=(kind,)) for kind in ("best", "final")]
        found = [file for file in files if file is not None]
        if len(found) < len(files):
            break
        for entry, payload in found:
            _expect_same(config, stage, entry.path.name, checkpoints, fingerprint, payload)
            checkpoints.take_over(entry)
        taken.append(stage.name)
    if not taken:
        raise CheckpointError(
            f"init_from: {config.init_from}: {other.run_dir.path} has no finished {config.stages[0].name} "
            "(its _best.pt and _final.pt). Name a run that has, or remove init_from"
        )
    log.info("init_from: took over %s from %s", ", ".join(taken), config.init_from)


def _expect_same(
    config: Config,
    stage: StageConfig,
    name: str,
    checkpoints: CheckpointFolder,
    fingerprint: str,
    payload: dict[str, Any],
) -> None:
    scientific, _ = differences(payload["config"], config, checkpoints.run_dir.path / name)
    mine = {f"stages.{each.name}." for each in config.stages[config.stages.index(stage) + 1 :]}
    relevant = [change for change in scientific if not any(change.key.startswith(prefix) for prefix in mine)]
    if relevant:
        raise CheckpointError(f"init_from: {config.init_from}, {name}: {refusal(relevant)}")
    if payload[RESUME_KEY]["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"init_from: {config.init_from}, {name}: trained on another set of cases or another split; its validation "
            "patients may be training patients here"
        )
