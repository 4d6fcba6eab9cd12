"""Memory of a training step of each stage: predicted by `app.train.memory`, and measured by taking the step.

Every measurement is a process of its own. `allocated` is the most that torch's allocator had given out at once, which
is what is predicted: on a GPU by its own count, on a CPU by the profiler's. Beside it what the process grew by on a
CPU, workspaces of its kernels included, or what the allocator reserved of a GPU. On a CPU in fp32 with one sample
(`--micro-batch`), on a GPU in the config's precision and micro-batch. `checkpointed`: activations are computed again in
the backward pass. GiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from app.config import Config, StageConfig
from app.config_file import load_config
from app.env import Environment
from app.train.memory import step_memory
from app.train.precision import choose_algorithms, choose_device, choose_precision
from app.train.step import train_step
from tests.bench.measure import machine, parser, reset_peak, resident_bytes, save, table
from tests.bench.steps import training

GIB = 2**30


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("memory", __doc__, None)
    made.add_argument("--config", default="configs/runpod.yaml", metavar="FILE")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    made.add_argument("--stages", nargs="+", default=[], metavar="STAGE")
    made.add_argument("--micro-batch", type=int, default=None, help="on a CPU 1, on a GPU the config's")
    made.add_argument("--predict-only", action="store_true", help="take no step")
    made.add_argument("--measure", nargs=2, metavar=("STAGE", "CHECKPOINTED"), help=argparse.SUPPRESS)
    arguments = made.parse_args()
    cuda = torch.cuda.is_available()
    overrides = [f"compute.device={'cuda' if cuda else 'cpu'}", *arguments.overrides]
    config = load_config(arguments.config, overrides, Environment.read())
    count = arguments.micro_batch or (None if cuda else 1)
    if arguments.measure:
        stage, checkpointed = arguments.measure
        print(json.dumps(measured(with_settings(config, checkpointed == "True", count), stage)))
        return
    precision = choose_precision(config.compute, choose_device(config.compute))
    print(f"{arguments.config}, {precision}, {machine()}", flush=True)
    rows = []
    for name in arguments.stages or [stage.name for stage in config.stages]:
        for checkpointed in (False, True):
            row = predicted(with_settings(config, checkpointed, count), name, precision)
            if not arguments.predict_only:
                row |= in_a_process(name, checkpointed)
            rows.append({"checkpointed": checkpointed, **row})
    print(table(COLUMNS, [cells(row) for row in rows]))
    save({"config": arguments.config, "precision": precision, "rows": rows}, arguments.json)


COLUMNS = (
    *("", "checkpointed", "micro-batch", "weights", "AdamW", "step", "predicted"),
    *("allocated", "ratio", "resident or reserved", "ratio"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """A line."""
    measured = [row[name] for name in ("allocated", "held") if name in row]
    numbers = [row["weights"], row["optimizer"], row["activations"], row["predicted"]]
    return [
        row["stage"],
        "yes" if row["checkpointed"] else "no",
        str(row["micro_batch"]),
        *(f"{value / GIB:.2f}" for value in numbers),
        *(cell for peak in measured for cell in (f"{peak / GIB:.2f}", f"{row['predicted'] / peak:.2f}")),
        *[""] * (4 - 2 * len(measured)),
    ]


def with_settings(config: Config, checkpointed: bool, micro_batch: int | None) -> Config:
    """With the activations of every stage checkpointed or not, and another micro-batch."""
    stages = tuple(
        stage.model_copy(
            update={
                "backbone": stage.backbone.model_copy(update={"checkpoint_activations": checkpointed}),
                "micro_batch": micro_batch or stage.micro_batch,
            }
        )
        for stage in config.stages
    )
    return config.model_copy(update={"stages": stages})


def predicted(config: Config, name: str, precision: str) -> dict[str, Any]:
    """Without taking the step."""
    stage = config.stage(name)
    found = step_memory(config, stage, precision)
    return {
        "stage": name,
        "micro_batch": stage.micro_batch or stage.batch,
        "weights": found.weights,
        "optimizer": found.optimizer,
        "activations": found.activations,
        "predicted": found.peak,
    }


def in_a_process(name: str, checkpointed: bool) -> dict[str, Any]:
    """By taking it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, str(checkpointed)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise SystemExit(f"{name} could not take a step:\n{found.stderr}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def measured(config: Config, name: str) -> dict[str, int]:
    """Peak bytes of the second step, `allocated` and `held`; the first one makes the optimizer's moments."""
    device = choose_device(config.compute)
    choose_algorithms(config.compute, device)
    precision = choose_precision(config.compute, device)
    torch.set_flush_denormal(True)
    # Lazy imports and compiled kernels of the libraries take a third of a GiB at the first step of a process.
    tiny = load_config("tests/tiny.yaml", [f"compute.device={device.type}"], Environment.read({}))
    for stage in tiny.stages:
        train_step(*training(tiny, stage, device, precision), tiny.physics.weight, lambda: False)
    # One micro-batch per step: more of them change nothing about the peak.
    stage = config.stage(name)
    stage = stage.model_copy(update={"batch": stage.micro_batch or stage.batch})
    stages = tuple(stage if other.name == name else other for other in config.stages)
    config = config.model_copy(update={"stages": stages})
    before = resident_bytes("VmRSS")
    two_steps(config, stage, device, precision)
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    held = resident_bytes("VmHWM") - before
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        activity = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], profile_memory=True, acc_events=True) as profiler:
            two_steps(config, stage, device, precision)
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return {"allocated": max(totals), "held": held}


def two_steps(config: Config, stage: StageConfig, device: torch.device, precision: str) -> None:
    """From a fresh state; the peaks of memory are those of the second step."""
    state, batches = training(config, stage, device, precision)
    for _ in range(2):
        reset_peak()
        train_step(state, batches, config.physics.weight, lambda: False)


if __name__ == "__main__":
    main()
