"""`python -m tests.faulty FAULT[:N] COMMAND ...`: the application with one thing going wrong, at its N-th chance.

FAULT is the name of a function below. The application itself has no switches for this: its own functions are wrapped.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import app.__main__
import app.cascade
import app.data.prepare
import app.ops.wandb_log
import app.train.checkpoint
import app.train.handover
import app.train.pace
import app.train.saver
import app.train.stage
import app.train.step
from app.train.checkpoint import CheckpointFolder, _HashingFile
from app.train.manifest import Line, Manifest

LINGER_S = 0.4
NATIVE_ROUNDS = 10**9
"""Minutes, which no signal cuts short."""


def kill() -> None:
    """As a machine that is gone: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def announce() -> None:
    """Say that the place is reached, and stay in it for a moment."""
    Path(os.environ["REACHED"]).touch()
    time.sleep(LINGER_S)


class Nth:
    """Calls `fault` when it is called for the n-th time."""

    def __init__(self, fault: Callable[[], None], n: int) -> None:
        self.fault, self.left = fault, n

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.fault()


def before(owner: Any, name: str, fault: Callable[..., None]) -> None:
    """`fault` gets the arguments, then the function runs."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        fault(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, fault: Callable[..., None]) -> None:
    """The function runs, then `fault` gets its arguments."""
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        fault(*arguments, **options)
        return result

    setattr(owner, name, wrapped)


def is_checkpoint(descriptor: int) -> bool:
    """Whether an open file is the temporary file of a checkpoint."""
    return ".pt." in str(Path(f"/proc/self/fd/{descriptor}").readlink())


def kill_before_write(nth: Nth) -> None:
    """The temporary file does not exist yet."""
    before(CheckpointFolder, "_commit", lambda *_: nth())


def kill_mid_write(nth: Nth) -> None:
    """Half of the bytes are in the temporary file."""

    def fault(self: _HashingFile, data: bytes) -> None:
        nth.left -= len(data) > 1000
        if nth.left == 0:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            kill()

    before(_HashingFile, "write", fault)


def kill_after_fsync(nth: Nth) -> None:
    """The temporary file is whole and durable, and no line knows it."""
    after(os, "fsync", lambda descriptor: nth() if is_checkpoint(descriptor) else None)


def kill_before_the_line(nth: Nth) -> None:
    """Before the pending line."""
    before(Manifest, "append", lambda self, line: nth() if line["state"] == "pending" else None)


def kill_in_the_line(nth: Nth) -> None:
    """A pending line is torn in the middle."""

    def fault(self: Manifest, line: Line) -> None:
        nth.left -= 1
        if nth.left == 0:
            with self.path.open("a") as file:
                file.write('{"file": "stage_8_la')
            kill()

    before(Manifest, "append", fault)


def kill_after_the_line(nth: Nth) -> None:
    """After the pending line, before the file has its name."""
    after(Manifest, "append", lambda self, line: nth() if line["state"] == "pending" else None)


def kill_after_the_rotation(nth: Nth) -> None:
    """`_last.pt` has become `_last_previous.pt`, and there is no `_last.pt`."""
    after(Path, "replace", lambda self, target: nth() if target.name.endswith("_last_previous.pt") else None)


def kill_after_the_rename(nth: Nth) -> None:
    """The file has its name, the folder is not synced, the committed line is missing."""
    after(Path, "replace", lambda self, target: nth() if target.name.endswith("_last.pt") else None)


def kill_before_the_committed_line(nth: Nth) -> None:
    """The folder is synced too."""
    before(Manifest, "append", lambda self, line: nth() if line["state"] == "committed" else None)


def kill_after_the_committed_line(nth: Nth) -> None:
    """The save is complete; other files of the same state may be missing."""
    after(Manifest, "append", lambda self, line: nth() if line["state"] == "committed" else None)


def kill_in_retention(nth: Nth) -> None:
    """An old periodic file is gone, the folder is not synced."""
    after(Path, "unlink", lambda self, **_: nth() if "_epoch_" in self.name and self.suffix == ".pt" else None)


def in_step(nth: Nth) -> None:
    """An optimizer step is under way."""
    before(app.train.step, "_losses", lambda *_: nth())


def in_validation(nth: Nth) -> None:
    """The held-out losses are being computed."""
    before(app.train.stage, "validate", lambda *_: nth())


def in_save(nth: Nth) -> None:
    """A checkpoint is being written."""
    before(torch, "save", lambda *_: nth())


def in_preparation(nth: Nth) -> None:
    """A patient is being prepared."""
    before(app.data.prepare, "_add_phantom", lambda *_: nth())


def in_hand_over(nth: Nth) -> None:
    """The next stage's input is being sampled."""
    before(app.train.handover, "hand_over", lambda *_: nth())


def in_native_call(nth: Nth) -> None:
    """A library call that does not come back for minutes, in the main thread."""

    def fault(*_: Any) -> None:
        nth.left -= 1
        if nth.left == 0:
            Path(os.environ["REACHED"]).touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", NATIVE_ROUNDS)

    before(app.train.step, "_losses", fault)


def on_a_slow_volume(nth: Nth) -> None:
    """In a step, on a volume on which a save takes longer than a pod has."""
    app.train.pace.Pace.write_s = property(lambda self: 60.0)  # type: ignore[assignment]
    in_step(nth)


def out_of_memory(nth: Nth) -> None:
    """A GPU without room for a step: torch's own error."""

    def fault() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    nth.fault = fault
    before(app.train.step, "_losses", lambda *_: nth())


def crash_in_the_second_process(nth: Nth) -> None:
    """An error that nobody foresaw, in one of several processes."""

    def fault() -> None:
        if os.environ["RANK"] == "1":
            raise RuntimeError("armed by a test")

    nth.fault = fault
    before(app.train.step, "_losses", lambda *_: nth())


def hurried_at_the_end(nth: Nth) -> None:
    """A finished run waits for Weights & Biases for seconds in place of a minute."""
    app.ops.wandb_log.AT_END_S = 2.0


def main() -> int:
    """Arm the fault and run the application."""
    name, _, count = sys.argv[1].partition(":")
    fault = kill if name.startswith("kill") else announce
    globals()[name](Nth(fault, int(count or 1)))
    code = app.__main__.main(sys.argv[2:])
    if code == 143:
        app.__main__._leave_stopped()
    return code


if __name__ == "__main__":
    sys.exit(main())
