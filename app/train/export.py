"""One file with what a trained cascade needs elsewhere: EMA weights and config, no optimizer, paths or ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from app.config import Config
from app.config_file import config_as_dict
from app.train.inference import EXPORT_FORMAT, read_run
from app.workspace import RunDir, atomic_file


def export(run_dir: RunDir, target: Path) -> list[str]:
    """Write the best EMA weights of every finished stage; returns the names of the stages.

    The file is a plain `torch.save` dict that loads with `weights_only=True`, see `app.train.inference.read_exported`:
    `format`, `config`, and `stages`: name -> `ema_state_dict`, `sha256` (over the tensors), `val_loss`, `epoch`.

    Raises:
        CheckpointError: no stage is finished.
    """
    cascade = read_run(run_dir, only_finished=True)
    stages = {
        trained.stage.name: {
            "ema_state_dict": dict(trained.weights),
            "sha256": trained.sha256,
            "val_loss": trained.val_loss,
            "epoch": trained.epoch,
        }
        for trained in cascade.stages
    }
    with atomic_file(target) as file:
        torch.save({"format": EXPORT_FORMAT, "config": _anonymous(cascade.config), "stages": stages}, file)
    return list(stages)


def _anonymous(config: Config) -> dict[str, Any]:
    """The config without run name, paths and accounts."""
    nameless = {"run_name": None, "init_from": None, "wandb": type(config.wandb)()}
    return config_as_dict(config.without_paths().model_copy(update=nameless))
