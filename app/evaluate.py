"""`python -m app evaluate`: what a run's stages are worth on unseen patients, beside every baseline."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from app.config import Config
from app.data.cases import Case, CaseStore, prepare, split_patients
from app.errors import ConfigError, DataError
from app.evaluate_plan import EvaluatePlan
from app.evaluate_report import as_json, scalars, table
from app.ops.event_files import event_files
from app.ops.panels import Picture, evaluation_panel
from app.ops.writers import TensorBoardLog
from app.train.figures import Assessment, KeptLowres, StageFigures, assess_stage
from app.train.handover import mean_volume
from app.train.inference import TrainedCascade, read_run
from app.train.precision import Precision, precision_for_use
from app.train.protocols import CasePicture, Stop
from app.train.samples import StageCases
from app.workspace import RunDir, Workspace, atomic_file, atomic_write

log = logging.getLogger(__name__)

TEST_SEED = 1_000_003
"""Added to the phantoms' seed: other patients than those of any run."""


@dataclass(frozen=True)
class _Patients:
    """Whose volumes are made."""

    store: CaseStore
    cases: tuple[Case, ...]
    train_store: CaseStore
    train: tuple[Case, ...]


def evaluate(run_dir: RunDir, workspace: Workspace, plan: EvaluatePlan, stop: Stop) -> tuple[list[StageFigures], Path]:
    """Assess every trained stage, each fed by the real output of the one before.

    Returns:
        The figures, coarse to fine, and the folder with table, JSON, pictures and event file.

    Raises:
        CheckpointError: no stage is trained, or a checkpoint is damaged.
        DataError: the patients cannot be used, or were trained on.
        Stopped: asked to stop; nothing was written.
    """
    cascade = read_run(run_dir)
    config = cascade.config
    unknown = sorted(set(plan.stages) - {trained.stage.name for trained in cascade.stages})
    if unknown:
        trained_names = ", ".join(trained.stage.name for trained in cascade.stages)
        raise ConfigError(
            f"--stages {' '.join(unknown)}: no such trained stage in {run_dir.path}; it has {trained_names}"
        )
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    precision = precision_for_use(plan.device)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        patients = _patients(config, workspace, run_dir, plan, Path(scratch), stop)
        found, pictures = _assess(cascade, patients, plan, precision, stop)
    return found, _write(run_dir, plan, found, pictures)


def _patients(
    config: Config, workspace: Workspace, run_dir: RunDir, plan: EvaluatePlan, scratch: Path, stop: Stop
) -> _Patients:
    train_store = CaseStore.open(config, workspace)
    split = split_patients(train_store, config, run_dir)
    by_id = {case.id: case for case in train_store.cases}
    sides = {"train": split.train, "val": split.val}
    train = tuple(by_id[case_id] for case_id in split.train)
    if plan.patients in sides:
        store, chosen = train_store, tuple(by_id[case_id] for case_id in sides[plan.patients])
    else:
        store = _test_store(config, plan, scratch, stop)
        chosen = store.cases
        known = {case.content for case in train_store.cases}
        seen = [case for case in chosen if case.content in known]
        if seen:
            raise DataError(
                f"{len(seen)} of {len(chosen)} test scans belong to the patients of this run ({run_dir.split}). Take "
                "them out of the folder: figures on patients that were trained on say nothing"
            )
    return _Patients(store, chosen[: plan.cases], train_store, train)


def _test_store(config: Config, plan: EvaluatePlan, scratch: Path, stop: Stop) -> CaseStore:
    """Other patients, prepared like those of the run in a folder that is deleted afterwards."""
    data = config.data
    if plan.data is not None:
        data = data.model_copy(update={"source": "ct", "path": str(plan.data)})
    elif data.source == "phantoms":
        phantoms = data.phantoms.model_copy(
            update={"seed": data.phantoms.seed + TEST_SEED, "count": max(2, plan.cases or 10)}
        )
        data = data.model_copy(update={"phantoms": phantoms})
    else:
        raise ConfigError("--patients test: this run was trained on CTs; name a folder of others with --data DIR")
    test_config, test_workspace = config.model_copy(update={"data": data}), Workspace(scratch)
    test_workspace.ensure()
    report = prepare(test_config, test_workspace, stop=stop)
    log.info("test patients:\n%s", report.table())
    return CaseStore.open(test_config, test_workspace)


def _assess(
    cascade: TrainedCascade,
    patients: _Patients,
    plan: EvaluatePlan,
    precision: Precision,
    stop: Stop,
) -> tuple[list[StageFigures], list[tuple[StageFigures, CasePicture]]]:
    found: list[StageFigures] = []
    pictures: list[tuple[StageFigures, CasePicture]] = []
    outputs: KeptLowres | None = None
    last = max((cascade.config.stages.index(cascade.config.stage(name)) for name in plan.stages), default=None)
    for trained in cascade.stages[: None if last is None else last + 1]:
        stage, wanted = trained.stage, not plan.stages or trained.stage.name in plan.stages
        model = cascade.build(trained, precision.device)
        cases = StageCases(patients.store, patients.cases, stage.resolution, outputs)
        others = StageCases(patients.train_store, patients.train, stage.resolution, None)
        steps = plan.steps or stage.sampler_steps
        figures = StageFigures(stage.name, stage.resolution, trained.epoch + 1, steps, plan.samples)
        outputs = KeptLowres()
        total = len(cases) * steps * (plan.samples + 1)
        with tqdm(desc=stage.name, total=total, unit="step", disable=not sys.stderr.isatty()) as bar:
            how = Assessment(
                seed=plan.seed,
                steps=steps,
                samples=plan.samples,
                pictures=plan.pictures if wanted else 0,
                curves=plan.curves and wanted,
                stop=stop,
                after_step=lambda bar=bar: bar.update(),  # type: ignore[misc]
            )
            mean = mean_volume(others, precision.device, cascade.config.data.hu_window)
            with precision.autocast():
                shown = assess_stage(model, cases, others, mean, how, figures, outputs)
        if wanted:
            found.append(figures)
            pictures += [(figures, picture) for picture in shown]
            if not trained.finished:
                log.warning("%s is still being trained: these are the figures of its best epoch so far", stage.name)
    return found, pictures


def _write(
    run_dir: RunDir,
    plan: EvaluatePlan,
    found: Sequence[StageFigures],
    pictures: Sequence[tuple[StageFigures, CasePicture]],
) -> Path:
    """Table, JSON, pictures and TensorBoard's event file, in a folder of the run that its trainer never touches."""
    folder = run_dir.evaluation(plan.patients)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*event_files(folder), *folder.glob("stage_*.png")):
        old.unlink()
    atomic_write(folder / "table.txt", (table(found, plan.patients) + "\n").encode())
    atomic_write(folder / "figures.json", json.dumps(as_json(found, plan.patients), indent=1).encode())
    curves = TensorBoardLog(folder)
    for figures in found:
        curves.scalars(scalars(figures), figures.epoch)
    numbers: dict[str, int] = {}
    for figures, picture in pictures:
        numbers[figures.stage] = numbers.get(figures.stage, 0) + 1
        pixels = evaluation_panel(picture)
        curves.image(f"{figures.stage}/{plan.patients}_{numbers[figures.stage]}", pixels, figures.epoch)
        _save(pixels, folder / f"{figures.stage}_{numbers[figures.stage]}.png")
    curves.close()
    return folder


def _save(pixels: Picture, path: Path) -> None:
    with atomic_file(path) as file:
        Image.fromarray(pixels).save(file, "PNG")
