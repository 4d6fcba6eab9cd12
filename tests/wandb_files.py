"""Reading what Weights & Biases wrote into a run's folder, and what TensorBoard has."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from app.config import Config
from app.ops.event_files import EventReader
from app.ops.wandb_log import WandbLog
from app.ops.writers import RunLog, TensorBoardLog
from app.tags import axis, is_axis
from app.workspace import RunDir

BLOCK_BYTES = 32768
Points = dict[str, list[tuple[int, float]]]


def records(path: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: a LevelDB log, chunks with checksums in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        position += 7 + length
        parts += chunk
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(parts)
            parts = b""


def rows(path: Path) -> list[dict[str, Any]]:
    """The history rows of a `.wandb` file."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def points_of(path: Path) -> Points:
    """Scalars by tag, each at the position that its row gives for the tag's axis."""
    found: Points = defaultdict(list)
    for row in rows(path):
        for tag, content in row.items():
            if (
                not is_axis(tag)
                and axis(tag) in row
                and not re.search(r"\.(size|width|height)$", tag)
                and isinstance(content, int | float)
            ):
                found[tag].append((row[axis(tag)], float(content)))
    return dict(found)


def tensorboard_points(folder: Path) -> Points:
    """Scalars of the event files by tag."""
    found: Points = defaultdict(list)
    for event in EventReader(folder).poll():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


def wandb_file(run: RunDir) -> Path:
    """The one offline file of the run."""
    (path,) = run.wandb.glob("offline-run-*/*.wandb")
    return path


def config_of(path: Path) -> dict[str, Any]:
    """The config of a `.wandb` file, without what wandb says of itself."""
    found = {
        item.key: json.loads(item.value_json)
        for record in records(path)
        if record.HasField("run")
        for item in record.run.config.update
    }
    del found["_wandb"]
    return found


def summary_of(path: Path) -> dict[str, Any]:
    """The summary that a `.wandb` file ends with."""
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records(path)
        if record.HasField("summary")
        for item in record.summary.update
    }


def start_log(run: RunDir, mode: Any = "offline", config: Config | None = None, device: str = "cpu") -> RunLog:
    """The log of one attempt, followed by a real process."""
    follower = WandbLog(run, config or Config(), mode, device)
    return RunLog(TensorBoardLog(run.tensorboard, flush_s=0.5), [follower])
