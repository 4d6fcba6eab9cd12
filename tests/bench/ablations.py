"""What each part of the design is worth: the same training without it, on phantoms, at 16 and 32 voxels.

`--seconds` is turned into a number of optimizer steps of the baseline once, at the start, and every training takes that
many: an ablation is not blamed for what else the machine does. PSNR3D in dB (range 2500 HU) of held-out phantoms;
`gain`: less that of the given volume c; `use`: what is lost when the network alone sees another patient's X-rays;
`error`: of the projections in %. Mean +- standard deviation over the seeds. An ablation is worse (better) beyond seed
spread where it is so with every seed, beside the baseline's training from the same weights with the same draws, and the
mean of these differences, in the PSNR of the finest stage, is more than two of their standard deviations.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.config import Config
from app.config_file import load_config
from app.env import Environment
from app.model.denoiser import Condition, StageModel
from app.model.diffusion import alpha_sigma
from app.physics.geometry import VIEWS, geometry_from_config
from app.physics.projector import Projector
from app.train.state import StageState
from tests.bench.experiment import (
    Experiment,
    affordable_steps,
    line,
    nothing,
    prepared,
    summary,
    with_steps,
)
from tests.bench.measure import save

FOLDER = Path("configs/ablations")
BASELINE = "baseline"
FILES = (BASELINE, "no_prior", "physics_off", "physics_constant", "no_lowres_noise")
COLUMNS = ("c", "ours", "gain", "use", "error")


class FrontalRays(Projector):
    """Unprojects both views as if they were frontal; projects as ever, so that prior, sweeps and losses stay right."""

    def unproject(self, image: Tensor, view: str) -> Tensor:
        """Along the rays of the frontal view, whichever it is."""
        return super().unproject(image, VIEWS[0])


class VPrediction(StageModel):
    """The same network, whose output is v and not the residual on c: x_0 = alpha x_t - sigma v."""

    def forward(self, x_t: Tensor, log_snr_t: Tensor, condition: Condition) -> Tensor:
        """v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4); the loss stays one on x_0."""
        sigma_r = (self.residual_scale**2 + condition.noise_level**2).sqrt()[:, None, None, None, None]
        v = (super().forward(x_t, log_snr_t, condition) - condition.volume) / sigma_r
        alpha, sigma = alpha_sigma(log_snr_t)
        return alpha * x_t - sigma * v


@dataclass(frozen=True)
class Ablation:
    """A way to train."""

    name: str
    config: Config
    alter: Callable[[StageState], None] = nothing

    def seeded(self, seed: int, steps: Mapping[str, int]) -> Ablation:
        """The training with this seed, of so many steps per stage."""
        return replace(self, config=with_steps(self.config.model_copy(update={"seed": seed}), steps))


class LateralAsFrontal(StageModel):
    """What the lateral X-ray says is wrong with c is told along the frontal rays as well."""

    def _missing(self, volume: Tensor, noise_level: Tensor, xrays: Tensor, views: Tensor, view: int) -> Tensor:
        return super()._missing(volume, noise_level, xrays[:, [view, view]], views[:, [view, view]], 0)


class ErrorWithheld(StageModel):
    """The network is not told what the X-rays say is wrong with c."""

    def _missing(self, volume: Tensor, noise_level: Tensor, xrays: Tensor, views: Tensor, view: int) -> Tensor:
        return torch.zeros_like(volume)


class ShuffledXrays(StageModel):
    """In training the network alone is shown the X-rays of the next sample of the batch; c and losses stay right."""

    def condition(self, xrays: Tensor, *arguments: Any, **settings: Any) -> Condition:
        """A network that learns from these learns to do without."""
        if self.training:
            settings["seen"] = xrays.roll(1, 0)
        return super().condition(xrays, *arguments, **settings)


def xrays_shuffled(state: StageState) -> None:
    """A network that can look trained and has learned nothing from its X-rays."""
    state.model.__class__ = ShuffledXrays


def error_withheld(state: StageState) -> None:
    """Two input channels are zero."""
    state.model.__class__ = ErrorWithheld


def lateral_as_frontal(state: StageState) -> None:
    """The network's lateral X-ray comes from behind, like the frontal one."""
    model, geometry = state.model, geometry_from_config(state.config)
    model.__class__ = LateralAsFrontal
    model.projector = FrontalRays(geometry, state.stage.resolution).to(model.mean.device)
    model.lifter = FrontalRays(geometry, model.token_edge).to(model.mean.device)


def v_prediction(state: StageState) -> None:
    """Tensors and their names stay, what is made of them changes."""
    state.model.__class__ = VPrediction


def ablations(overrides: Sequence[str]) -> dict[str, Ablation]:
    """All, the baseline first."""
    configs = {name: load_config(FOLDER / f"{name}.yaml", overrides, Environment.read()) for name in FILES}
    baseline = configs[BASELINE]
    return {
        **{name: Ablation(name, config) for name, config in configs.items()},
        "lateral_as_frontal": Ablation("lateral_as_frontal", baseline, lateral_as_frontal),
        "error_withheld": Ablation("error_withheld", baseline, error_withheld),
        "xrays_shuffled": Ablation("xrays_shuffled", baseline, xrays_shuffled),
        "v_prediction": Ablation("v_prediction", baseline, v_prediction),
        # As the first stage of its own it makes its c from the mean volume and the X-rays.
        "previous_withheld": Ablation(
            "previous_withheld", baseline.model_copy(update={"stages": baseline.stages[-1:]})
        ),
    }


def main() -> None:
    """Prints a line per training and a table, writes JSON."""
    arguments, chosen = parse()
    baseline = chosen[BASELINE].config
    torch.set_num_threads(baseline.compute.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(prefix="bench-ablations-") as temporary:
        scratch = Path(arguments.workspace or temporary)
        patients, _ = prepared(baseline, scratch)
        train = patients.cases[arguments.held_out :]
        if arguments.steps is not None:
            steps = {stage.name: arguments.steps for stage in baseline.stages}
        else:
            steps = affordable_steps(baseline, patients, train, arguments.seconds)
        record: dict[str, Any] = {
            "steps": steps,
            "train": len(train),
            "held_out": arguments.held_out,
            "runs": [],
        }
        print(f"{len(train)} phantoms to train, {arguments.held_out} held out; steps of every training: {steps}")
        print(line("", "seed", "stage", *COLUMNS, "seconds"), flush=True)
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            trainings = [
                pool.submit(run, ablation.seeded(seed, steps), arguments.held_out, scratch)
                for seed in range(arguments.seeds)
                for ablation in chosen.values()
            ]
            for training in as_completed(trainings):
                show(training.result())
                record["runs"].append(training.result())
                save(record, arguments.json)
    first, last = baseline.stages[0].name, baseline.stages[-1].name
    record["table"] = table(record["runs"], list(chosen), first, last)
    save(record, arguments.json)
    print(f"\n{arguments.seeds} seeds\n{line('', first, last, *COLUMNS[:1], *COLUMNS[2:], width=17)}  verdict")
    for name, row in record["table"].items():
        cells = [row[first], row["ours"], row["c"], row["gain"], row["use"], row["error"]]
        print(f"{line(name, *map(spread, cells), width=17)}  {row['verdict']}")


def parse() -> tuple[argparse.Namespace, dict[str, Ablation]]:
    """The command line, and the ablations that it names; the baseline always."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these, beside the baseline")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each (3)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=150.0, help="of a training of the baseline, all stages (150)")
    budget.add_argument("--steps", type=int, help="optimizer steps of each stage, in place of --seconds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a process (1)")
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="phantoms to look at (8)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--workspace", help="keep the prepared phantoms here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("workspace/bench/ablations.json"), metavar="FILE")
    arguments = parser.parse_args()
    everything = ablations(arguments.overrides)
    unknown = sorted(set(arguments.only) - set(everything))
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: no such ablation; there are {', '.join(everything)}")
    wanted = {BASELINE, *(arguments.only or everything)}
    return arguments, {name: ablation for name, ablation in everything.items() if name in wanted}


def run(ablation: Ablation, held_out: int, scratch: Path) -> dict[str, Any]:
    """One training of all its stages, in a process of its own; the figures of each on the held-out phantoms."""
    started = time.monotonic()
    torch.set_num_threads(ablation.config.compute.threads)
    torch.set_flush_denormal(True)
    patients, _ = prepared(ablation.config, scratch)
    test, train = patients.cases[:held_out], patients.cases[held_out:]
    found = Experiment(ablation.config, patients, train, test, scratch, alter=ablation.alter).run()
    return {
        "ablation": ablation.name,
        "seed": ablation.config.seed,
        "seconds": time.monotonic() - started,
        "stages": {figures.stage: summary(figures) for figures in found},
    }


def show(training: Mapping[str, Any]) -> None:
    """A line per stage."""
    name, seed, seconds = training["ablation"], training["seed"], training["seconds"]
    for stage, row in training["stages"].items():
        print(line(name, f"{seed}", stage, *(f"{row[column]:.2f}" for column in COLUMNS), f"{seconds:.0f}"))
    sys.stdout.flush()


def table(runs: Sequence[Mapping[str, Any]], names: Sequence[str], first: str, last: str) -> dict[str, dict[str, Any]]:
    """A row per ablation: the values of all seeds by column, and the verdict."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own = [run["stages"] for run in sorted(runs, key=lambda run: run["seed"]) if run["ablation"] == name]
        rows[name] = {column: [stages[last][column] for stages in own] for column in COLUMNS}
        rows[name][first] = [stages[first]["ours"] for stages in own if first in stages]
    for name, row in rows.items():
        row["verdict"] = "" if name == BASELINE else verdict(row["ours"], rows[BASELINE]["ours"])
    return rows


def verdict(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Of the differences to the baseline's training with the same seed, whose weights and draws were the same."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f} dB, one seed has no spread"
    deviation = statistics.stdev(differences)
    apart = len({difference > 0 for difference in differences}) == 1 and abs(mean) > 2 * deviation
    word = ("better" if mean > 0 else "worse") + " beyond seed spread" if apart else "within seed spread"
    return f"{mean:+.2f} +- {deviation:.2f} dB, {word}"


def spread(values: Sequence[float]) -> str:
    """Mean +- standard deviation."""
    if not values:
        return "-"
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
