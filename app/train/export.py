"""One file with what a trained cascade needs elsewhere: EMA weights and config, no optimizer, paths or ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.config import Config
from app.config_file import config_as_dict, config_from_checkpoint
from app.errors import CheckpointError
from app.train.checkpoint import RESUME_KEY, CheckpointFolder
from app.train.ema import tensors_hash
from app.workspace import RunDir, atomic_file

FORMAT = 1


def export(run_dir: RunDir, target: Path) -> list[str]:
    """Write the best EMA weights of every finished stage; returns the names of the stages.

    The file is a plain `torch.save` dict that loads with `weights_only=True`:
    `format`, `config`, and `stages`: name -> `ema_state_dict`, `sha256` (over the tensors), `val_loss`, `epoch`.

    Raises:
        CheckpointError: no stage is finished.
    """
    folder = CheckpointFolder(run_dir)
    stages: dict[str, dict[str, Any]] = {}
    config: Config | None = None
    names = sorted({entry.stage for entry in folder.entries()}, key=lambda name: int(name.removeprefix("stage_")))
    for name in names:
        found = folder.newest(name, kinds=("best",)) if folder.whole(name, "final") else None
        if found is None:
            break
        entry, payload = found
        config = config_from_checkpoint(payload["config"], entry.path)
        weights = payload[RESUME_KEY]["ema_state_dict"]
        stages[name] = {
            "ema_state_dict": weights,
            "sha256": tensors_hash(weights),
            "val_loss": payload["val_loss"],
            "epoch": payload["epoch"],
        }
    if config is None:
        raise CheckpointError(
            f"{run_dir.path}: no stage is finished (no _final.pt with its _best.pt); nothing to export"
        )
    with atomic_file(target) as file:
        torch.save({"format": FORMAT, "config": _anonymous(config), "stages": stages}, file)
    return list(stages)


def _anonymous(config: Config) -> dict[str, Any]:
    """The config without run name, paths and accounts."""
    nameless = {"run_name": None, "init_from": None, "wandb": type(config.wandb)()}
    return config_as_dict(config.without_paths().model_copy(update=nameless))
