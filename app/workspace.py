"""Every path below the workspace and every file name in it, and the one way to write a file that must not be torn."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.errors import MachineError

PROJECT = "hybrid_vit_cascade"
CHECKPOINT_NAME = re.compile(r"(?P<stage>stage_\d+)_(?P<kind>best|last_previous|last|final|epoch_\d+)\.pt")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def epoch_kind(epochs: int) -> str:
    """The checkpoint kind `epoch_{N}` after N completed epochs."""
    return f"epoch_{epochs}"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run: `checkpoints/` itself or `checkpoints/<run_name>/`."""

    path: Path

    def checkpoint(self, stage_name: str, kind: str) -> Path:
        """`{stage}_{kind}.pt`; kinds: best, last, last_previous, final, `epoch_kind(N)`."""
        path = self.path / f"{stage_name}_{kind}.pt"
        if not CHECKPOINT_NAME.fullmatch(path.name):
            raise ValueError(f"not the name of a checkpoint: {path.name}")
        return path

    def checkpoints(self) -> list[tuple[str, str, Path]]:
        """(stage name, kind, path) of each checkpoint file in this run, sorted by name."""
        matches = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in sorted(self.path.glob("stage_*.pt")))
        return [(match["stage"], match["kind"], path) for match, path in matches if match]

    @property
    def config(self) -> Path:
        """The resolved config, rewritten at each start."""
        return self.path / "config.yaml"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Files of Weights & Biases."""
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """The run's id at Weights & Biases, the same for all attempts."""
        return self.wandb / "wandb_id"

    @property
    def wandb_links(self) -> Path:
        """Links to checkpoints that are being sent to Weights & Biases, or that an offline run names."""
        return self.wandb / "links"

    @property
    def wandb_sent(self) -> Path:
        """The sha256 of each checkpoint that Weights & Biases has, a line each."""
        return self.wandb / "sent"

    @property
    def split(self) -> Path:
        """The frozen split into training and validation."""
        return self.path / "split.json"

    @property
    def manifest(self) -> Path:
        """One line with a sha256 for each published checkpoint."""
        return self.path / "manifest.jsonl"

    @property
    def run_lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / "run.lock"

    @property
    def status(self) -> Path:
        """What the run is doing, for people and probes."""
        return self.path / "status.json"

    @property
    def progress_png(self) -> Path:
        """Curves of all stages and the latest slices."""
        return self.path / "progress.png"

    def evaluation(self, patients: str) -> Path:
        """Figures and pictures of `python -m app evaluate`, an event file among them."""
        return self.path / "evaluation" / patients

    @property
    def quarantine(self) -> Path:
        """Damaged files that were set aside."""
        return self.path / "quarantine"

    @property
    def done(self) -> Path:
        """Exists when the whole cascade is finished."""
        return self.path / "DONE"

    @property
    def reason(self) -> Path:
        """Why the run ended other than by finishing, and what to do."""
        return self.path / "REASON"

    @property
    def refusal(self) -> Path:
        """What the refusal in REASON was about, for the next start to see whether it still stands."""
        return self.path / "REASON.json"

    @property
    def attempts(self) -> Path:
        """Starts and ends of the trainer, a line each."""
        return self.path / "attempts.jsonl"

    @property
    def ledger(self) -> Path:
        """What each attempt at the run cost, a line for its start, its first step and its end."""
        return self.path / "ledger.jsonl"

    @property
    def micro_batches(self) -> Path:
        """How many samples of a forward pass fit into the device, where the config's did not."""
        return self.path / "micro_batches.json"

    @property
    def rehearsed(self) -> Path:
        """Which stages were rehearsed, on what."""
        return self.path / "rehearsed.json"

    @property
    def rehearsal(self) -> Path:
        """Takes checkpoints that are written, read back and deleted before the first step."""
        return self.path / "rehearsal"

    @property
    def step_mark(self) -> Path:
        """How many optimizer steps were completed, saved or not."""
        return self.path / "steps"

    def ensure(self) -> None:
        """Creates the folder, or raises MachineError."""
        _ensure_folder(self.path)


@dataclass(frozen=True)
class Workspace:
    """The folder that outlives the machine."""

    root: Path

    @property
    def data(self) -> Path:
        """The user's own CTs; never written."""
        return self.root / "data"

    @property
    def cache(self) -> Path:
        """Prepared volumes; safe to delete."""
        return self.root / "cache"

    @property
    def checkpoints(self) -> Path:
        """All runs; the log folder of TensorBoard."""
        return self.root / PROJECT / "checkpoints"

    @property
    def logs(self) -> Path:
        """Log files of the programs."""
        return self.root / PROJECT / "logs"

    @property
    def pseudonym_key(self) -> Path:
        """Key of the patients' pseudonyms, mode 600."""
        return self.root / PROJECT / "pseudonym.key"

    def run_dir(self, run_name: str | None) -> RunDir:
        """The folder of the run with this name; None is the run without one."""
        return RunDir(self.checkpoints if run_name is None else self.checkpoints / run_name)

    def ensure(self) -> None:
        """Creates the folders and proves that they can be written, or raises MachineError."""
        for folder in (self.data, self.cache, self.checkpoints, self.logs):
            _ensure_folder(folder)


def _ensure_folder(folder: Path) -> None:
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"cannot write in {folder}: {error.strerror}. Mount a writable volume there, or set WORKSPACE to a folder "
            f"that this user (uid {os.getuid()}) may write"
        ) from error


@contextmanager
def atomic_file(path: Path, mode: int = 0o666, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` whole and durable when the block ends, or not at all.

    The temporary file lies in the target's folder, because a rename across file systems is a copy.

    Args:
        path: the target; an existing file is replaced.
        mode: permissions before the umask.
        durable: False where nobody minds an older content after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def atomic_write(path: Path, data: bytes, mode: int = 0o666, durable: bool = True) -> None:
    """Writes `data` to `path`, whole or not at all, and durable unless that is not asked for."""
    with atomic_file(path, mode, durable) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; they commit names on their own.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: Path) -> list[Path]:
    """Deletes what killed writers left in `folder`; only for the process that holds the run lock.

    Returns:
        The files that were there.
    """
    found = [path for path in sorted(folder.iterdir()) if TEMPORARY.fullmatch(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return found
