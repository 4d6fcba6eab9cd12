"""Reading TensorBoard's event files, and taking back what a dead process logged beyond the state that was saved.

A resumed run repeats steps. TensorBoard cannot be told so: its fast loader ignores `purge_step`, and stale points of
rarely written tags would stay. So the files are rewritten without those points before the next process logs.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from app.errors import MachineError
from app.ops.tfrecord import frame, read_records
from app.workspace import atomic_file, sync_folder

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"events\.out\.tfevents\.(?P<time>\d+)(\.(?P<attempt>\d+))?.*")
REWRITTEN = "rewound.bin"
"""Holds a rewritten file until it gets its name; TensorBoard opens every file with `tfevents` in its name."""
COPY_BYTES = 1 << 20

Keep = Callable[[str, int], bool]
"""Whether the point of a tag at a step number stays."""


@dataclass(frozen=True)
class RewindReport:
    """What `rewind` did."""

    files: int
    """Files that were rewritten."""
    dropped: int
    """Points that were taken back."""
    damaged: int
    """Unreadable stretches that were cut out, torn last records among them."""


@dataclass
class _Plan:
    """How to rebuild one event file: byte ranges of the old one and new records, in order."""

    parts: list[tuple[int, int] | bytes] = field(default_factory=list)
    dropped: int = 0
    damaged: int = 0

    def copy(self, start: int, end: int) -> None:
        if self.parts and isinstance(last := self.parts[-1], tuple) and last[1] == start:
            self.parts[-1] = (last[0], end)
        else:
            self.parts.append((start, end))


def event_files(folder: Path) -> list[Path]:
    """The event files directly in `folder`, in the order in which TensorBoard reads them."""
    return sorted(folder.glob("*tfevents*")) if folder.is_dir() else []


def rewind(folder: Path, keep: Keep) -> RewindReport:
    """Rewrites the event files in `folder` without the points that `keep` rejects and without unreadable bytes.

    Only for the process that holds the run lock, before it logs: the writers of these files must be dead. A file with
    nothing to take out is not touched; any other is replaced whole and durably, or not at all.

    Args:
        folder: a run's `tensorboard` folder; it may be missing.
        keep: function of (tag, step number), see `app.tags.keep_before`.

    Raises:
        MachineError: a file cannot be read or written.
    """
    files = dropped = damaged = 0
    (folder / REWRITTEN).unlink(missing_ok=True)
    for path in event_files(folder):
        try:
            plan = _plan(path, keep)
            if plan.dropped or plan.damaged:
                _rebuild(path, plan)
                files += 1
        except OSError as error:
            raise MachineError(
                f"cannot rewrite the event file {path}: {error.strerror}. Make its volume writable and free some "
                f"space, or move the file away to go on without its curves"
            ) from error
        dropped += plan.dropped
        damaged += plan.damaged
    return RewindReport(files, dropped, damaged)


def _plan(path: Path, keep: Keep) -> _Plan:
    plan = _Plan()
    with path.open("rb") as file:
        for record in read_records(file):
            event = None if record.payload is None else _parse(record.payload)
            if event is None:
                plan.damaged += 1
                if not record.at_end:
                    log.warning(
                        "%s: bytes %d to %d are damaged; the points in them are lost", path, record.start, record.end
                    )
                continue
            kept = [value for value in event.summary.value if keep(value.tag, event.step)]
            lost = len(event.summary.value) - len(kept)
            plan.dropped += lost
            if not lost:
                plan.copy(record.start, record.end)
            elif kept:
                del event.summary.value[:]
                event.summary.value.extend(kept)
                plan.parts.append(frame(event.SerializeToString()))
    return plan


def _parse(payload: bytes) -> Event | None:
    try:
        return Event.FromString(payload)
    except DecodeError:
        return None


def _rebuild(path: Path, plan: _Plan) -> None:
    rewritten = path.with_name(REWRITTEN)
    with path.open("rb") as old, atomic_file(rewritten) as new:
        for part in plan.parts:
            if isinstance(part, bytes):
                new.write(part)
            else:
                _copy(old, new, *part)
    shutil.copymode(path, rewritten)
    rewritten.replace(path)
    sync_folder(path.parent)


def _copy(old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        block = old.read(min(COPY_BYTES, end - start))
        new.write(block)
        start += len(block)


class EventReader:
    """Reads a folder's events in order, each once, and goes on where it stopped: for a live run.

    A record that is being written at the end of a file is left for the next call.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._position: dict[Path, int] = {}

    def poll(self) -> Iterator[Event]:
        """The events that arrived since the last call."""
        for path in event_files(self.folder):
            with path.open("rb") as file:
                for record in read_records(file, self._position.get(path, 0)):
                    if record.at_end:
                        break
                    self._position[path] = record.end
                    event = None if record.payload is None else _parse(record.payload)
                    if event is not None:
                        yield event


def newest_wall_time(folder: Path) -> float:
    """Wall time of the last event in `folder`, in seconds; 0 where there is none."""
    newest = 0.0
    for path in event_files(folder)[-1:]:
        with path.open("rb") as file:
            for record in read_records(file):
                event = None if record.payload is None else _parse(record.payload)
                newest = newest if event is None else max(newest, event.wall_time)
    return newest


def next_file_name(folder: Path, now: float) -> str:
    """Name of the next event file: it sorts behind every file in `folder`, even where the clock went back.

    TensorBoard reads files in path order, and a name without the host's tells nobody where the run was.
    """
    matches = [match for path in event_files(folder) if (match := FILE_NAME.fullmatch(path.name))]
    newest = max((int(match["time"]) for match in matches), default=-1)
    attempt = 1 + max((int(match["attempt"] or 0) for match in matches), default=0)
    return f"events.out.tfevents.{max(int(now), newest + 1):010d}.{attempt}"
