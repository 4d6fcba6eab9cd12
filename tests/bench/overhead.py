"""CPU time per step that the loop adds to the bare arithmetic, beside Lightning, Accelerate and the HF Trainer.

Each way trains the same tiny stage on the same volumes in memory, with EMA, gradient clipping and curves in TensorBoard
every ten steps, on one thread, in a process of its own; the ways take turns, round by round. A step's cost is the CPU
time of the whole process, mean of its steps after the warm-up. The bare loop logs nothing. What differs in kind: this
project draws each sample's noise from its own seed, marks and reports every step, and watches over saves; the others
have progress bars, checkpoints and evaluation off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from app.config import Config
from app.config_file import load_config
from app.data.cases import Case, LoadedCase
from app.env import Environment
from app.model.denoiser import Condition, StageModel
from app.model.diffusion import log_snr
from app.ops.panels import validation_panel
from app.ops.status import RunStatus
from app.ops.step_mark import StepMark
from app.ops.telemetry import Telemetry
from app.ops.writers import RunLog, TensorBoardLog
from app.physics.attenuation import hu_to_x
from app.train.checkpoint import CheckpointFolder
from app.train.ema import EMA
from app.train.handover import new_state
from app.train.loss import sample_losses
from app.train.micro_batch import MicroBatches
from app.train.pace import Pace
from app.train.parallel import ALONE
from app.train.precision import Precision
from app.train.samples import StageCases
from app.train.stage import StageRun, train_stage
from app.workspace import RunDir
from tests.bench.measure import Times, machine, parser, save, table
from tests.no_hurry import NoHurry

CONFIG = Path("tests/tiny.yaml")
CPU = torch.device("cpu")
CASES = 16
LOG_EVERY = 10
WARM_UP = 200
Tick = Callable[[], None]


class TinyModel(StageModel):
    """One convolution on c and x_t, so that what surrounds it is most of a step; the network is there and idle."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.stages[0])
        self.requires_grad_(False)
        self.layer = nn.Conv3d(2, 1, 3, padding=1)

    def condition(self, xrays: Tensor, views: Tensor, *_: Any, **__: Any) -> Condition:
        """c is the mean volume."""
        nothing = xrays.new_zeros(len(xrays), 0)
        return Condition(self.mean.expand(len(xrays), -1, -1, -1, -1), views[:, 0] * 0, nothing, nothing, views)

    def forward(self, x_t: Tensor, log_snr_t: Tensor, condition: Condition) -> Tensor:
        """x_0 = c + F(x_t, c)."""
        residual: Tensor = self.layer(torch.cat([x_t, condition.volume], dim=1))
        return condition.volume + residual


class Memory:
    """Volumes of noise."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        hu = rng.integers(-1000, 1500, (8, 8, 8), dtype=np.int16)
        self.case = LoadedCase(hu, rng.random((2, 8, 8), dtype=np.float32))

    def load(self, _case_id: str, _edge: int) -> LoadedCase:
        """The same for all."""
        return self.case


def cases() -> StageCases:
    """The data of every way."""
    return StageCases(Memory(), [Case(str(i), str(i), str(i)) for i in range(CASES)], 8, None)  # type: ignore[arg-type]


def config_of(steps: int) -> Config:
    """The tiny cascade's first stage as one long epoch, nothing saved in it."""
    overrides = ["stages.stage_8.epochs=1", f"logging.log_every_n_steps={LOG_EVERY}", "checkpoint.save_every_s=3600"]
    config = load_config(CONFIG, overrides, Environment.read({}))
    stage = config.stages[0].model_copy(update={"samples_per_epoch": steps * config.stages[0].batch})
    return config.model_copy(update={"stages": (stage,)})


def losses_of(model: TinyModel, hu: Tensor, xrays: Tensor, config: Config) -> Tensor:
    """The loss of a batch as a plain script computes it, its noise from the global generator."""
    x_0 = hu_to_x(hu.float(), config.data.hu_window)
    snr = log_snr(torch.rand(len(x_0)), 8, config.diffusion)
    condition = model.condition(xrays, torch.ones(len(x_0), 2))
    terms = sample_losses(model, x_0, torch.randn_like(x_0), snr, condition, xrays)
    return terms.diffusion.mean() + config.physics.weight * terms.physics.mean()


def endless(config: Config) -> Iterator[dict[str, Tensor]]:
    """Batches in a random order, for ever."""
    loader = DataLoader(cases(), batch_size=config.stages[0].batch, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=config.stages[0].learning_rate)


def bare(config: Config, steps: int, _folder: Path, tick: Tick) -> None:
    """Nothing but the arithmetic."""
    model = TinyModel(config)
    ema, optimizer = EMA(model), optimizer_of(model, config)
    for batch in itertools.islice(endless(config), steps):
        loss = losses_of(model, batch["hu"], batch["xrays"], config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
        optimizer.step()
        ema.update(0.999)
        tick()


def ours(config: Config, steps: int, folder: Path, tick: Tick) -> None:
    """The product's loop with everything that it writes."""
    run_dir = RunDir(folder)
    run_dir.ensure()
    state = new_state(config, config.stages[0], CPU, Precision("fp32", CPU), "f" * 64, None)
    state.model = TinyModel(config)
    state.ema, state.optimizer = EMA(state.model), optimizer_of(state.model, config)
    telemetry = Telemetry.of_run(config, run_dir, 0)
    run_log, mark = RunLog(TensorBoardLog(run_dir.tensorboard)), StepMark(folder / "steps", 0)

    def marked(step: int, run_seconds: float) -> None:
        mark(step, run_seconds)
        tick()

    train_stage(
        state,
        StageRun(
            train=cases(),
            val=cases(),
            checkpoints=CheckpointFolder(run_dir),
            pace=Pace(500.0),
            run_log=run_log,
            draw=validation_panel,
            status=RunStatus(run_dir),
            telemetry=telemetry,
            stop=lambda: False,
            grace=NoHurry(),
            mark=marked,
            after_epoch=lambda: None,
            first_global_step=0,
            micro_batches=MicroBatches(config, run_dir.micro_batches, CPU, "fp32", ALONE),
        ),
    )
    telemetry.close()
    run_log.close(1.0)


def accelerate(config: Config, steps: int, folder: Path, tick: Tick) -> None:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("run")
    model = TinyModel(config)
    loader = DataLoader(cases(), batch_size=config.stages[0].batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model, config), loader)
    ema, step = EMA(model), 0
    while step < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = losses_of(model, batch["hu"], batch["xrays"], config)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update(0.999)
            step += 1
            if step % LOG_EVERY == 0:
                accelerator.log({"train_loss": loss.item(), "gradient_norm": float(norm)}, step=step)
            tick()
    accelerator.end_training()


def lightning(config: Config, steps: int, folder: Path, tick: Tick) -> None:
    """PyTorch Lightning."""
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyModel(config)
            self.ema = EMA(self.model)

        def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
            loss = losses_of(self.model, batch["hu"], batch["xrays"], config)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model, config)

        def on_train_batch_end(self, *_: Any) -> None:
            self.ema.update(0.999)
            tick()

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=TensorBoardLogger(str(folder)),
        log_every_n_steps=LOG_EVERY,
        gradient_clip_val=config.optimizer.gradient_clip,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(cases(), batch_size=config.stages[0].batch, shuffle=True, drop_last=True))


def hf_trainer(config: Config, steps: int, folder: Path, tick: Tick) -> None:
    """The Trainer of Hugging Face's transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyModel(config)

        def forward(self, hu: Tensor, xrays: Tensor) -> dict[str, Tensor]:
            return {"loss": losses_of(self.model, hu, xrays, config)}

    wrapped = Wrapped()
    ema = EMA(wrapped.model)

    class AfterStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ema.update(0.999)
            tick()

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.stages[0].batch,
        learning_rate=config.stages[0].learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.gradient_clip,
        logging_steps=LOG_EVERY,
        report_to="tensorboard",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
    )
    Trainer(
        model=wrapped,
        args=arguments,
        train_dataset=cases(),
        data_collator=torch.utils.data.default_collate,
        callbacks=[AfterStep()],
    ).train()


WAYS = {
    "bare loop": bare,
    "this project": ours,
    "Accelerate": accelerate,
    "HF Trainer": hf_trainer,
    "Lightning": lightning,
}


def measure(name: str, steps: int) -> float:
    """Seconds of CPU per step of one way, here and now; also checks that it took all its steps."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    times: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        WAYS[name](config_of(steps), steps, Path(folder), lambda: times.append(time.process_time()))
        curves = list(Path(folder).rglob("events.out.tfevents.*"))
    if len(times) < steps or (name != "bare loop" and not curves):
        raise RuntimeError(f"{name}: {len(times)} of {steps} steps, {len(curves)} event files")
    return (times[steps - 1] - times[WARM_UP]) / (steps - 1 - WARM_UP)


def one(name: str, steps: int) -> float:
    """The same in a fresh process."""
    found = subprocess.run(
        [sys.executable, __file__, "--way", name, "--steps", str(steps)], capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        raise SystemExit(f"{name} failed:\n{found.stderr}")
    return float(json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("overhead", __doc__, 5)
    made.add_argument("--steps", type=int, default=2000, help="of each training (2000)")
    made.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.steps)))
        return
    torch.set_num_threads(1)
    print(f"{machine()}; {arguments.steps} steps, {arguments.repeats} rounds", flush=True)
    rounds = [{name: one(name, arguments.steps) for name in WAYS} for _ in range(arguments.repeats)]
    rows = {}
    for name in WAYS:
        added = Times.of([each[name] - each["bare loop"] for each in rounds])
        whole = statistics.median(each[name] for each in rounds)
        rows[name] = {"step": whole, "added": added}
    print(
        table(
            ("", "CPU us per step", "added us: median (low to high)"),
            [[name, f"{row['step'] * 1e6:.0f}", row["added"].cell(1e6, 0)] for name, row in rows.items()],
        )
    )
    save({"steps": arguments.steps, "ways": rows}, arguments.json)


if __name__ == "__main__":
    main()
