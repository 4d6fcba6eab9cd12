"""Seconds of the projector and of an optimizer step for each stage of a config, on noise in place of patients."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from app.config import Config, StageConfig
from app.config_file import load_config
from app.env import Environment
from app.physics.geometry import geometry_from_config
from app.physics.projector import Projector
from app.train.handover import new_state
from app.train.precision import Precision, choose_device, choose_precision
from app.train.samples import Batch
from app.train.stage import train_step
from app.train.state import StageState

COLUMNS = ("stage", "project ms", "and back ms", "parameters M", "step s", "samples/s", "GiB")


def main() -> None:
    """Prints one line per stage."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides, Environment.read())
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    device = choose_device(config.compute)
    precision = choose_precision(config.compute, device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{config.compute.threads} CPU threads"
    print(f"{arguments.config}, torch {torch.__version__}, {precision} on {machine}")
    print(*(f"{name:>12}" for name in COLUMNS))
    for stage in config.stages:
        if not arguments.stages or stage.name in arguments.stages:
            print(row(config, stage, device, precision, arguments.repeats), flush=True)


def row(config: Config, stage: StageConfig, device: torch.device, precision: str, repeats: int) -> str:
    """One line of the table; the memory is the peak of this stage's steps on the GPU."""
    edge = stage.resolution
    projector = Projector(geometry_from_config(config), edge).to(device)
    mu = (torch.rand(1, 1, edge, edge, edge, device=device) * 0.02).requires_grad_()
    with torch.no_grad():
        forward = seconds(lambda: projector(mu), device, repeats)
    both = seconds(lambda: projector(mu).square().sum().backward(), device, repeats)
    state, batches = training(config, stage, device, precision)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = seconds(lambda: train_step(state, batches, config.physics.weight, lambda: False), device, repeats)
    parameters = sum(tensor.numel() for tensor in state.model.parameters()) / 1e6
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    values = (forward * 1e3, both * 1e3, parameters, step, stage.batch / step, gib)
    return " ".join((f"{stage.name:>12}", *(f"{value:>12.3f}" for value in values)))


def training(
    config: Config, stage: StageConfig, device: torch.device, precision: str
) -> tuple[StageState, Iterator[Batch]]:
    """The state of a fresh stage, and the same batch of noise for ever."""
    edge, count = stage.resolution, stage.micro_batch or stage.batch
    before = [other.resolution for other in config.stages if other.resolution < edge]
    batch = Batch(
        x_0=torch.rand(count, 1, edge, edge, edge, device=device) * 2 - 1,
        xrays=torch.rand(count, 2, edge, edge, device=device) * 8,
        lowres=torch.rand(count, 1, *[before[-1]] * 3, device=device) * 2 - 1 if before else None,
    )
    state = new_state(config, stage, device, Precision(precision, device), fingerprint="bench", parent=None)
    return state, itertools.repeat(batch)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median duration of `work` after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
