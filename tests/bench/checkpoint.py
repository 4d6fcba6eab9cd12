"""How long training waits for a save of a large state: ours beside three others, in one run.

Each way saves the same state in turn, so that all meet the same disk; the blocked time is what the training thread
loses before it may change the state. Between two saves a product of matrices stands in for training steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
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

from app.config import CheckpointConfig
from app.train.checkpoint import CheckpointFolder, Counters, file_sha256
from app.train.pace import Pace
from app.train.saver import Saver
from app.workspace import RunDir, atomic_file

TENSORS = 120


class NoHurry:
    """Nobody asks when the process leaves."""

    def seconds_left(self) -> float:
        """For ever."""
        return math.inf

    def at_the_last_moment(self, work: Any) -> None:
        """Nobody does."""


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

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self.folder, self.state, self.count = folder, state, 0
        self.future: Any = None

    def save(self) -> None:
        """Stage."""
        self.count += 1
        self.future = dcp.async_save(self.state, checkpoint_id=str(self.folder / str(self.count % 2)))

    def wait(self) -> None:
        """Until it is on the disk."""
        self.future.result()


WAYS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "this project": Ours,
    "torch.save": InPlace,
    "temp + fsync + rename": Atomic,
    "DCP async_save": Distributed,
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


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Blocked and total seconds of each save, the first of each way left out."""
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
        verified = time.perf_counter()
        path = ways["this project"].run_dir.checkpoint("stage_64", "last")
        file_sha256(path)
        loaded = time.perf_counter()
        torch.load(path, weights_only=True)
        end = time.perf_counter()
        ways["this project"].saver.close()
    found["this project"]["verify_s"] = [loaded - verified]
    found["this project"]["load_s"] = [end - loaded]
    dist.destroy_process_group()
    return {
        name: {key: times[1:] if len(times) > 1 else times for key, times in values.items()}
        for name, values in found.items()
    }


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(prog="scripts/bench checkpoint", description=__doc__)
    parser.add_argument("--mib", type=int, default=500, help="size of the state (500)")
    parser.add_argument("--repeats", type=int, default=9, help="saves of each way that count (9)")
    parser.add_argument("--pause-s", type=float, default=1.0, help="training between two saves (1)")
    parser.add_argument("--dir", default=None, help="folder on the disk to measure (default: the system's temporary)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{arguments.mib} MiB, {arguments.repeats} saves each, torch {torch.__version__}, {os.cpu_count()} cores,",
        end="",
    )
    print(f" {platform.machine()}")
    ours = statistics.median(found["this project"]["blocked_s"])
    print(f"{'way':24} {'blocked ms: median':>18} {'min':>7} {'max':>7} {'times ours':>11} {'written s':>10}")
    for name, values in found.items():
        blocked = [1000 * value for value in values["blocked_s"]]
        median = statistics.median(blocked)
        total = statistics.median(values["total_s"])
        times = median / 1000 / ours
        print(f"{name:24} {median:18.1f} {min(blocked):7.1f} {max(blocked):7.1f} {times:11.1f} {total:10.2f}")
    mine = found["this project"]
    print(f"this project: verify (sha256) {mine['verify_s'][0]:.2f} s, load {mine['load_s'][0]:.2f} s")


if __name__ == "__main__":
    main()
