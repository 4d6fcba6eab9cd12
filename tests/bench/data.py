"""Whether data keeps up: the share of a step spent waiting for cases, and what is cheaper, to store or to compute.

For each stage of the config, on phantoms in a prepared cache (pages warm): optimizer steps by the product's loop over
its loader, and how much of their time is spent in the loader; then for one sample: reading it, rendering its two DRRs
on the device against reading them, the prior of the first stage on the device against reading a stored one, and the
augmentation with DRRs rendered anew.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.config import AugmentationConfig, Config, StageConfig
from app.config_file import load_config
from app.data.cases import CaseStore
from app.env import Environment
from app.physics.attenuation import x_to_mu
from app.train.augment import augment
from app.train.handover import new_state
from app.train.parallel import ALONE
from app.train.precision import Precision, choose_algorithms, choose_device, choose_precision
from app.train.randomness import epoch_order
from app.train.samples import Batch, LowresFolder, StageCases, batches
from app.train.step import train_step
from app.workspace import Workspace
from tests.bench.experiment import prepared
from tests.bench.measure import in_turn, machine, parser, save, table

MOVED = AugmentationConfig(rotation_deg=10, scale=0.1, translation_mm=20, xray_noise=0.002, xray_gain=0.02)


class Timed:
    """An iterator that adds up how long its reader waits."""

    def __init__(self, items: Iterator[Batch]) -> None:
        self.items, self.waited = items, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        item = next(self.items)
        self.waited += time.perf_counter() - start
        return item


def main() -> None:
    """Prints two tables, writes JSON."""
    made = parser("data", __doc__, 10)
    made.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    made.add_argument("--steps", type=int, default=30, help="optimizer steps of each stage (30)")
    made.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes (0 2)")
    arguments = made.parse_args()
    device = f"compute.device={'cuda' if torch.cuda.is_available() else 'cpu'}"
    overrides = ["data.source=phantoms", device, "data.phantoms.count=16", *arguments.overrides]
    config = load_config(arguments.config, overrides, Environment.read({}))
    choose_algorithms(config.compute, choose_device(config.compute))
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    print(f"{arguments.config}, {machine()}", flush=True)
    waits, costs = [], []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        prepared(config, Path(folder))
        store = CaseStore.open(config, Workspace(Path(folder)))
        for stage in config.stages:
            cases = StageCases(store, store.cases, stage.resolution, stored_lowres(config, stage, store, Path(folder)))
            waits += [waiting(config, stage, cases, workers, arguments.steps) for workers in arguments.workers]
            costs.append(stored_or_computed(config, stage, cases, Path(folder), arguments.repeats))
    lines = [
        [
            row["stage"],
            str(row["workers"]),
            f"{row['step_s'] * 1e3:.1f}",
            f"{row['wait_s'] * 1e3:.2f}",
            f"{row['share']:.2%}",
        ]
        for row in waits
    ]
    print(table(("", "workers", "step ms", "waiting ms", "share"), lines))
    names = list(costs[0]["times"])
    lines = [[row["stage"], *(row["times"][name].cell(1e3, 2) for name in names)] for row in costs]
    print(f"\nms per sample, median (low to high)\n{table(('', *names), lines)}")
    save({"waits": waits, "costs": costs}, arguments.json)


def stored_lowres(config: Config, stage: StageConfig, store: CaseStore, folder: Path) -> LowresFolder | None:
    """Files as a hand-over leaves them, with the truth in place of the previous stage's output."""
    index = config.stages.index(stage)
    if index == 0:
        return None
    lowres = LowresFolder(folder / "lowres" / stage.name)
    lowres.folder.mkdir(parents=True)
    for case in store.cases:
        np.save(lowres.path(case), store.load(case.id, config.stages[index - 1].resolution).hu)
    return lowres


def waiting(config: Config, stage: StageConfig, cases: StageCases, workers: int, steps: int) -> dict[str, Any]:
    """Means over the steps after the first three."""
    device = choose_device(config.compute)
    precision = Precision(choose_precision(config.compute, device), device)
    state = new_state(config, stage, device, precision, "", None)
    warm_up = 3
    order = epoch_order(len(cases), (steps + warm_up) * stage.batch, 0, stage.name, 0)
    loader = Timed(
        batches(
            cases, ALONE.micro_batches(order, stage, ALONE.micro_batch(stage)), device, config.data.hu_window, workers
        )
    )
    start = time.perf_counter()
    for number in range(steps + warm_up):
        if number == warm_up:
            start, loader.waited = time.perf_counter(), 0.0
        train_step(state, loader, config.physics.weight, lambda: False)
        state.progress.step += 1
    step_s, wait_s = (time.perf_counter() - start) / steps, loader.waited / steps
    return {"stage": stage.name, "workers": workers, "step_s": step_s, "wait_s": wait_s, "share": wait_s / step_s}


def stored_or_computed(
    config: Config, stage: StageConfig, cases: StageCases, folder: Path, repeats: int
) -> dict[str, Any]:
    """Milliseconds of one sample."""
    device = choose_device(config.compute)
    state = new_state(config, stage, device, Precision("fp32", device), "", None)
    model, batch = state.model, next(batches(cases, [[0]], device, config.data.hu_window))
    shown = torch.ones(1, 2, device=device)
    stored = folder / f"prior_{stage.name}.npy"
    np.save(stored, batch.x_0.cpu().numpy().astype(np.float16))
    xrays = folder / f"xrays_{stage.name}.npy"
    np.save(xrays, batch.xrays.cpu().numpy())
    moved = config.model_copy(update={"augmentation": MOVED})
    mean = model.mean.expand(1, -1, -1, -1, -1)
    with torch.no_grad():
        times = in_turn(
            {
                "read a sample": lambda: cases[0],
                "read DRRs": lambda: torch.from_numpy(np.load(xrays)).to(device),
                "render DRRs": lambda: model.projector(x_to_mu(batch.x_0, model.hu_window)),
                "read a prior": lambda: torch.from_numpy(np.load(stored)).to(device).float(),
                "make the prior": lambda: model.data_consistent(mean, batch.xrays, shown, stage.prior_sweeps),
                "augment": lambda: augment(batch, model, moved, [(0, stage.name, 1, 0)]),
            },
            repeats,
        )
    return {"stage": stage.name, "times": times}


if __name__ == "__main__":
    main()
