"""What Weights & Biases costs a step: without it, offline, and online beside a network that hangs.

Real runs of the config's first stage in processes of their own, round by round; the server of the third takes every
connection and never answers. `step`: the median step of the run's curves; `all steps`: from the first step to the
last, where a single wait would show.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.config_file import load_config
from app.env import Environment
from app.tags import STEP_TIME
from app.workspace import Workspace
from tests.bench.measure import Times, machine, parser, save, table
from tests.wandb_server import KEY, silent_server

WAYS = ("disabled", "offline", "hangs")


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("network", __doc__, 4)
    made.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    made.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (40)")
    arguments = made.parse_args()
    plain = load_config(arguments.config, arguments.overrides, Environment.read({}))
    first = plain.stages[0]
    overrides = [
        *(f"stages.{first.name}.epochs=1", f"stages.{first.name}.samples_per_epoch={arguments.steps * first.batch}"),
        *("logging.log_every_n_steps=1", "checkpoint.save_every_s=3600", *arguments.overrides),
    ]
    command = [sys.executable, "-m", "app", "train", "--config", arguments.config, "--stages", first.name]
    command += [part for override in overrides for part in ("--set", override)]
    print(f"{arguments.config}, {first.name}, {machine()}", flush=True)
    steps: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="bench-network-") as folder, silent_server() as server:
        settings: dict[str, dict[str, str]] = {
            "disabled": {"WANDB_MODE": "disabled"},
            "offline": {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY},
            "hangs": {"WANDB_MODE": "online", **server.env},
        }
        for number in range(arguments.repeats + 1):
            for way in WAYS:
                env = {**os.environ, "WORKSPACE": folder, "RUN_NAME": f"{way}_{number}", **settings[way]}
                steps[way].append(step_seconds(command, env, Workspace(Path(folder))))
        connections = len(server.connections)
    assert connections, "nobody spoke to the server that hangs"
    report(arguments.json, {way: runs[1:] for way, runs in steps.items()}, connections)


def step_seconds(command: list[str], env: dict[str, str], workspace: Workspace) -> list[float]:
    """Of each step of a run, the first one left out, as TensorBoard reads them."""
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run ended with exit code {done.returncode}:\n{done.stdout}")
    run = workspace.run_dir(env["RUN_NAME"])
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return [point.value for point in events.Scalars(STEP_TIME)][1:]


def report(path: Path, steps: dict[str, list[list[float]]], connections: int) -> None:
    """Each run beside the one of its round without Weights & Biases."""
    rows: list[dict[str, Any]] = []
    for way, runs in steps.items():
        pairs = list(zip(runs, steps["disabled"], strict=True))
        rows.append(
            {
                "way": way,
                "step": Times.of([median(run) for run in runs]),
                "ratio": Times.of([median(run) / median(other) for run, other in pairs]),
                "all": Times.of([sum(run) for run in runs]),
                "all_ratio": Times.of([sum(run) / sum(other) for run, other in pairs]),
                "slowest": max(map(max, runs)),
            }
        )
    heads = ("Weights & Biases", "step, ms", "ratio", "all steps, s", "ratio", "slowest step, ms")
    lines = [
        [
            row["way"],
            row["step"].cell(),
            row["ratio"].cell(1, 3),
            row["all"].cell(1, 2),
            row["all_ratio"].cell(1, 3),
            f"{row['slowest'] * 1e3:.0f}",
        ]
        for row in rows
    ]
    print(table(heads, lines))
    print(f"connections that were never answered: {connections}")
    save({"rows": rows, "connections": connections}, path)


if __name__ == "__main__":
    main()
