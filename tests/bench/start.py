"""Seconds from the start of a process to its first completed step: a fresh run, and one that was killed and resumes.

Real processes of `python -m app train` on prepared cases (warm caches of the disk), killed by SIGKILL. A fresh run also
measures its training cases and validates once before its first step; a resumed one verifies and loads a checkpoint.
`help`: `python -m app --help` and `status`, which may not import torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from app.config_file import load_config
from app.env import Environment
from app.ops.step_mark import marked
from app.train.checkpoint import CheckpointFolder
from app.workspace import Workspace
from tests.bench.measure import Times, in_turn, machine, parser, save, table

DEADLINE_S = 600.0


def main() -> None:
    """Prints a table, writes JSON."""
    made = parser("start", __doc__, 5)
    made.add_argument("--config", default="configs/demo.yaml", metavar="FILE")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = made.parse_args()
    overrides = ["checkpoint.save_every_s=0.5", "checkpoint.max_overhead=0.5", *arguments.overrides]
    config = load_config(arguments.config, overrides, Environment.read({}))
    command = [sys.executable, "-m", "app", "train", "--config", arguments.config]
    command += [part for override in overrides for part in ("--set", override)]
    print(f"{arguments.config}, {machine()}", flush=True)
    found: dict[str, list[float]] = {"fresh": [], "resumed": []}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        environment = {**os.environ, "WORKSPACE": folder}
        workspace = Workspace(Path(folder))
        subprocess.run([*command[:3], "prepare", *command[4:]], env=environment, check=True, capture_output=True)
        for number in range(arguments.repeats + 1):
            run = workspace.run_dir(f"run_{number}")
            env = {**environment, "RUN_NAME": f"run_{number}"}
            checkpoints = CheckpointFolder(run)

            def saved(checkpoints: CheckpointFolder = checkpoints) -> bool:
                return any(entry.counters.step > 0 for entry in checkpoints.entries(config.stages[0].name))

            first = partial(stepped_past, run.step_mark, 0)
            found["fresh"].append(seconds_to(first, command, env, then=saved))
            at = max(entry.counters.step for entry in checkpoints.entries(config.stages[0].name))
            run.step_mark.unlink()
            found["resumed"].append(seconds_to(partial(stepped_past, run.step_mark, at), command, env))
        read = in_turn({"verify and load": lambda: checkpoints.newest(config.stages[0].name)}, arguments.repeats)
        imports = in_turn(
            {
                "import of the trainer": lambda: python("-c", "import app.cascade"),
                "import of torch alone": lambda: python("-c", "import torch"),
                "python -m app --help": lambda: python("-m", "app", "--help"),
                "python -m app status": lambda: python(
                    "-m", "app", "status", "--config", arguments.config, env={**environment, "RUN_NAME": "run_0"}
                ),
            },
            arguments.repeats,
        )
    rows = {name: Times.of(seconds[1:]) for name, seconds in found.items()} | read | imports
    print(table(("", "seconds: median (low to high)"), [[name, times.cell(1, 2)] for name, times in rows.items()]))
    print(f"resuming costs {rows['resumed'].median - rows['fresh'].median:+.2f} s over a fresh start")
    save({"config": arguments.config, "rows": rows}, arguments.json)


def seconds_to(
    happened: Callable[[], bool], command: list[str], env: dict[str, str], then: Callable[[], bool] = lambda: True
) -> float:
    """How long a process takes to it; it is killed once `then` holds as well."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait(happened, process, start)
        seconds = time.monotonic() - start
        wait(then, process, start)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return seconds


def wait(happened: Callable[[], bool], process: subprocess.Popen[bytes], start: float) -> None:
    """Poll."""
    while not happened():
        if process.poll() is not None or time.monotonic() - start > DEADLINE_S:
            process.kill()
            output = process.stdout.read().decode() if process.stdout else ""
            raise SystemExit(f"the trainer ended or took more than {DEADLINE_S:g} s:\n{output}")
        time.sleep(0.005)


def stepped_past(mark: Path, step: int) -> bool:
    """Whether a process has completed more steps than that."""
    return (marked(mark) or 0) > step


def python(*arguments: str, env: dict[str, str] | None = None) -> None:
    """A process that must succeed."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=env)


if __name__ == "__main__":
    main()
