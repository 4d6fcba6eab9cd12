"""From one stage to the next: the parent's frozen model, its outputs, and a new stage's starting state."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.config import Config, StageConfig
from app.data.cases import Case, CaseStore
from app.errors import CheckpointError, MachineError
from app.model.denoiser import StageModel
from app.physics.attenuation import hu_to_x
from app.train.checkpoint import RESUME_KEY, CheckpointFolder
from app.train.ema import EMA, tensors_hash
from app.train.parallel import ALONE, Ranks
from app.train.precision import Precision
from app.train.protocols import Stop
from app.train.randomness import derive_seed
from app.train.reconstruct import hand_over
from app.train.samples import LowresFolder, StageCases, batches
from app.train.state import StageState, load_ema, new_optimizer

log = logging.getLogger(__name__)

SHOWN_WITHIN_S, SHOWN_POLL_S = 30.0, 0.5
"""A network volume shows another machine's new files after some seconds."""
RESIDUAL_CASES = 64
"""Training cases that the residual scale is measured on."""


class Parents:
    """The finished stages of a run: their models, and their outputs for every case."""

    def __init__(
        self,
        config: Config,
        checkpoints: CheckpointFolder,
        store: CaseStore,
        cases: Sequence[Case],
        cache: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        """`cases` are those that any stage will see; `cache` is the workspace's."""
        self.ranks = ranks
        self.config, self.checkpoints, self.store, self.cache = config, checkpoints, store, cache
        self.cases = sorted(cases, key=lambda case: case.content)
        self._hashes: dict[str, str] = {}

    def parent_hash(self, stage: StageConfig) -> str | None:
        """Hash of the EMA tensors of the best checkpoint of the stage before `stage`; None for the first."""
        index = self.config.stages.index(stage)
        return None if index == 0 else self._best_hash(self.config.stages[index - 1])

    def lowres(self, stage: StageConfig, device: torch.device, precision: Precision, stop: Stop) -> LowresFolder | None:
        """The outputs that condition `stage`, made now where they are missing or damaged; None for the first stage.

        Raises:
            CheckpointError: the previous stage has no whole best checkpoint.
            Stopped: asked to stop.
        """
        index = self.config.stages.index(stage)
        if index == 0:
            return None
        parent = self.config.stages[index - 1]
        folder = self._folder(parent)
        if not self.ranks.first(lambda: all(folder.holds(case) for case in self.cases)):
            grandparent = self.lowres(parent, device, precision, stop)
            payload, path = self._best(parent)
            model = load_ema(self.config, parent, payload[RESUME_KEY]["ema_state_dict"], path).to(device)
            with precision.autocast():
                hand_over(model, self.store, self.cases, grandparent, folder, self.config, stop, self.ranks)
        self.ranks.everyone(lambda: self._expect(folder))
        return folder

    def _expect(self, folder: LowresFolder) -> None:
        """On another machine than the first, which has written them: wait for the volume to show its files."""
        end = time.monotonic() + SHOWN_WITHIN_S
        while self.ranks.node > 0 and not all(folder.holds(case) for case in self.cases):
            if time.monotonic() > end:
                raise MachineError(
                    f"{folder.folder}: the volumes that the first machine has made are not here. Every machine of a "
                    "run must see the same volume at its WORKSPACE, if only to read its cache"
                )
            time.sleep(SHOWN_POLL_S)

    def _best(self, stage: StageConfig) -> tuple[dict[str, Any], Path]:
        return self.ranks.first(lambda: self._find_best(stage))

    def _find_best(self, stage: StageConfig) -> tuple[dict[str, Any], Path]:
        found = self.checkpoints.newest(stage.name, kinds=("best",))
        if found is None:
            raise CheckpointError(
                f"{self.checkpoints.run_dir.checkpoint(stage.name, 'best')}: missing or damaged, and the next stage is "
                f"trained on its outputs. Put the file back, or train {stage.name} in a new run (RUN_NAME=...)"
            )
        entry, payload = found
        return payload, entry.path

    def _best_hash(self, stage: StageConfig) -> str:
        """Read once: a finished stage does not change."""
        if stage.name not in self._hashes:
            payload, _ = self._best(stage)
            self._hashes[stage.name] = tensors_hash(payload[RESUME_KEY]["ema_state_dict"])
        return self._hashes[stage.name]

    def _folder(self, parent: StageConfig) -> LowresFolder:
        """Named by everything that shapes the volumes in it."""
        index = self.config.stages.index(parent)
        made_by = [
            {"ema": self._best_hash(stage), "steps": stage.sampler_steps, "sweeps": stage.sart_sweeps}
            for stage in self.config.stages[: index + 1]
        ]
        name = hashlib.sha256(json.dumps([made_by, self.config.seed, self.store.preparation_key]).encode()).hexdigest()[
            :16
        ]
        return LowresFolder(self.cache / "lowres" / f"{parent.name}-{name}")


def new_state(
    config: Config,
    stage: StageConfig,
    device: torch.device,
    precision: Precision,
    fingerprint: str,
    parent: str | None,
) -> StageState:
    """A stage before its first step; weights are a function of (seed, stage), the buffers of the training cases."""
    torch.manual_seed(derive_seed(config.seed, stage.name, "weights"))
    model = StageModel(config, stage)
    if device.type == "cpu":
        _channels_last(model)
    else:
        model.to(device)
    return StageState(
        config=config,
        stage=stage,
        model=model,
        ema=EMA(model),
        optimizer=new_optimizer(model, stage, config.optimizer),
        precision=precision,
        fingerprint=fingerprint,
        parent=parent,
    )


@torch.no_grad()
def measure_training_cases(state: StageState, train: StageCases) -> None:
    """Fill the model's buffers: the mean volume of the training cases, then the RMS of x_0 - c over them."""
    model, device, window = state.model, state.model.mean.device, state.config.data.hu_window
    if model.is_first:
        model.mean.copy_(mean_volume(train, device, window))
    count = min(len(train), RESIDUAL_CASES)
    squares = []
    for batch in batches(train, [[index] for index in range(count)], device, window):
        shown = torch.ones_like(batch.xrays[:, :, 0, 0])
        given = model.condition(batch.xrays, shown, batch.lowres).volume
        squares.append((batch.x_0 - given).square().double().mean())
    model.residual_scale.copy_(torch.stack(squares).mean().sqrt())
    state.ema = EMA(model)


@torch.no_grad()
def mean_volume(cases: StageCases, device: torch.device, hu_window: tuple[float, float]) -> torch.Tensor:
    """The voxel mean of cases, (1, 1, N, N, N) in [-1, 1]."""
    total = torch.zeros(1, 1, *([cases.edge] * 3), dtype=torch.float64, device=device)
    for index in range(len(cases)):
        hu = cases[index]["hu"].to(device)
        total += hu_to_x(hu.float(), hu_window).double()
    return (total / len(cases)).float()


def _channels_last(model: StageModel) -> None:
    """On a CPU 3D convolutions run two to three times faster with channels last (48 channels, 16^3)."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            module.weight = torch.nn.Parameter(module.weight.contiguous(memory_format=torch.channels_last_3d))
