"""Seconds, memory and PSNR3D of a sampled volume against the number of sampler steps.

First the full-size stages of `--config`, whose time does not depend on their weights: seconds and growth of memory for
each number of steps, one volume. Then the demo, trained here for `--train-steps` optimizer steps a stage and sampled on
phantoms that it never saw: PSNR (range 2500 HU) by steps, and the smallest number within 0.1 dB of the best.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.config import Config, StageConfig
from app.config_file import load_config
from app.env import Environment
from app.model.denoiser import StageModel
from app.train.precision import Precision, choose_device, choose_precision
from app.train.reconstruct import reconstruct
from tests.bench.experiment import Experiment, prepared, with_steps
from tests.bench.measure import growth_bytes, in_turn, machine, parser, save, table

CLOSE_DB = 0.1
HELD_OUT = 8


def main() -> None:
    """Prints two tables, writes JSON."""
    made = parser("sample", __doc__, 3)
    made.add_argument("--config", default="configs/runpod.yaml", metavar="FILE", help="full size (configs/runpod.yaml)")
    made.add_argument("--stages", nargs="+", default=[], metavar="STAGE")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="of the sampler (1 2 4 8)")
    made.add_argument("--train-steps", type=int, default=200, help="optimizer steps of the demo's stages (200)")
    made.add_argument("--patience", type=float, default=90.0, metavar="S", help="for each number of steps (90)")
    arguments = made.parse_args()
    device = f"compute.device={'cuda' if torch.cuda.is_available() else 'cpu'}"
    config = load_config(arguments.config, [device], Environment.read({}))
    torch.set_flush_denormal(True)
    print(f"{arguments.config}, {machine()}", flush=True)
    rows = []
    for stage in config.stages:
        if not arguments.stages or stage.name in arguments.stages:
            rows += timed(config, stage, arguments.steps, arguments.repeats, arguments.patience)
    columns = ("", "sampler steps", "seconds per volume", "memory GiB", "of it weights")
    lines = [
        [
            row["stage"],
            str(row["steps"]),
            row["seconds"].cell(1, 2),
            gib(row["grown"] + row["weights"]),
            gib(row["weights"]),
        ]
        for row in rows
    ]
    print(table(columns, lines), flush=True)
    save({"rows": rows}, arguments.json)
    if arguments.train_steps:
        quality = worth(load_config("configs/demo.yaml", [device], Environment.read({})), arguments.train_steps)
        print(f"\nthe demo after {arguments.train_steps} steps a stage, dB by sampler steps")
        counts = [str(steps) for steps in quality[0]["psnr_db"]]
        lines = [
            [
                row["stage"],
                *(f"{value:.2f}" for value in row["psnr_db"].values()),
                f"{row['c']:.2f}",
                str(row["enough"]),
            ]
            for row in quality
        ]
        print(table(("", *counts, "c", f"within {CLOSE_DB} dB of the best"), lines))
        save({"rows": rows, "quality": quality}, arguments.json)


def timed(
    config: Config, stage: StageConfig, counts: Sequence[int], repeats: int, patience_s: float
) -> list[dict[str, Any]]:
    """A row per number of steps."""
    device = choose_device(config.compute)
    precision = Precision(choose_precision(config.compute, device), device)
    model = StageModel(config, stage).to(device).eval().requires_grad_(False)
    edge, before = stage.resolution, config.stages[: config.stages.index(stage)]
    xrays = torch.rand(1, 2, edge, edge, device=device) * 4
    noise = torch.randn(1, 1, edge, edge, edge, device=device)
    lowres = torch.zeros(1, 1, *[before[-1].resolution] * 3, device=device) if before else None

    def volume(steps: int) -> None:
        with precision.autocast():
            reconstruct(model, xrays, lowres, noise, lambda: False, steps=steps)

    seconds = in_turn({str(steps): lambda steps=steps: volume(steps) for steps in counts}, repeats, patience_s)
    grown = growth_bytes(lambda: volume(1))
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return [
        {"stage": stage.name, "steps": steps, "seconds": seconds[str(steps)], "grown": grown, "weights": weights}
        for steps in counts
    ]


def worth(config: Config, steps: int) -> list[dict[str, Any]]:
    """A row per stage of a cascade that is trained here."""
    torch.set_num_threads(config.compute.threads)
    config = with_steps(config, {stage.name: steps for stage in config.stages})
    with tempfile.TemporaryDirectory(prefix="bench-sample-") as folder:
        patients, _ = prepared(config, Path(folder))
        test, train = patients.cases[:HELD_OUT], patients.cases[HELD_OUT:]
        found = Experiment(config, patients, train, test, Path(folder), curves=True).run()
    rows = []
    for figures in found:
        best = max(figures.by_steps.values())
        enough = min(count for count, value in figures.by_steps.items() if value >= best - CLOSE_DB)
        given = figures.values("c", "psnr_db")
        rows.append(
            {
                "stage": figures.stage,
                "psnr_db": figures.by_steps,
                "c": sum(given) / len(given),
                "enough": enough,
            }
        )
    return rows


def gib(count: int) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


if __name__ == "__main__":
    main()
