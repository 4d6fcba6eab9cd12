"""The loop of a stage in this process, on cases in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.data.cases import Case, LoadedCase
from app.errors import NumericsError, Stopped
from app.ops.panels import validation_panel
from app.train.checkpoint import CheckpointFolder
from app.train.handover import measure_training_cases, new_state
from app.train.micro_batch import MicroBatches
from app.train.pace import Pace
from app.train.parallel import ALONE
from app.train.precision import Precision
from app.train.samples import StageCases
from app.train.silent import SilentTelemetry
from app.train.stage import StageRun, train_stage
from app.train.state import StageState
from app.workspace import RunDir
from tests.conftest import tiny_config
from tests.no_hurry import NoHurry

CPU = torch.device("cpu")


class MemoryStore:
    """Cubes of tissue in air; the case's number is the cube's edge."""

    def load(self, case_id: str, edge: int) -> LoadedCase:
        hu = np.full((edge, edge, edge), -1000, np.int16)
        hu[1 : 1 + int(case_id), 2:6, 2:6] = 0
        return LoadedCase(hu, np.ones((2, edge, edge), np.float32) * int(case_id))


@dataclass
class Recorder:
    """Keeps what was logged."""

    points: list[tuple[str, int, float]] = field(default_factory=list)
    images: list[tuple[str, int]] = field(default_factory=list)
    texts: list[tuple[str, int, str]] = field(default_factory=list)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.points += [(tag, step, value) for tag, value in values.items()]

    def image(self, tag: str, pixels: Any, step: int) -> None:
        self.images.append((tag, step))

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.texts.append((tag, step, markdown))

    def write(self) -> None:
        """Nothing waits."""

    def flush(self) -> None:
        """Nothing waits."""

    def steps(self, tag: str) -> list[int]:
        return [step for name, step, _ in self.points if name == tag]


def set_up(folder: Path, *overrides: str, stop_after: int = 10**9) -> tuple[StageState, StageRun, Recorder]:
    """The first tiny stage, three cases to train and two to validate, a stop after so many polls."""
    config = tiny_config(*overrides)
    cases = [Case(str(edge), str(edge), str(edge)) for edge in range(2, 7)]
    train, val = (StageCases(MemoryStore(), part, 8, None) for part in (cases[:3], cases[3:]))  # type: ignore[arg-type]
    state = new_state(config, config.stages[0], CPU, Precision("fp32", CPU), "f" * 64, None)
    measure_training_cases(state, train)
    recorder, polls = Recorder(), iter(range(10**9))
    run = StageRun(
        train=train,
        val=val,
        checkpoints=CheckpointFolder(RunDir(folder)),
        pace=Pace(1000.0),
        run_log=recorder,
        draw=validation_panel,
        status=lambda **fields: None,
        telemetry=SilentTelemetry(),
        stop=lambda: next(polls) >= stop_after,
        grace=NoHurry(),
        mark=lambda step, seconds: None,
        after_epoch=lambda: None,
        first_global_step=100,
        micro_batches=MicroBatches(config, folder / "micro_batches.json", CPU, "fp32", ALONE),
    )
    return state, run, recorder


def test_buffers_are_measured_on_the_training_cases(tmp_path: Path) -> None:
    """The mean is the voxel mean of the three cubes; the residual scale is the RMS of x_0 - c over them."""
    state, run, _ = set_up(tmp_path, "stages.stage_8.prior_sweeps=0")
    volumes = torch.stack([run.train[index]["hu"] for index in range(3)]).float()
    x = (volumes + 1000) / 2500 * 2 - 1
    assert torch.allclose(state.model.mean, x.mean(0, keepdim=True), atol=1e-6)
    expected = (x - x.mean(0)).square().mean().sqrt()
    assert state.model.residual_scale.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(state.ema.model.mean, state.model.mean)


def test_per_step_points_follow_the_cadence_and_step_one(tmp_path: Path) -> None:
    """log_every_n_steps = 5 over 12 steps: 1, 5, 10; `perf/` on the step over all stages."""
    state, run, recorder = set_up(tmp_path, "logging.log_every_n_steps=5")
    train_stage(state, run)
    assert recorder.steps("stage_8/train_loss_step") == [1, 5, 10]
    assert recorder.steps("perf/step_time_s") == [101, 105, 110]
    assert recorder.steps("stage_8/train_loss") == [1, 2, 3]
    assert recorder.steps("stage_8/val_loss") == [0, 1, 2, 3]
    assert recorder.images == [("stage_8/held_out_1", epoch) for epoch in range(4)]


def test_training_lowers_the_loss_on_held_out_cases(tmp_path: Path) -> None:
    """Twenty epochs on three cubes: the network beats its conditioning volume on cubes that it has not seen."""
    state, run, recorder = set_up(tmp_path, "stages.stage_8.epochs=20", "validation.pictures=0")
    train_stage(state, run)
    losses = [value for tag, _, value in recorder.points if tag == "stage_8/val_diffusion"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("polls", [0, 3, 7, 13, 15, 19, 24, 31])
def test_a_stop_at_any_poll_saves_a_state_that_goes_on(tmp_path: Path, polls: int) -> None:
    """In the first validation, a step, a later validation or the sampler: the rest gives the straight run's weights."""
    straight, run, _ = set_up(tmp_path / "straight")
    (tmp_path / "straight").mkdir()
    train_stage(straight, run)
    (tmp_path / "stopped").mkdir()
    state, run, _ = set_up(tmp_path / "stopped", stop_after=polls)
    with pytest.raises(Stopped):
        train_stage(state, run)
    resumed, run, _ = set_up(tmp_path / "stopped")
    found = run.checkpoints.newest("stage_8")
    assert found is not None
    resumed.restore(found[1], found[0].path.name)
    train_stage(resumed, run)
    for one, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.progress.best_val_loss == straight.progress.best_val_loss


def test_files_that_a_kill_left_out_are_written_on_resume(tmp_path: Path) -> None:
    """Killed after `last` of the last epoch and before the other kinds: they appear, and nothing is trained."""
    state, run, _ = set_up(tmp_path)
    train_stage(state, run)
    kept = state.payload()
    for kind in ("best", "epoch_3", "final"):
        run.checkpoints.run_dir.checkpoint("stage_8", kind).unlink()
    resumed, run, recorder = set_up(tmp_path)
    resumed.restore(kept, "stage_8_last.pt")
    train_stage(resumed, run)
    assert not [point for point in recorder.points if not point[0].startswith("ops/")]
    kinds = {entry.kind for entry in run.checkpoints.entries("stage_8") if entry.counters == resumed.progress.counters}
    assert {"epoch_3", "final", "last"} <= kinds
    assert ("best" in kinds) == (resumed.progress.best_epochs == 3)


def stopped_and_resumed(
    folder: Path, settings: tuple[str, ...], stop_after: int
) -> tuple[StageState, StageRun, Recorder]:
    """A stage that was stopped after so many polls and is about to go on."""
    with pytest.raises(Stopped):
        train_stage(*set_up(folder, *settings, stop_after=stop_after)[:2])
    state, run, recorder = set_up(folder, *settings)
    found = run.checkpoints.newest("stage_8")
    assert found is not None
    state.restore(found[1], found[0].path.name)
    return state, run, recorder


@pytest.mark.parametrize("spoiled", [True, False])
def test_best_stays_best_when_validation_is_worse_after_a_resume(tmp_path: Path, spoiled: bool) -> None:
    """Weights spoiled after the resume: `best` keeps file, loss and epoch. Left alone, the same run improves on it."""
    settings = ("stages.stage_8.epochs=8", "stages.stage_8.learning_rate=1e-3", "validation.pictures=0")
    resumed, run, _ = stopped_and_resumed(tmp_path, settings, 35)
    before = next(entry for entry in run.checkpoints.entries("stage_8") if entry.kind == "best")
    assert 0 < resumed.progress.best_epochs < 8
    best_loss, best_epochs = resumed.progress.best_val_loss, resumed.progress.best_epochs
    if spoiled:
        with torch.no_grad():
            for weight in (*resumed.model.parameters(), *resumed.ema.model.parameters()):
                weight += 0.5
    train_stage(resumed, run)
    after = next(entry for entry in run.checkpoints.entries("stage_8") if entry.kind == "best")
    kept = (after, resumed.progress.best_val_loss, resumed.progress.best_epochs) == (before, best_loss, best_epochs)
    assert kept == spoiled


def test_a_network_that_learns_nothing_raises_the_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rate of nearly 0: from the third validation after the warm-up on, log and curves say so; a resume counts on."""
    settings = ("stages.stage_8.epochs=8", "stages.stage_8.learning_rate=1e-9", "optimizer.warmup_steps=4")
    state, run, recorder = stopped_and_resumed(tmp_path, settings, 50)
    resumed_at = state.progress.epochs
    assert 0 < resumed_at < 4
    caplog.clear()
    train_stage(state, run)
    assert [(tag, epoch) for tag, epoch, _ in recorder.texts] == [("stage_8/alarm", epoch) for epoch in range(4, 9)]
    assert caplog.text.count("it has learned next to nothing") == 5


def test_a_network_that_learns_raises_no_alarm(tmp_path: Path) -> None:
    """Cubes whose edge only the X-rays tell, validated on those trained: gain and X-ray use come above the limit."""
    settings = ("stages.stage_8.epochs=25", "stages.stage_8.learning_rate=3e-3", "stages.stage_8.sart_sweeps=0")
    state, run, recorder = set_up(tmp_path, *settings, "stages.stage_8.prior_sweeps=0", "diffusion.view_dropout=0.0")
    train_stage(state, replace(run, val=run.train))
    last = {tag: value for tag, _, value in recorder.points}
    assert last["stage_8/val_gain_over_c_db"] > 0.3
    assert last["stage_8/val_xray_use_db"] > 0.3
    assert state.progress.idle_validations == 0


def test_a_validation_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    """Not a best of nan: the message names stage and epoch."""
    state, run, _ = set_up(tmp_path)
    next(iter(state.ema.model.parameters())).fill_(float("nan"))
    with pytest.raises(NumericsError, match="stage_8: the validation loss after 0 epochs is not finite"):
        train_stage(state, run)
