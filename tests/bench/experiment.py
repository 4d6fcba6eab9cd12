"""What experiments share: cases of several sources, stages trained here for a number of steps, and their figures.

All is the product's own: preparation, optimizer step, hand-over, figures. Checkpoints, curves and validation are left
out.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.config import Config, StageConfig
from app.data.cases import Case, CaseStore, LoadedCase, PrepareReport, prepare
from app.train.figures import (
    AIR,
    GIVEN,
    MEAN,
    PREDICTION,
    SART,
    SHUFFLED,
    ZERO_NETWORK,
    Assessment,
    KeptLowres,
    StageFigures,
    assess_stage,
)
from app.train.handover import mean_volume, measure_training_cases, new_state
from app.train.parallel import ALONE
from app.train.precision import Precision, choose_device, choose_precision
from app.train.randomness import epoch_order
from app.train.reconstruct import hand_over
from app.train.samples import Batch, LowresFolder, StageCases, batches
from app.train.schedule import physics_weight
from app.train.state import StageState
from app.train.step import train_step
from app.workspace import Workspace

EPOCHS = 10
WARM_UP_STEPS, TIMED_STEPS = 3, 8
Point = Callable[[StageState], None]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def nothing(*_: Any) -> None:
    """In place of what an experiment may do."""


@dataclass
class Patients:
    """Prepared cases, kept in memory once they are loaded; those of several sources can be put together."""

    stores: dict[str, CaseStore]
    """The store of each case."""
    cases: tuple[Case, ...]
    _loaded: dict[tuple[str, int], LoadedCase] = field(default_factory=dict)

    def load(self, case_id: str, edge: int) -> LoadedCase:
        """A case at the resolution of a stage."""
        if (case_id, edge) not in self._loaded:
            self._loaded[case_id, edge] = self.stores[case_id].load(case_id, edge)
        return self._loaded[case_id, edge]

    def __add__(self, other: Patients) -> Patients:
        return Patients(self.stores | other.stores, self.cases + other.cases)


def prepared(config: Config, folder: Path) -> tuple[Patients, PrepareReport]:
    """The cases of the config's source, prepared in a workspace of their own at `folder`; fast where they are there."""
    workspace = Workspace(folder)
    report = prepare(config, workspace, progress=False)
    store = CaseStore.open(config, workspace)
    return Patients({case.id: store for case in store.cases}, store.cases), report


def with_steps(config: Config, steps: Mapping[str, int], epochs: int = EPOCHS) -> Config:
    """The config with stages of so many optimizer steps, rounded to whole epochs; schedules stretch with them."""
    stages = tuple(
        stage.model_copy(
            update={
                "epochs": (count := min(epochs, steps[stage.name])),
                "samples_per_epoch": round(steps[stage.name] / count) * stage.batch,
            }
        )
        for stage in config.stages
    )
    return config.model_copy(update={"stages": stages})


def affordable_steps(config: Config, patients: Patients, cases: Sequence[Case], seconds: float) -> dict[str, int]:
    """Optimizer steps of each stage that take `seconds` here, an equal share of the time for each stage."""
    share = seconds / len(config.stages)
    return {stage.name: max(1, int(share / step_seconds(config, stage, patients, cases))) for stage in config.stages}


def step_seconds(config: Config, stage: StageConfig, patients: Patients, cases: Sequence[Case]) -> float:
    """Median duration of a step of a fresh stage; the truth stands in for the previous stage's output."""
    lowres, index = None, config.stages.index(stage)
    if index:
        lowres = KeptLowres()
        for case in cases:
            lowres.keep(case, patients.load(case.id, config.stages[index - 1].resolution).hu)
    data = StageCases(patients, cases, stage.resolution, lowres)  # type: ignore[arg-type]
    state = fresh_state(config, stage)
    measure_training_cases(state, data)
    endless = itertools.chain.from_iterable(_epoch(state, data, epoch) for epoch in itertools.count())
    times = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        train_step(state, endless, config.physics.weight, never)
        state.progress.step += 1
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP_STEPS:])


def fresh_state(config: Config, stage: StageConfig) -> StageState:
    """A stage before its first step, on the GPU where there is one."""
    device = choose_device(config.compute)
    return new_state(config, stage, device, Precision(choose_precision(config.compute, device), device), "", None)


@dataclass(frozen=True)
class Experiment:
    """A cascade that is trained on some cases and looked at on others."""

    config: Config
    patients: Patients
    train: Sequence[Case]
    """A case that stands here twice is shown twice as often."""
    test: Sequence[Case]
    scratch: Path
    measured: Sequence[Case] = ()
    """What mean and residual scale are taken from; empty is `train`."""
    alter: Point = nothing
    """Changes a fresh stage before anything is measured."""
    curves: bool = False
    """Also PSNR by sampler steps and by noise level."""

    def run(self, after_epoch: Callable[[StageFigures, StageState], None] = nothing) -> list[StageFigures]:
        """Train every stage on the real outputs of the one before; the figures of each on the test cases.

        `after_epoch` is given the figures at the end of each epoch; unless it is, only the last ones are made.
        """
        found: list[StageFigures] = []
        lowres: LowresFolder | None = None
        for stage in self.config.stages:
            data = {
                name: StageCases(self.patients, cases, stage.resolution, lowres)  # type: ignore[arg-type]
                for name, cases in (("train", self.train), ("test", self.test), ("measured", self._measured()))
            }

            def look(state: StageState, data: dict[str, StageCases] = data) -> None:
                if after_epoch is not nothing or state.progress.epochs == state.stage.epochs:
                    figures = self._figures(state, data)
                    after_epoch(figures, state)
                    if state.progress.epochs == state.stage.epochs:
                        found.append(figures)

            state = trained(self.config, stage, data["train"], data["measured"], self.alter, look)
            if stage != self.config.stages[-1]:
                target = LowresFolder(Path(tempfile.mkdtemp(dir=self.scratch)))
                everyone = list({case.id: case for case in (*self.train, *self.test, *self._measured())}.values())
                with state.precision.autocast():
                    hand_over(state.ema.model, self.patients, everyone, lowres, target, self.config, never)  # type: ignore[arg-type]
                lowres = target
        return found

    def _measured(self) -> Sequence[Case]:
        return self.measured or list(dict.fromkeys(self.train))

    def _figures(self, state: StageState, data: Mapping[str, StageCases]) -> StageFigures:
        stage, model = state.stage, state.ema.model
        found = StageFigures(stage.name, stage.resolution, state.progress.epochs, stage.sampler_steps, 1)
        how = Assessment(self.config.seed, stage.sampler_steps, 1, 0, self.curves, never, nothing)
        mean = mean_volume(data["measured"], model.mean.device, model.hu_window)
        with state.precision.autocast():
            assess_stage(model, data["test"], data["measured"], mean, how, found, KeptLowres())
        return found


def trained(
    config: Config, stage: StageConfig, train: StageCases, measured: StageCases, alter: Point, after_epoch: Point
) -> StageState:
    """A stage after all its steps."""
    state = fresh_state(config, stage)
    alter(state)
    measure_training_cases(state, measured)
    state.model.train()
    for epoch in range(stage.epochs):
        loader, weight = _epoch(state, train, epoch), physics_weight(epoch, stage, config.physics)
        for _ in range(stage.steps_per_epoch):
            train_step(state, loader, weight, never)
            state.progress.step += 1
        state.progress.epochs += 1
        after_epoch(state)
    return state


def _epoch(state: StageState, train: StageCases, epoch: int) -> Iterator[Batch]:
    config, stage = state.config, state.stage
    samples = stage.steps_per_epoch * stage.batch
    order = epoch_order(len(train), samples, config.seed, stage.name, epoch)
    return batches(
        train,
        ALONE.micro_batches(order, stage, ALONE.micro_batch(stage)),
        state.model.mean.device,
        config.data.hu_window,
    )


def summary(figures: StageFigures) -> dict[str, float]:
    """Means over the cases: PSNR in dB of everything that is compared, and what the network adds and uses."""
    psnr = {
        name: statistics.fmean(figures.values(method, "psnr_db"))
        for name, method in (
            ("air", AIR),
            ("mean", MEAN),
            ("sart", SART),
            ("c", GIVEN),
            ("zero", ZERO_NETWORK),
            ("ours", PREDICTION),
        )
    }
    return {
        **psnr,
        "gain": psnr["ours"] - psnr["c"],
        "use": statistics.fmean(figures.differences(PREDICTION, SHUFFLED)),
        "error": statistics.fmean(figures.values(PREDICTION, "projection_error_percent")),
    }


def line(first: str, *cells: str, label: int = 20, width: int = 10) -> str:
    """A line of a table."""
    return f"{first:{label}}" + "".join(f"{cell:>{width}}" for cell in cells)
