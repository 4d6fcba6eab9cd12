"""How cost grows: with resolution, batch, prepared cases, length of the curves, and processes. One table.

Resolution and batch: optimizer steps of the demo's stages. Cases: phantoms of 8 voxels through the product's own
preparation, then what every start pays for them. Curves: points of one run, written by the product, read by
TensorBoard's own reader, and taken back as a resume does. Processes: steps of one run of the demo's first stage, on as
many cores as this machine has. `exponent`: of the cost between the first and the last column (1 is linear).
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.config_file import load_config
from app.data.cases import CaseStore, prepare, split_patients
from app.env import Environment
from app.ops.event_files import rewind
from app.ops.writers import TensorBoardLog
from app.tags import keep_before
from app.train.precision import choose_device, choose_precision
from app.train.randomness import epoch_order
from app.train.step import train_step
from app.workspace import Workspace
from tests.bench.measure import in_turn, machine, parser, save, table
from tests.bench.steps import training

MEBI = 2**20
POINTS_PER_STEP = 6
STAGE = "stage_16"


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("growth", __doc__, 3)
    made.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--cases", type=int, nargs="+", default=[10, 100, 1000, 10000])
    made.add_argument("--points", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    arguments = made.parse_args()
    logging.disable(logging.WARNING)
    torch.set_flush_denormal(True)
    print(machine(), flush=True)
    found: list[dict[str, Any]] = []
    for measure in (
        lambda: resolutions(arguments.repeats),
        lambda: batch_sizes(arguments.batches, arguments.repeats),
        lambda: cases(arguments.cases),
        lambda: points(arguments.points),
        lambda: processes(arguments.processes),
    ):
        rows = measure()
        found += rows
        print(f"\n{shown(rows)}", flush=True)
        save({"rows": found}, arguments.json)


def row(what: str, along: str, unit: str, values: Mapping[int, float]) -> dict[str, Any]:
    """A cost by a number."""
    (first, low), *_, (last, high) = values.items()
    exponent = math.log(high / low) / math.log(last / first) if min(low, high) > 0 and last != first else math.nan
    return {"what": what, "along": along, "unit": unit, "values": dict(values), "exponent": exponent}


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A group as a table."""
    heads = [f"{number:,}" for number in rows[0]["values"]]
    lines = [
        [
            entry["what"],
            entry["unit"],
            *(f"{value:.3g}" for value in entry["values"].values()),
            f"{entry['exponent']:.2f}",
        ]
        for entry in rows
    ]
    return table((rows[0]["along"], "", *heads, "exponent"), lines)


def resolutions(repeats: int) -> list[dict[str, Any]]:
    """The same backbone (that of stage_64) at each edge."""
    config = load_config("configs/demo.yaml", ["data.phantoms.count=2"], Environment.read({}))
    finest = config.stages[-1]
    seconds = {}
    for stage in config.stages:
        seconds[stage.resolution] = step_seconds(
            config.model_copy(update={"stages": (stage.model_copy(update={"backbone": finest.backbone, "batch": 1}),)}),
            repeats,
        )
    return [row("a step of one sample", "edge in voxels", "s", seconds)]


def batch_sizes(batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """The demo's first stage."""
    config = load_config("configs/demo.yaml", [], Environment.read({}))
    first = config.stages[0]
    seconds = {
        batch: step_seconds(config.model_copy(update={"stages": (first.model_copy(update={"batch": batch}),)}), repeats)
        for batch in batches
    }
    return [
        row("a step", "batch", "s", seconds),
        row("a sample", "batch", "s", {batch: value / batch for batch, value in seconds.items()}),
    ]


def step_seconds(config: Any, repeats: int) -> float:
    """Median of an optimizer step of the config's only stage."""
    torch.set_num_threads(config.compute.threads)
    device = choose_device(config.compute)
    state, batch = training(config, config.stages[0], device, choose_precision(config.compute, device))
    way = {"step": lambda: train_step(state, batch, config.physics.weight, lambda: False)}
    return in_turn(way, repeats)["step"].median


def cases(counts: Sequence[int]) -> list[dict[str, Any]]:
    """What preparation costs once, and what each start pays again."""
    return by_cost({count: costs_of_cases(count) for count in counts}, "cases")


def costs_of_cases(count: int) -> dict[str, float]:
    """With so many phantoms."""
    config = load_config("tests/tiny.yaml", [f"data.phantoms.count={count}"], Environment.read({}))
    config = config.model_copy(update={"stages": config.stages[:1]})
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        workspace = Workspace(Path(folder))
        run = workspace.run_dir("run")
        run.ensure()
        return {
            "prepare, cold, s": seconds(lambda: prepare(config, workspace, progress=False)),
            "prepare, warm, s": seconds(lambda: prepare(config, workspace, progress=False)),
            "open and split, s": seconds(lambda: split_patients(CaseStore.open(config, workspace), config, run)),
            "order of an epoch, s": seconds(lambda: epoch_order(count, 1024, 0, "stage_8", 0)),
            "cache, MiB": size(workspace.cache) / MEBI,
        }


def points(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Curves of one run; a resume takes the last hundredth back."""
    return by_cost({count: costs_of_points(count) for count in counts}, "points of a run")


def costs_of_points(count: int) -> dict[str, float]:
    """With so many points."""
    steps = count // POINTS_PER_STEP
    with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
        run = Path(folder)
        log = TensorBoardLog(run)
        tags = [f"{STAGE}/train_{index}_step" for index in range(POINTS_PER_STEP)]
        spent = seconds(lambda: write(log, tags, steps))
        log.close()
        written = size(run)
        reader = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        kept = steps - steps // 100
        keep = keep_before([STAGE], STAGE, step=kept, epochs=0, global_step=kept)
        return {
            "logged, us per point": 1e6 * spent / (steps * POINTS_PER_STEP),
            "event files, MiB": written / MEBI,
            "read by TensorBoard, s": seconds(reader.Reload),
            "taken back by a resume, s": seconds(lambda: rewind(run, keep)),
        }


def by_cost(found: Mapping[int, Mapping[str, float]], along: str) -> list[dict[str, Any]]:
    """A row per cost."""
    names = next(iter(found.values()))
    return [row(name, along, "", {number: costs[name] for number, costs in found.items()}) for name in names]


def write(log: TensorBoardLog, tags: Sequence[str], steps: int) -> None:
    """As many points as that."""
    for step in range(1, steps + 1):
        log.scalars(dict.fromkeys(tags, 1.0 / step), step)


def processes(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Real runs under torch's launcher; the median of a step's time in the curves."""
    cores = os.cpu_count() or 1
    costs = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="bench-growth-") as folder:
            settings = ["stages.*.epochs=1", "stages.*.samples_per_epoch=160", "logging.log_every_n_steps=1"]
            settings += [f"compute.threads={max(1, cores // count)}", "data.phantoms.count=8"]
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(count),
                "-m",
                "app",
                "train",
            ]
            command += ["--config", "configs/demo.yaml", "--stages", STAGE]
            command += [part for setting in settings for part in ("--set", setting)]
            environment = {**os.environ, "WORKSPACE": folder, "OMP_NUM_THREADS": str(max(1, cores // count))}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{count} processes did not finish:\n{done.stdout}{done.stderr}")
            run = Workspace(Path(folder)).run_dir("demo")
            events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
            events.Reload()
            costs[count] = statistics.median(point.value for point in events.Scalars("perf/step_time_s"))
    return [row(f"a step of {STAGE}, {cores} cores", "processes", "s", costs)]


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
