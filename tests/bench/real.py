"""What models make of real CTs: whether they learn a few by heart, and what they make of one that they never saw.

PSNR3D in dB, range 2500 HU. `c`: the volume that the network is given; `zero`: c with the sweeps that the sampler adds;
`gain`: ours less c; `use`: PSNR lost when the network alone sees another patient's X-rays; `error`: of projections, %.
CTs appear under the names of their files, which is for public ones.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.config import AugmentationConfig, Config
from app.config_file import load_config
from app.data.build_ct import content_hash
from app.data.cases import Case
from app.data.sources import find_sources
from app.env import Environment
from app.train.figures import StageFigures
from app.train.state import StageState
from tests.bench.experiment import EPOCHS, Experiment, Patients, affordable_steps, prepared, summary, with_steps
from tests.bench.experiment import line as wide_line
from tests.bench.measure import save

COLUMNS = ("air", "mean", "sart", "c", "zero", "ours", "gain", "use", "error")
HEADINGS = ("air", "mean", "SART-20", "c", "zero", "ours", "gain", "use", "error %")
Row = Mapping[str, float]
line = partial(wide_line, label=32, width=9)


def main() -> None:
    """Prints a table, writes JSON."""
    arguments = parse()
    config = chosen_config(arguments)
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(prefix="bench-real-") as temporary:
        workspace = Path(arguments.workspace or temporary)
        names, patients = real_patients(arguments, config, workspace)
        work = {"overfit": overfit, "leave-one-out": leave_one_out}[arguments.experiment]
        work(arguments, single_stage(config, arguments), config, names, patients, workspace)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="experiment", required=True)
    helps = {
        "overfit": "train on all CTs without augmentation and sample them from their own X-rays, over time",
        "leave-one-out": "for each CT train on the others, with the config's augmentation, and sample the one left out",
    }
    for verb, text in helps.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of CTs")
        sub.add_argument("--pattern", default="thorax_*", help="which of its entries are used (thorax_*)")
        sub.add_argument("--config", default="configs/real-small.yaml", metavar="FILE")
        sub.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
        sub.add_argument("--edge", type=int, default=64, help="the stage with cubes of this edge (64)")
        sub.add_argument("--patch", type=int, help="of that stage's backbone (the config's)")
        sub.add_argument("--cascade", action="store_true", help="all stages up to it, not it alone as the first one")
        default = {"overfit": 60.0, "leave-one-out": 30.0}[verb]
        budget = sub.add_mutually_exclusive_group()
        budget.add_argument(
            "--minutes",
            type=float,
            default=default,
            help=f"as many training steps as take so long here, for each training ({default:g})",
        )
        budget.add_argument("--steps", type=int, help="optimizer steps of each stage, in place of --minutes")
        sub.add_argument("--points", type=int, default=EPOCHS, help=f"how often the cases are sampled ({EPOCHS})")
        sub.add_argument("--workspace", help="keep the prepared cases here (default: a temporary folder)")
        sub.add_argument("--json", type=Path, default=Path(f"workspace/bench/real-{verb}.json"), metavar="FILE")
        if verb == "leave-one-out":
            sub.add_argument("--phantoms", type=int, default=0, metavar="N", help="mixed in: half of the samples (0)")
            sub.add_argument("--folds", nargs="+", default=[], metavar="NAME", help="only these CTs are left out")
    return parser.parse_args()


def chosen_config(arguments: argparse.Namespace) -> Config:
    """The config with all its stages: cases are prepared for the finest of them, as a run does."""
    overrides = [*arguments.overrides, "data.source=ct"]
    if arguments.patch is not None:
        overrides.append(f"stages.stage_{arguments.edge}.backbone.patch={arguments.patch}")
    return load_config(arguments.config, overrides, Environment.read())


def single_stage(config: Config, arguments: argparse.Namespace) -> Config:
    """The stages to train: one as the first of its own, or all up to it."""
    edges = [stage.resolution for stage in config.stages]
    if arguments.edge not in edges:
        raise SystemExit(f"--edge {arguments.edge}: {arguments.config} has stages of {edges} voxels")
    end = edges.index(arguments.edge) + 1
    stages = config.stages[:end] if arguments.cascade else config.stages[end - 1 : end]
    return config.model_copy(update={"stages": stages})


def real_patients(arguments: argparse.Namespace, config: Config, workspace: Path) -> tuple[dict[str, str], Patients]:
    """The CTs by the names of their files, prepared from copies; the case's id leads to the name."""
    folder = workspace / "real" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(arguments.data.glob(arguments.pattern))
    if len(found) < 2:
        raise SystemExit(f"{arguments.data}: expected at least two CTs like {arguments.pattern}, found {len(found)}")
    for path in found:
        if not (folder / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
    patients, report = prepared(config, workspace / "real")
    print(report.table(show_names=True), flush=True)
    by_content = {content_hash(source): source.name.split(".")[0] for source in find_sources(folder).sources}
    return {case.id: by_content.get(case.content, case.id) for case in patients.cases}, patients


def overfit(
    arguments: argparse.Namespace,
    config: Config,
    _full: Config,
    names: Mapping[str, str],
    patients: Patients,
    workspace: Path,
) -> None:
    """Train on every case and sample the same ones."""
    config = config.model_copy(update={"augmentation": AugmentationConfig()})
    config = budgeted(arguments, config, patients, patients.cases)
    record = {"config": config.without_paths().model_dump(mode="json"), "trace": []}
    print(f"{len(patients.cases)} CTs, without augmentation; {described(config)}")
    print(line("", "steps", "minutes", *HEADINGS), flush=True)
    trace = Trace(record, arguments.json)
    (figures,) = Experiment(config, patients, patients.cases, patients.cases, workspace).run(trace)[-1:]
    print("\nat the end, per CT:")
    print(line("", *HEADINGS))
    record["cases"] = per_case(figures, names)
    for name, row in record["cases"].items():
        print(line(name, *shown(row)))
    save(record, arguments.json)


def leave_one_out(
    arguments: argparse.Namespace,
    config: Config,
    full: Config,
    names: Mapping[str, str],
    patients: Patients,
    workspace: Path,
) -> None:
    """One training per CT, on the others."""
    unknown = sorted(set(arguments.folds) - set(names.values()))
    if unknown:
        raise SystemExit(f"--folds {' '.join(unknown)}: no such CT; there are {', '.join(sorted(names.values()))}")
    phantoms: tuple[Case, ...] = ()
    everyone = patients
    if arguments.phantoms:
        data = full.data.model_copy(
            update={
                "source": "phantoms",
                "phantoms": full.data.phantoms.model_copy(update={"count": arguments.phantoms}),
            }
        )
        synthetic, _ = prepared(full.model_copy(update={"data": data}), workspace / "phantoms")
        phantoms, everyone = synthetic.cases, patients + synthetic
    config = budgeted(arguments, config, everyone, everyone.cases)
    record = {"config": config.without_paths().model_dump(mode="json"), "folds": {}}
    print(f"{len(patients.cases)} CTs, {len(phantoms)} phantoms; {described(config)}")
    ordered = sorted(patients.cases, key=lambda case: names[case.id])
    for held_out in ordered:
        name = names[held_out.id]
        if arguments.folds and name not in arguments.folds:
            continue
        real = [case for case in ordered if case.patient != held_out.patient]
        # As many real samples as synthetic ones; mean and residual scale are those of real patients.
        train = real * max(1, round(len(phantoms) / len(real))) + list(phantoms)
        print(f"\nwithout {name}:\n{line('', 'steps', 'minutes', *HEADINGS)}", flush=True)
        fold: dict[str, Any] = {"trace": []}
        record["folds"][name] = fold
        trace = Trace(fold, None)
        found = Experiment(config, everyone, train, [held_out], workspace, measured=real).run(trace)
        fold["stages"] = {figures.stage: summary(figures) for figures in found}
        fold["figures"] = found[-1].cases[held_out.id]
        save(record, arguments.json)
    rows = {name: fold["stages"][config.stages[-1].name] for name, fold in record["folds"].items()}
    rows["mean"] = {column: statistics.fmean(row[column] for row in rows.values()) for column in COLUMNS}
    print(f"\neach CT by a model that never saw it:\n{line('', *HEADINGS)}")
    for name, row in rows.items():
        print(line(name, *shown(row)))
    save(record, arguments.json)


def budgeted(arguments: argparse.Namespace, config: Config, patients: Patients, cases: Sequence[Case]) -> Config:
    """The config with the number of steps that the command line asks for."""
    if arguments.steps is not None:
        steps = {stage.name: arguments.steps for stage in config.stages}
    else:
        steps = affordable_steps(config, patients, cases, 60 * arguments.minutes)
    return with_steps(config, steps, arguments.points)


class Trace:
    """Prints and keeps the figures as they come."""

    def __init__(self, record: dict[str, Any], path: Path | None) -> None:
        self.record, self.path, self.started = record, path, time.monotonic()

    def __call__(self, figures: StageFigures, state: StageState) -> None:
        """At the end of an epoch."""
        minutes, row = (time.monotonic() - self.started) / 60, summary(figures)
        self.record["trace"].append({"stage": figures.stage, "steps": state.progress.step, "minutes": minutes, **row})
        print(line(figures.stage, f"{state.progress.step}", f"{minutes:.1f}", *shown(row)), flush=True)
        if self.path is not None:
            save(self.record, self.path)


def per_case(figures: StageFigures, names: Mapping[str, str]) -> dict[str, Row]:
    """The summary of each case by its name."""
    found = {}
    for case_id, name in sorted(names.items(), key=lambda item: item[1]):
        alone = StageFigures(figures.stage, figures.edge, figures.epoch, figures.steps, figures.samples)
        alone.cases[case_id] = figures.cases[case_id]
        found[name] = summary(alone)
    return found


def described(config: Config) -> str:
    """The stages in words."""
    return ", ".join(
        f"{stage.name}: patch {stage.backbone.patch}, {stage.epochs * stage.steps_per_epoch} steps of {stage.batch}"
        for stage in config.stages
    )


def shown(row: Row) -> list[str]:
    """The cells of a table."""
    return [f"{row[column]:.2f}" for column in COLUMNS]


if __name__ == "__main__":
    main()
