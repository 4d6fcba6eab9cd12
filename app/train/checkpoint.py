"""Checkpoint files: written so that a kill at any moment leaves a usable one, found again by content.

A file is committed by: temporary file in the same folder, fsync, a `pending` line with its sha256 in the manifest,
rename, fsync of the folder, a `committed` line. A file counts as whole when its sha256 stands in the manifest, in
either kind of line: a kill between rename and the last line loses nothing. A file that no line knows is checked by
the CRCs of its own records and by loading it, and gets a `found` line.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from app.errors import CheckpointError
from app.train.manifest import Manifest
from app.workspace import RunDir, atomic_file, epoch_kind, sync_folder

log = logging.getLogger(__name__)

RESUME_KEY = "resume"
FORMAT = 1
REQUIRED_KEYS = (
    "model_state_dict",
    "optimizer_state_dict",
    "scaler_state_dict",
    "epoch",
    "val_loss",
    "config",
    RESUME_KEY,
)
COPY_CHUNK = 1 << 22
RESUMABLE_AT_LEAST = 2
"""Different states of a stage that retention leaves, whatever the config asks for."""
UNREADABLE_ZIP = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error, struct.error)
"""What zipfile raises on damage; RuntimeError, or a kind of it, where a flipped bit says that a record is encrypted, or
packed in a way that it does not know."""
UNREADABLE_PAYLOAD = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError)


@dataclass(frozen=True, order=True)
class Counters:
    """How far a state has come in its stage; the larger, the further."""

    epochs: int
    """Completed epochs, validation included."""
    step: int
    """Completed optimizer steps of the stage."""


UNREADABLE = Counters(sys.maxsize, 0)
"""Of a file that cannot be read: it sorts first, is looked at, and is set aside."""


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint file of a run and what is known of it without loading it."""

    path: Path
    stage: str
    kind: str
    counters: Counters
    sha256: str | None
    """From the manifest; None where no line knows the file's name."""


class _HashingFile:
    """A binary file for `torch.save` that hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointFolder:
    """The checkpoints of one run: publish, list, verify, find the furthest, set damaged ones aside."""

    def __init__(self, run_dir: RunDir, fence: Callable[[], None] = lambda: None) -> None:
        """Open the folder of a run; nothing is read yet.

        Args:
            run_dir: the run.
            fence: asked right before a file gets its name or is deleted; raises where the run is no longer ours.
        """
        self.run_dir = run_dir
        self._fence = fence
        self._manifest = Manifest(run_dir.manifest)

    def publish(self, stage: str, kinds: Sequence[str], payload: dict[str, Any], counters: Counters) -> None:
        """Write `payload` once for each kind, every file on blocks of its own.

        Raises:
            OSError: the volume is full or gone; older files are intact.
            LockError: the run is no longer ours; nothing was renamed.
        """
        for kind in kinds:
            self._commit(
                self.run_dir.checkpoint(stage, kind), stage, kind, counters, lambda file: torch.save(payload, file)
            )

    def take_over(self, source: FoundCheckpoint) -> None:
        """Copy a verified checkpoint of another run into this one."""
        target = self.run_dir.checkpoint(source.stage, source.kind)
        self._commit(
            target,
            source.stage,
            source.kind,
            source.counters,
            lambda file: _copy_into(source.path, file),
            source.sha256,
        )

    def _commit(
        self,
        path: Path,
        stage: str,
        kind: str,
        counters: Counters,
        write: Callable[[Any], object],
        expected_sha256: str | None = None,
    ) -> None:
        line: dict[str, object] = {"file": path.name, "stage": stage, "kind": kind, **asdict(counters)}
        with atomic_file(path) as file:
            hashing = _HashingFile(file)
            try:
                write(hashing)
            except RuntimeError as error:
                # torch hides a failed write behind an error of its own.
                if hashing.error is not None:
                    raise hashing.error from error
                raise
            sha256 = hashing.digest.hexdigest()
            if expected_sha256 not in (None, sha256):
                raise OSError(f"{path.name}: the copy differs from its source (sha256 {sha256[:12]})")
            # Before the file of the same name moves away: a disk may find out here that it is full.
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            self._fence()
            self._manifest.append({**line, "sha256": sha256, "bytes": size, "state": "pending"})
            if kind == "last" and path.exists():
                path.replace(self.run_dir.checkpoint(stage, "last_previous"))
        self._manifest.append({**line, "sha256": sha256, "bytes": size, "state": "committed", "time": time.time()})

    def retain(self, stage: str, keep: int | None) -> None:
        """Delete all but the newest `keep` `_epoch_{N}.pt` of a stage; None keeps all.

        The last states to go on from always stay: more periodic files than `keep`, where the rolling ones are missing.
        """
        if keep is None:
            return
        entries = self.entries(stage)
        periodic = [entry for entry in entries if entry.kind.startswith("epoch_")]
        others = {entry.counters for entry in entries if not entry.kind.startswith("epoch_")}
        keep = max(keep, RESUMABLE_AT_LEAST - len(others))
        for entry in sorted(periodic, key=lambda entry: entry.counters)[:-keep]:
            self._fence()
            entry.path.unlink()
        sync_folder(self.run_dir.path)

    def recover_manifest(self) -> None:
        """Write lines for whole files that no line knows, and forget lines that say nothing any more.

        For the process that holds the run lock, before it looks for its state. Files that are not whole are left to
        `newest`, which sets them aside.
        """
        lines = self._manifest.lines()
        known = {line["file"]: Counters(line["epochs"], line["step"]) for line in lines}
        rolling = {(line["stage"], Counters(line["epochs"], line["step"])) for line in lines if line["kind"] == "last"}
        for stage, kind, path in self.run_dir.checkpoints():
            counters = _read_counters(path)
            # A whole file that is further than its line says was written by lines that are lost: damage goes nowhere.
            lost = path.name not in known or counters > known[path.name]
            # What was written as `last`, and moved, has a line that says so.
            moved = kind == "last_previous" and (stage, counters) in rolling
            if moved or not lost or counters == UNREADABLE or _damaged_record(path) is not None:
                continue
            line = {"file": path.name, "stage": stage, "kind": kind, **asdict(counters)}
            found = {"sha256": file_sha256(path), "bytes": path.stat().st_size, "state": "found", "time": time.time()}
            self._manifest.append({**line, **found})
            log.warning(
                "%s has lost its line in %s: it is whole and was entered again", path.name, self.run_dir.manifest.name
            )
        self._manifest.shorten(lines)

    def entries(self, stage: str | None = None) -> list[FoundCheckpoint]:
        """Every checkpoint file of the run (of one stage), the furthest first."""
        by_name: dict[str, dict[str, Any]] = {}
        for line in self._manifest.lines():
            by_name[line["file"]] = line
        found = []
        for stage_name, kind, path in self.run_dir.checkpoints():
            if stage is not None and stage_name != stage:
                continue
            # A pending line may be ahead of the file: what counts stands in the file itself.
            sha256 = by_name[path.name]["sha256"] if path.name in by_name else None
            found.append(FoundCheckpoint(path, stage_name, kind, _read_counters(path), sha256))
        return sorted(found, key=lambda entry: (entry.counters, entry.kind), reverse=True)

    def any_trace(self) -> bool:
        """Whether this run ever had a checkpoint, even if none is left."""
        quarantined = self.run_dir.quarantine.is_dir() and any(self.run_dir.quarantine.iterdir())
        return quarantined or bool(self._manifest.lines()) or bool(self.run_dir.checkpoints())

    def damage(self, entry: FoundCheckpoint) -> str | None:
        """What is wrong with a file's content, or None."""
        if entry.path.stat().st_size == 0:
            return "the file is empty"
        known = {line["sha256"] for line in self._manifest.lines() if line["stage"] == entry.stage}
        sha256 = file_sha256(entry.path)
        if sha256 in known:
            return None
        if entry.sha256 is not None:
            return f"its content is not what was written: sha256 {sha256[:12]}, the manifest says {entry.sha256[:12]}"
        return _damaged_record(entry.path)

    def load(self, entry: FoundCheckpoint) -> dict[str, Any]:
        """The content of a file, with `weights_only=True`.

        Raises:
            CheckpointError: it is no checkpoint of this program.
        """
        try:
            payload = torch.load(entry.path, map_location="cpu", weights_only=True)
        except UNREADABLE_PAYLOAD as error:
            first_line = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{entry.path}: cannot be read as tensors and plain values: {first_line}") from error
        missing = [key for key in REQUIRED_KEYS if not isinstance(payload, dict) or key not in payload]
        if missing:
            raise CheckpointError(f"{entry.path}: not a checkpoint of this program, it lacks {', '.join(missing)}")
        return payload  # type: ignore[no-any-return]

    def _verified(self, entry: FoundCheckpoint) -> dict[str, Any] | str:
        """The content of a file, or what is wrong with it: a thread hashes the file while it is loaded."""
        with ThreadPoolExecutor(1, "verify") as thread:
            damage = thread.submit(self.damage, entry)
            try:
                payload = self.load(entry)
            except Exception as error:
                # What damaged bytes make torch raise has no end; of whole ones only the first kind is told here.
                if (reason := damage.result()) is not None:
                    return reason
                if isinstance(error, CheckpointError):
                    return str(error)
                raise
            return damage.result() or payload

    def newest(self, stage: str, kinds: Sequence[str] | None = None) -> tuple[FoundCheckpoint, dict[str, Any]] | None:
        """The furthest whole checkpoint of a stage and its content; damaged ones on the way are set aside."""
        for entry in self.entries(stage):
            if kinds is not None and entry.kind not in kinds:
                continue
            found = self._verified(entry)
            if not isinstance(found, str):
                _check_format(entry, found)
                return entry, found
            self._set_aside(entry, found)
        return None

    def read(self, stage: str, kind: str) -> dict[str, Any] | None:
        """The verified content of a file, or None where there is none; for readers, who may not move anything.

        Raises:
            CheckpointError: the file is damaged or no checkpoint of this program.
        """
        for entry in self.entries(stage):
            if entry.kind == kind:
                found = self._verified(entry)
                if isinstance(found, str):
                    raise CheckpointError(f"{entry.path}: damaged ({found}). Start the run again, or use a copy of it")
                _check_format(entry, found)
                return found
        return None

    def whole(self, stage: str, kind: str) -> bool:
        """Whether this file exists and its content is what was written; a damaged one is set aside."""
        for entry in self.entries(stage):
            if entry.kind == kind:
                reason = self.damage(entry)
                if reason is None:
                    return True
                self._set_aside(entry, reason)
        return False

    def set_aside(self, entry: FoundCheckpoint, reason: str) -> None:
        """Move a file to quarantine, with the reason beside it."""
        self.run_dir.quarantine.mkdir(exist_ok=True)
        target = self.run_dir.quarantine / f"{time.strftime('%Y%m%dT%H%M%S')}_{entry.path.name}"
        entry.path.replace(target)
        target.with_suffix(".txt").write_text(f"{reason}\n")
        sync_folder(self.run_dir.path)

    def _set_aside(self, entry: FoundCheckpoint, reason: str) -> None:
        self.set_aside(entry, reason)
        log.warning("%s is damaged and was moved to %s: %s", entry.path.name, self.run_dir.quarantine.name, reason)


def _check_format(entry: FoundCheckpoint, payload: dict[str, Any]) -> None:
    found = payload[RESUME_KEY].get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{entry.path}: written in format {found}, expected {FORMAT}; use the version of the program that wrote it"
        )


def _copy_into(source: Path, target: Any) -> None:
    with source.open("rb") as file:
        shutil.copyfileobj(file, target, COPY_CHUNK)


def _damaged_record(path: Path) -> str | None:
    """What the CRCs of a file's own records say is wrong, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except UNREADABLE_ZIP as error:
        return f"not a whole checkpoint: {error}"
    return None if bad is None else f"the record {bad} is damaged (CRC)"


def _read_counters(path: Path) -> Counters:
    """Counters of a file, by its content; tensors are not read."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Counters(payload["epoch"] + 1, payload[RESUME_KEY]["step"])
    except UNREADABLE_PAYLOAD:
        return UNREADABLE


def kinds_at_epoch_end(epochs: int, total: int, every: int, is_best: bool) -> list[str]:
    """Which files the state after `epochs` completed epochs is written to; `last` is written first."""
    kinds = ["last"]
    kinds += ["best"] if is_best else []
    kinds += [epoch_kind(epochs)] if epochs % every == 0 else []
    kinds += ["final"] if epochs == total else []
    return kinds
