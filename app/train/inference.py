"""A trained cascade for use: the EMA models of its stages, from a run or from an exported file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.config import Config, StageConfig
from app.config_file import config_from_checkpoint
from app.errors import CheckpointError
from app.model.denoiser import StageModel
from app.train.checkpoint import RESUME_KEY, CheckpointFolder
from app.train.ema import tensors_hash
from app.train.state import load_ema
from app.workspace import RunDir

log = logging.getLogger(__name__)

EXPORT_FORMAT = 1


@dataclass(frozen=True)
class TrainedStage:
    """A stage's EMA weights, on the CPU, and where they stand."""

    stage: StageConfig
    weights: Mapping[str, Tensor]
    val_loss: float
    epoch: int
    """Index of the completed epoch that they are of, from 0."""
    finished: bool
    """Whether the stage's training came to its end."""

    @property
    def sha256(self) -> str:
        """Over the tensors."""
        return tensors_hash(dict(self.weights))


@dataclass(frozen=True)
class TrainedCascade:
    """The stages that are trained, coarse to fine, without a gap."""

    config: Config
    stages: tuple[TrainedStage, ...]
    origin: Path
    """The run folder or the file."""

    def build(self, trained: TrainedStage, device: torch.device) -> StageModel:
        """The frozen model of a stage on `device`; one at a time, so that one fits where two would not.

        Raises:
            CheckpointError: the weights do not fit the config's model.
        """
        return load_ema(self.config, trained.stage, trained.weights, self.origin).to(device)


def read_run(run_dir: RunDir, only_finished: bool = False) -> TrainedCascade:
    """The best weights of each stage of a run, verified; nothing in the folder is touched.

    Args:
        run_dir: the run's folder.
        only_finished: leave out the stage that is still being trained.

    Raises:
        CheckpointError: there is no such stage, or its file is damaged.
    """
    folder = CheckpointFolder(run_dir)
    kinds = {(stage, kind) for stage, kind, _ in run_dir.checkpoints()}
    stages: list[TrainedStage] = []
    config: Config | None = None
    for name in sorted({stage for stage, _ in kinds}, key=lambda name: int(name.removeprefix("stage_"))):
        finished = (name, "final") in kinds
        payload = folder.read(name, "best") if finished or not only_finished else None
        if payload is None:
            break
        config = config_from_checkpoint(payload["config"], run_dir.checkpoint(name, "best"))
        weights = payload[RESUME_KEY]["ema_state_dict"]
        stages.append(TrainedStage(config.stage(name), weights, payload["val_loss"], payload["epoch"], finished))
    if config is None:
        lacking = "no stage is finished (no _final.pt with its _best.pt)" if only_finished else "no _best.pt yet"
        raise CheckpointError(f"{run_dir.path}: {lacking}; train first, or name another run (--config, RUN_NAME)")
    return TrainedCascade(config, tuple(stages), run_dir.path)


def read_exported(path: Path) -> TrainedCascade:
    """The cascade in a file of `python -m app export`.

    Raises:
        CheckpointError: the file cannot be read, is something else, or its tensors are not those that were written.
    """
    document = _load(path)
    try:
        config = config_from_checkpoint(document["config"], path)
        stages = tuple(
            TrainedStage(config.stage(name), entry["ema_state_dict"], entry["val_loss"], entry["epoch"], True)
            for name, entry in document["stages"].items()
        )
        digests = [entry["sha256"] for entry in document["stages"].values()]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{path}: not a file of `python -m app export` (lacks {error})") from error
    for trained, digest in zip(stages, digests, strict=True):
        if trained.sha256 != digest:
            raise CheckpointError(f"{path}: the weights of {trained.stage.name} are damaged; copy or export it again")
    return TrainedCascade(config, stages, path)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:
        # torch raises what its readers raise: RuntimeError, EOFError, UnpicklingError, zipfile's and more.
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as a file of `python -m app export`: {detail}") from error
    if not isinstance(document, dict) or document.get("format") != EXPORT_FORMAT:
        raise CheckpointError(f"{path}: not a file of `python -m app export` of this version (format {EXPORT_FORMAT})")
    return document
