"""Seconds of an optimizer step for each stage of a config, beside the bare arithmetic of the same modules.

`bare`: condition, forward, both losses, backward, clipping, AdamW and EMA of one micro-batch, its noise drawn
beforehand, in a plain loop; `step`: the product's `train_step` on the same batch of noise, gradients not accumulated.
Also both views of the projector, forward and with its backward pass; on a GPU the allocator's peak.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from app.config import Config, StageConfig
from app.config_file import load_config
from app.env import Environment
from app.model.diffusion import log_snr
from app.physics.geometry import geometry_from_config
from app.physics.projector import Projector
from app.train.handover import new_state
from app.train.loss import sample_losses
from app.train.precision import Precision, choose_algorithms, choose_device, choose_precision
from app.train.randomness import step_draws, volume_noise
from app.train.samples import Batch
from app.train.state import StageState
from app.train.step import train_step
from tests.bench.measure import in_turn, machine, parser, save, table

COLUMNS = ("", "project ms", "and back ms", "parameters M", "step ms", "bare ms", "ratio", "samples/s", "GiB")


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("steps", __doc__, 20)
    made.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    made.add_argument("--stages", nargs="+", default=[], metavar="STAGE")
    arguments = made.parse_args()
    config = load_config(arguments.config, arguments.overrides, Environment.read())
    torch.set_num_threads(config.compute.threads)
    torch.set_flush_denormal(True)
    device = choose_device(config.compute)
    choose_algorithms(config.compute, device)
    precision = choose_precision(config.compute, device)
    print(f"{arguments.config}, {precision}, {machine()}", flush=True)
    chosen = [stage for stage in config.stages if not arguments.stages or stage.name in arguments.stages]
    rows = [row(config, stage, device, precision, arguments.repeats) for stage in chosen]
    print(table(COLUMNS, [cells(found) for found in rows]))
    save({"config": arguments.config, "precision": precision, "rows": rows}, arguments.json)


def cells(found: dict[str, Any]) -> list[str]:
    """A line."""
    return [
        found["stage"],
        found["project"].cell(1e3, 2),
        found["and back"].cell(1e3, 2),
        f"{found['parameters'] / 1e6:.2f}",
        found["step"].cell(),
        found["bare"].cell(),
        f"{found['ratio']:.3f}",
        f"{found['samples_per_s']:.2f}",
        f"{found['peak'] / 2**30:.2f}" if found["peak"] else "",
    ]


def row(config: Config, stage: StageConfig, device: torch.device, precision: str, repeats: int) -> dict[str, Any]:
    """The figures of a stage."""
    # A whole batch at a time, so that a step and the bare loop do the same.
    stage = stage.model_copy(update={"batch": stage.micro_batch or stage.batch})
    edge = stage.resolution
    projector = Projector(geometry_from_config(config), edge).to(device)
    mu = (torch.rand(1, 1, edge, edge, edge, device=device) * 0.02).requires_grad_()
    projections = in_turn(
        {"project": lambda: projector(mu.detach()), "and back": lambda: projector(mu).square().sum().backward()},
        repeats,
    )
    state, batches = training(config, stage, device, precision)
    alone = bare(*training(config, stage, device, precision))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = in_turn(
        {
            "step": lambda: train_step(state, batches, config.physics.weight, lambda: False),
            "bare": alone,
        },
        repeats,
    )
    return {
        "stage": stage.name,
        **projections,
        **times,
        "parameters": sum(tensor.numel() for tensor in state.model.parameters()),
        "ratio": times["step"].median / times["bare"].median,
        "samples_per_s": stage.batch / times["step"].median,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def bare(state: StageState, batches: Iterator[Batch]) -> Callable[[], None]:
    """A step of a plain loop over the same modules."""
    config, stage, model, batch = state.config, state.stage, state.model, next(batches)
    count, device = len(batch.x_0), batch.x_0.device
    names = [(config.seed, stage.name, 1, index) for index in range(count)]
    noise = torch.stack([volume_noise(batch.x_0.shape[1:], device, *name, "noise") for name in names])
    draws = step_draws(count, config.diffusion, device, config.seed, stage.name, 1)
    snr, views = log_snr(draws.t, stage.resolution, config.diffusion), draws.views
    level = lowres_noise = None
    if batch.lowres is not None:
        level, lowres_noise = draws.noise_level, torch.randn_like(batch.lowres)

    def step() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        with state.precision.autocast():
            condition = model.condition(batch.xrays, views, batch.lowres, level, lowres_noise)
            losses = sample_losses(model, batch.x_0, noise, snr, condition, batch.xrays)
        (losses.diffusion.mean() + config.physics.weight * losses.physics.mean()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        state.optimizer.step()
        state.ema.update(stage.ema_decay)

    return step


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


if __name__ == "__main__":
    main()
