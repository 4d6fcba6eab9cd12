"""How long training waits for a save of a large state: ours beside three others, in one run.

Each way saves the same state in turn, so that all meet the same disk; the blocked time is what the training thread
loses before it may change the state. Between two saves a product of matrices stands in for training steps.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from app.config import CheckpointConfig
from app.train.checkpoint import CheckpointFolder, Counters, file_sha256
from app.train.pace import Pace
from app.train.saver import Saver
from app.workspace import RunDir, atomic_file
from tests.bench.measure import Times, in_turn, machine, parser, save, table
from tests.no_hurry import NoHurry

TENSORS = 120


class Ours:
    """The saver of the application, on a state that is no model."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.run_dir, self.step = RunDir(folder), 0
        folder.mkdir()
        config = CheckpointConfig(min_free_gib=0.0)
        checkpoints = CheckpointFolder(self.run_dir)
        self.saver = Saver(checkpoints, config, Pace(500.0), lambda: None, NoHurry(), lambda **_: None)
        self.payload = state

    def save(self) -> None:
        """Stage."""
        self.step += 1
        state: Any = SimpleNamespace(
            payload=lambda: self.payload,
            stage=SimpleNamespace(name="stage_64"),
            progress=SimpleNamespace(counters=Counters(0, self.step)),
        )
        self.saver.save(state, ["last"])

    def wait(self) -> None:
        """Until it is on the disk."""
        self.saver.drain()


class InPlace:
    """`torch.save` onto the final path: what a plain script does; a kill in it costs the run."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir()
        self.path, self.state = folder / "last.pt", state

    def save(self) -> None:
        """Write."""
        torch.save(self.state, self.path)

    def wait(self) -> None:
        """Nothing is left."""


class Atomic(InPlace):
    """Temporary file, fsync, rename, in the training thread."""

    def save(self) -> None:
        """Write."""
        with atomic_file(self.path) as file:
            torch.save(self.state, file)


class Distributed:
    """`torch.distributed.checkpoint.async_save`, by a thread."""

    by = AsyncCheckpointerType.THREAD

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state, self.count = folder, state, 0
        self.future: Any = None

    def save(self) -> None:
        """Stage."""
        self.count += 1
        target = str(self.folder / str(self.count % 2))
        self.future = dcp.async_save(self.state, checkpoint_id=target, async_checkpointer_type=self.by)

    def wait(self) -> None:
        """Until it is on the disk."""
        self.future.result()


class DistributedProcess(Distributed):
    """The same, by a process."""

    by = AsyncCheckpointerType.PROCESS


WAYS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "this project": Ours,
    "torch.save": InPlace,
    "temp + fsync + rename": Atomic,
    "DCP async_save, thread": Distributed,
    "DCP async_save, process": DistributedProcess,
}


def state_of(mib: int) -> dict[str, Any]:
    """A checkpoint's dict of `mib` MiB in 120 tensors."""
    size = mib * 2**20 // 4 // TENSORS
    weights = {f"layer_{index}.weight": torch.randn(size) for index in range(TENSORS)}
    return {
        "model_state_dict": weights,
        "optimizer_state_dict": {},
        "scaler_state_dict": {"scale": 1.0},
        "epoch": -1,
        "val_loss": math.inf,
        "config": {},
        "resume": {"format": 1, "stage": "stage_64", "step": 0},
    }


def train(seconds: float) -> None:
    """Something that needs both cores, as a step does."""
    matrix = torch.randn(512, 512)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix = (matrix @ matrix).tanh()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Blocked and total seconds of each save, the first of each way left out; then of reading ours."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    dist.init_process_group("gloo", rank=0, world_size=1)
    found: dict[str, dict[str, list[float]]] = {name: {"blocked_s": [], "total_s": []} for name in WAYS}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        state = state_of(arguments.mib)
        ways = {name: way(Path(folder) / str(number), state) for number, (name, way) in enumerate(WAYS.items())}
        for _ in range(arguments.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way.save()
                found[name]["blocked_s"].append(time.perf_counter() - start)
                train(arguments.pause_s)
                way.wait()
                found[name]["total_s"].append(time.perf_counter() - start)
        run_dir = ways["this project"].run_dir
        path = run_dir.checkpoint("stage_64", "last")
        read = in_turn(
            {
                "plain load": lambda: torch.load(path, weights_only=True),
                "verify": lambda: file_sha256(path),
                "verify and load": lambda: CheckpointFolder(run_dir).newest("stage_64"),
            },
            arguments.repeats,
        )
        written = path.stat().st_size
        ways["this project"].saver.close()
    dist.destroy_process_group()
    ways_found = {name: {key: Times.of(times[1:]) for key, times in values.items()} for name, values in found.items()}
    return {"ways": ways_found, "read": read, "bytes": written}


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("checkpoint", __doc__, 9)
    made.add_argument("--mib", type=int, default=500, help="size of the state (500)")
    made.add_argument("--pause-s", type=float, default=1.0, help="training between two saves (1)")
    made.add_argument("--dir", default=None, help="folder on the disk to measure (default: the system's temporary)")
    arguments = made.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    found = measure(arguments)
    print(f"{arguments.mib} MiB, {found['bytes']} bytes in our file, {machine()}")
    ours = found["ways"]["this project"]["blocked_s"].median
    lines = [
        [name, way["blocked_s"].cell(), f"{way['blocked_s'].median / ours:.1f}", way["total_s"].cell(1, 2)]
        for name, way in found["ways"].items()
    ]
    print(table(("", "training waits, ms", "times ours", "on the disk after, s"), lines))
    plain = found["read"]["plain load"].median
    lines = [[name, times.cell(), f"{times.median / plain:.2f}"] for name, times in found["read"].items()]
    print(f"\n{table(('', 'ms', 'times a plain load'), lines)}")
    save(found, arguments.json)


if __name__ == "__main__":
    main()
