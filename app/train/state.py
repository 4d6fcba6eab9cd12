"""Everything of a stage in training that a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.config import Config, OptimizerConfig, StageConfig
from app.config_file import config_as_dict
from app.errors import CheckpointError
from app.model.denoiser import StageModel
from app.train.checkpoint import FORMAT, RESUME_KEY, Counters
from app.train.ema import EMA
from app.train.precision import Precision


@dataclass
class Progress:
    """The counters and sums of a stage; plain numbers."""

    epochs: int = 0
    """Completed epochs, validation included."""
    step: int = 0
    """Completed optimizer steps."""
    diffusion_sum: float = 0.0
    """Over the steps of the epoch under way."""
    physics_sum: float = 0.0
    epoch_seconds: float = 0.0
    """Spent on the epoch under way, in all attempts."""
    run_seconds: float = 0.0
    """Spent on the steps and validations behind this state, of all stages, in all attempts."""
    val_loss: float = math.inf
    """Of the last completed epoch."""
    best_val_loss: float = math.inf
    best_epochs: int = 0
    """Completed epochs at the best validation loss."""
    idle_validations: int = 0
    """Validations in a row, up to the last one, in which the network did next to nothing."""

    @property
    def counters(self) -> Counters:
        """How far this is."""
        return Counters(self.epochs, self.step)


@dataclass
class StageState:
    """Model, EMA, optimizer and scaler of a stage, and how far they are."""

    config: Config
    stage: StageConfig
    model: StageModel
    ema: EMA
    optimizer: torch.optim.Optimizer
    precision: Precision
    fingerprint: str
    """Of the prepared data and the split."""
    parent: str | None
    """Hash of the EMA tensors of the previous stage's best checkpoint."""
    progress: Progress = field(default_factory=Progress)

    @property
    def step_in_epoch(self) -> int:
        """Completed steps of the epoch under way."""
        return self.progress.step - self.progress.epochs * self.stage.steps_per_epoch

    def payload(self) -> dict[str, Any]:
        """The checkpoint: the seed's six keys, and what resuming needs besides under one more. No copies."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.precision.state_dict(),
            "epoch": self.progress.epochs - 1,
            "val_loss": self.progress.val_loss,
            "config": config_as_dict(self.config.without_paths()),
            RESUME_KEY: {
                "format": FORMAT,
                "stage": self.stage.name,
                "ema_state_dict": self.ema.model.state_dict(),
                "precision": self.precision.name,
                "fingerprint": self.fingerprint,
                "parent": self.parent,
                **asdict(self.progress),
            },
        }

    def restore(self, payload: dict[str, Any], name: str) -> None:
        """Take over a checkpoint's state.

        Raises:
            CheckpointError: it belongs to another model, other data or another parent.
        """
        resume = payload[RESUME_KEY]
        if resume["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"{name}: trained on another set of cases (fingerprint {resume['fingerprint'][:12]}, here "
                f"{self.fingerprint[:12]}). Bring the prepared data back, or start a new run with another run_name"
            )
        if resume["parent"] != self.parent:
            raise CheckpointError(
                f"{name}: trained on the outputs of parent {_short(resume['parent'])}, but the previous stage's best "
                f"checkpoint is {_short(self.parent)}. Put the parent back, or start a new run with another run_name"
            )
        try:
            self.model.load_state_dict(payload["model_state_dict"])
            self.ema.model.load_state_dict(resume["ema_state_dict"])
            self.optimizer.load_state_dict(payload["optimizer_state_dict"])
        except (RuntimeError, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{name}: its weights do not fit the model of {self.stage.name}: {detail}") from error
        self.precision.scaler.load_state_dict(payload["scaler_state_dict"])
        self.progress = Progress(**{key: resume[key] for key in asdict(self.progress) if key in resume})


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def new_optimizer(model: StageModel, stage: StageConfig, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; the learning rate is set anew at each step."""
    return torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )


def load_ema(config: Config, stage: StageConfig, weights: Mapping[str, Tensor], origin: Path) -> StageModel:
    """The frozen model of a stage with these EMA weights, on the CPU.

    Raises:
        CheckpointError: the weights do not fit the config's model.
    """
    model = StageModel(config, stage)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{origin}: its weights do not fit the model of {stage.name}: {detail}") from error
    return model.eval().requires_grad_(False)
