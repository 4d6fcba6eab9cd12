"""Checkpoints as artifacts at Weights & Biases, in the process that sends the curves: `best` and `final` of each stage.

A file may be replaced at any moment, always by a rename. So it gets a second name first, a hard link: nothing is
copied, and what is sent is one file from its first byte to its last. Its sha256 must stand in the manifest.

- online: what was sent, by this attempt or an earlier one, is not sent again. A file whose sending was cut off is; the
  server knows it by its content and makes no second version of it. Of the bests that come meanwhile the newest is next.
- offline: the record of each attempt is complete, so each names all files, and the links stay: `wandb sync` reads them.
  Only stages that are finished are named: their files are not replaced any more, so the links take no room.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb

from app.ops.crash_budget import read_lines
from app.workspace import RunDir

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
RETRY_S = 300.0
SEND_WITHIN_S = 3600.0
TEMPORARY = ".new"


@dataclass(frozen=True)
class Linked:
    """What the manifest says of a checkpoint, which a link keeps until it is sent."""

    stage: str
    kinds: tuple[str, ...]
    epochs: int
    step: int
    sha256: str


class CheckpointSender:
    """Sends one file after the other, from a thread of its own. The run's folder must be the working directory.

    Args:
        run: the run at Weights & Biases.
        run_dir: where checkpoints and manifest are.
        epochs: of each stage, when it is finished.
        offline: whether the run is written into a folder.
    """

    def __init__(self, run: wandb.Run, run_dir: RunDir, epochs: Mapping[str, int], offline: bool) -> None:
        self._run, self._run_dir, self._epochs, self._offline = run, run_dir, epochs, offline
        self._sent: set[str] = set() if offline else _sent_before(run_dir)
        self._looked_at: dict[Path, tuple[tuple[int, ...], Linked | None]] = {}
        self._newest: dict[str, dict[str, Any]] = {}
        if not offline:
            # What an attempt that was killed left; offline, its record still needs it.
            remove_links(run_dir, ())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="checkpoints", daemon=True)
        self._thread.start()

    def finish(self, limit_s: float) -> None:
        """Sends what there is, for at most `limit_s` seconds; the next attempt sends the rest."""
        self._ending.set()
        self._thread.join(limit_s)

    def needed(self) -> Collection[str] | None:
        """The sha256 of each file whose link must stay; None while some are being sent."""
        if self._thread.is_alive():
            return None
        return self._sent if self._offline else ()

    def _send_all(self) -> None:
        wait_s, last = LOOK_EVERY_S, False
        while not last:
            last = self._ending.wait(wait_s)
            try:
                while (linked := self._next()) is not None:
                    self._send(linked)
                wait_s = LOOK_EVERY_S
            except Exception as error:  # noqa: BLE001 - whatever wandb raises, the curves go on
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                log.log(
                    logging.WARNING if wait_s == LOOK_EVERY_S else logging.DEBUG,
                    "a checkpoint could not be sent to Weights & Biases, trying again every %.0f s: %s",
                    RETRY_S,
                    reason,
                )
                wait_s = RETRY_S

    def _next(self) -> Linked | None:
        self._newest = {line["file"]: line for line in read_lines(self._run_dir.manifest)}
        due = (linked for stage, epochs in self._epochs.items() for linked in self._due(stage, epochs))
        return next((linked for linked in due if linked.sha256 not in self._sent), None)

    def _due(self, stage: str, epochs: int) -> list[Linked]:
        """What there is to send of a stage; where the last epoch is the best one, one file with both names."""
        final = self._look(stage, "final")
        finished = final is not None and final.epochs >= epochs
        if self._offline and not finished:
            return []
        best = self._look(stage, "best")
        if final is None or not finished:
            # The best of the last epoch waits for the final one, which is the same file.
            return [best] if best is not None and best.epochs < epochs else []
        if best is None or best.sha256 == final.sha256:
            return [replace(final, kinds=("final",) if best is None else ("best", "final"))]
        return [best, final]

    def _look(self, stage: str, kind: str) -> Linked | None:
        """A checkpoint, linked if it is to be sent; None where there is none or its content is not what was written."""
        path = self._run_dir.checkpoint(stage, kind)
        newest = self._newest.get(path.name)
        if newest is not None and newest["sha256"] in self._sent:
            return _linked(newest, kind)
        new = self._run_dir.wandb_links / TEMPORARY
        try:
            before = self._looked_at.get(path)
            if before is not None and before[0] == _identity(path):
                return before[1]
            new.parent.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            os.link(path, new)
        except FileNotFoundError:
            return None
        identity = _identity(new)
        with new.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # The newest line may be ahead of the file, and the file ahead of what was read before.
        line = {line["sha256"]: line for line in read_lines(self._run_dir.manifest)}.get(sha256)
        if line is None:
            log.warning("%s is not sent to Weights & Biases: its sha256 does not stand in the manifest", path.name)
        if line is None or sha256 in self._sent:
            new.unlink()
        else:
            new.replace(self._link(sha256))
        found = None if line is None else _linked(line, kind)
        self._looked_at[path] = (identity, found)
        return found

    def _send(self, linked: Linked) -> None:
        """Sends a file and waits until the server has it."""
        link = self._link(linked.sha256)
        metadata = {"stage": linked.stage, "epochs": linked.epochs, "step": linked.step, "sha256": linked.sha256}
        artifact = wandb.Artifact(f"{self._run.id}-{linked.stage}", type="model", metadata=metadata)
        name = self._run_dir.checkpoint(linked.stage, linked.kinds[-1]).name
        # The link is what makes it immutable; caches would be copies. The path is sent along: so it is a relative one.
        relative = link.relative_to(self._run_dir.path)
        artifact.add_file(str(relative), name=name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=[*linked.kinds])
        if not self._offline:
            artifact.wait(timeout=int(SEND_WITHIN_S))
            with self._run_dir.wandb_sent.open("a") as file:
                file.write(f"{linked.sha256}\n")
            link.unlink()
        self._sent.add(linked.sha256)

    def _link(self, sha256: str) -> Path:
        return self._run_dir.wandb_links / f"{sha256}.pt"


def remove_links(run_dir: RunDir, needed: Collection[str]) -> None:
    """Deletes the links to all checkpoints but those with a sha256 in `needed`."""
    links = run_dir.wandb_links
    for link in links.iterdir() if links.is_dir() else ():
        if link.stem not in needed:
            link.unlink()


def _linked(line: dict[str, Any], kind: str) -> Linked:
    return Linked(line["stage"], (kind,), line["epochs"], line["step"], line["sha256"])


def _sent_before(run_dir: RunDir) -> set[str]:
    return set(run_dir.wandb_sent.read_text().split()) if run_dir.wandb_sent.exists() else set()


def _identity(path: Path) -> tuple[int, ...]:
    """Another one for each file that ever has this name."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
