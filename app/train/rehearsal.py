"""Each stage at full size before the first step of the run, so that what cannot work fails now and not at night.

A stage takes two optimizer steps (from the second on the optimizer has its moments), validates, is saved to the volume,
and is read back, all by the code that trains. Nothing of it is kept, and nothing in the run depends on it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.config import Config, StageConfig
from app.data.cases import Case, CaseStore
from app.errors import MachineError
from app.train.checkpoint import CheckpointFolder, Counters
from app.train.ema import tensors_hash
from app.train.handover import new_state
from app.train.memory import memory_of
from app.train.micro_batch import MicroBatches, refused_when_full
from app.train.parallel import Ranks
from app.train.precision import Precision
from app.train.protocols import Status, Stop
from app.train.samples import StageCases, batches
from app.train.state import StageState
from app.train.step import train_step
from app.train.validation import CHUNK, validate
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

STEPS = 2


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal of a run works with.

    Args:
        config: the run.
        store: the prepared cases.
        train: cases of the split.
        val: cases of the split.
        device: of this process.
        precision: of the run.
        run_dir: takes the checkpoints that are written, read back and deleted.
        status: told which stage is being rehearsed.
        micro_batches: made smaller where a step does not fit.
        stop: polled everywhere.
        ranks: this process among those of the run.
    """

    config: Config
    store: CaseStore
    train: Sequence[Case]
    val: Sequence[Case]
    device: torch.device
    precision: Precision
    run_dir: RunDir
    status: Status
    micro_batches: MicroBatches
    stop: Stop
    ranks: Ranks

    def run(self, stages: Sequence[StageConfig]) -> None:
        """Rehearse those of `stages` that were not yet rehearsed on a device like this one.

        Raises:
            MachineError: a stage does not fit into memory, or its checkpoint does not come back whole.
            Stopped: asked to stop.
        """
        if self.ranks.is_first:
            # Of an attempt that was killed in the middle.
            shutil.rmtree(self.run_dir.rehearsal, ignore_errors=True)
        due = self.ranks.first(lambda: self._due(stages))
        seconds = 0.0
        for stage in due:
            with refused_when_full(self.config, stage, self.precision.name, self.device):
                seconds += self._stage(stage) * stage.epochs * stage.steps_per_epoch
            if self.ranks.is_first:
                self._remember(stage)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if due:
            hours = f"{seconds / 3600:.1f} h"
            log.info("rehearsed %s: their steps will take about %s at this pace", ", ".join(_names(due)), hours)

    def _stage(self, stage: StageConfig) -> float:
        """Rehearse a stage; seconds of an optimizer step."""
        self.status(state="rehearsing", stage=stage.name)
        log.info("rehearsing %s: a step, a validation, a checkpoint", stage.name)
        began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        edges = [other.resolution for other in self.config.stages]
        index = edges.index(stage.resolution)
        lowres = None if index == 0 else _Pooled(self.store, edges[index - 1])
        train, val = (StageCases(self.store, cases, stage.resolution, lowres) for cases in (self.train, self.val))
        state = new_state(self.config, stage, self.device, self.precision, "rehearsal", None)
        state.model.train()
        step_s = self.micro_batches.until_it_fits(stage, lambda: self._steps(state, train))
        tick = time.monotonic()
        with self.precision.autocast():
            validate(state.ema.model, val, train, self._one_chunk(), 0, self.stop, self.ranks)
        validation_s = time.monotonic() - tick
        saved = self.ranks.everyone(lambda: self._save_and_load(state) if self.ranks.is_first else "")
        peak = ""
        if self.device.type == "cuda":
            most, whole = torch.cuda.max_memory_allocated(self.device) / 2**30, memory_of(self.device) / 2**30
            peak = f", at most {most:.1f} of {whole:.1f} GiB"
        log.info(
            "rehearsed %s in %.1f s: a step of %d samples %.2f s, %d at a time%s; validation of a few cases %.1f s; %s",
            stage.name,
            time.monotonic() - began,
            stage.batch,
            step_s,
            self.micro_batches.size(stage),
            peak,
            validation_s,
            saved,
        )
        return step_s

    def _steps(self, state: StageState, train: StageCases) -> float:
        """Seconds of the last step."""
        stage, window = state.stage, self.config.data.hu_window
        order = [index % len(train) for index in range(stage.batch)]
        seconds = 0.0
        chunks = self.ranks.micro_batches(order, stage, self.micro_batches.size(stage))
        while state.progress.step < STEPS:
            tick = time.monotonic()
            loader = batches(train, chunks, self.device, window)
            train_step(state, loader, self.config.physics.weight, self.stop, self.ranks)
            state.progress.step += 1
            seconds = time.monotonic() - tick
        return seconds

    def _one_chunk(self) -> Config:
        """Validation takes the cases in chunks: one of them needs as much memory as all."""
        few = {"cases": min(CHUNK, self.config.validation.cases), "sampled_cases": CHUNK}
        validation = self.config.validation.model_copy(update=few)
        return self.config.model_copy(update={"validation": validation})

    def _save_and_load(self, state: StageState) -> str:
        """Write a checkpoint where the run's will lie, verify it and read it back; what that cost, in words."""
        scratch = RunDir(self.run_dir.rehearsal)
        try:
            scratch.ensure()
            before, tick = _content(state), time.monotonic()
            folder = CheckpointFolder(scratch)
            folder.publish(state.stage.name, ["last"], state.payload(), Counters(0, STEPS))
            written, mib = time.monotonic(), scratch.checkpoint(state.stage.name, "last").stat().st_size / 2**20
            found = folder.newest(state.stage.name)
            if found is not None:
                state.restore(found[1], found[0].path.name)
            if found is None or _content(state) != before:
                raise MachineError(
                    f"{self.run_dir.path}: a checkpoint of {state.stage.name} that was written as a trial was not the "
                    "same when it was read back. The volume or the memory of this machine is broken: use another one"
                )
            return (
                f"checkpoint of {mib:.0f} MiB written in {written - tick:.1f} s, verified and read in "
                f"{time.monotonic() - written:.1f} s"
            )
        except OSError as error:
            raise MachineError(
                f"{self.run_dir.path} does not take a checkpoint of {state.stage.name}, which was tried before the "
                f"first step: {error.strerror}. Make room or mount a larger volume, then run the same command"
            ) from error
        finally:
            shutil.rmtree(scratch.path, ignore_errors=True)

    def _due(self, stages: Sequence[StageConfig]) -> list[StageConfig]:
        wanted = self.config.compute.rehearse
        if wanted == "never" or (wanted == "auto" and self.device.type != "cuda"):
            return []
        known = self._known()
        return [stage for stage in stages if known.get(stage.name) != self._key(stage)]

    def _key(self, stage: StageConfig) -> str:
        """What a rehearsal is valid for."""
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        edges = [other.resolution for other in self.config.stages]
        parts = [stage.model_dump_json(), edges, self.precision.name, gpu, memory_of(self.device), self.ranks.size]
        return hashlib.sha256(json.dumps([*parts, torch.__version__]).encode()).hexdigest()

    def _known(self) -> dict[str, str]:
        try:
            kept = json.loads(self.run_dir.rehearsed.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): the stages are rehearsed again", self.run_dir.rehearsed, error)
            return {}
        return kept if isinstance(kept, dict) else {}

    def _remember(self, stage: StageConfig) -> None:
        content = {**self._known(), stage.name: self._key(stage)}
        try:
            atomic_write(self.run_dir.rehearsed, json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.run_dir.rehearsed, error.strerror)


class _Pooled:
    """In place of the previous stage's outputs, which are not there yet: the truth on its grid."""

    def __init__(self, store: CaseStore, edge: int) -> None:
        self._store, self._edge = store, edge

    def load(self, case: Case) -> np.ndarray:
        """(n, n, n) int16 HU."""
        return self._store.load(case.id, self._edge).hu


def _content(state: StageState) -> tuple[str, str]:
    return tensors_hash(state.model.state_dict()), tensors_hash(state.ema.model.state_dict())


def _names(stages: Sequence[StageConfig]) -> list[str]:
    return [stage.name for stage in stages]
