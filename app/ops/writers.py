"""The log of a run: what the trainer calls, and its TensorBoard half.

Weights & Biases is no second writer: it follows the event files in a process of its own (`app.ops.wandb_log`), so that
both show the same numbers and a slow network costs a step nothing.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from app.errors import LockError, MachineError
from app.ops.event_files import newest_wall_time, next_file_name
from app.ops.tfrecord import frame
from app.workspace import sync_folder

log = logging.getLogger(__name__)

Picture = npt.NDArray[np.uint8]
"""(H, W, 3), sRGB."""

FILE_VERSION = "brain.Event:2"
LAYOUT_TAG = "custom_scalars__config__"
"""The tag under which TensorBoard looks for the layout of its Custom Scalars page."""


class Follower(Protocol):
    """Something that reads the event files on its own, such as Weights & Biases."""

    def close(self, limit_s: float) -> None:
        """Sends what is left, for at most `limit_s` seconds."""


class RunLog:
    """Everything that a run logs. A scalar costs microseconds: it waits in memory for the next flush.

    Call `flush` before a checkpoint is committed: a resumed run does not repeat the points up to it.
    """

    def __init__(self, tensorboard: TensorBoardLog, followers: Sequence[Follower] = ()) -> None:
        self._tensorboard = tensorboard
        self._followers = tuple(followers)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point; `step` counts on the axis of `tag` (`app.tags`)."""
        self._tensorboard.scalars({tag: value}, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points that share a step number; cheaper than one by one, and a kill cannot separate them."""
        self._tensorboard.scalars(values, step)

    def image(self, tag: str, picture: Picture, step: int) -> None:
        """A picture, (H, W, 3) uint8."""
        self._tensorboard.image(tag, picture, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in Markdown."""
        self._tensorboard.text(tag, markdown, step)

    def layout(self, serialized: bytes) -> None:
        """The layout of the Custom Scalars page, from `app.ops.layout`."""
        self._tensorboard.layout(serialized)

    def write(self) -> None:
        """Hands everything that was logged to the file system; what it refuses waits in memory."""
        self._tensorboard.write()

    def flush(self) -> None:
        """Makes everything that was logged durable.

        Raises:
            OSError: the file cannot be written; what was logged waits in memory.
        """
        self._tensorboard.flush()

    def close(self, limit_s: float = 30.0) -> None:
        """Flushes, then gives the followers `limit_s` seconds in all to finish."""
        self._tensorboard.close()
        deadline = time.monotonic() + limit_s
        for follower in self._followers:
            follower.close(max(0.0, deadline - time.monotonic()))


class TensorBoardLog:
    """Writes one event file: every event a whole record, in the order of the calls.

    Events wait in a plain list, not in a buffered file, which a forked worker would flush a second time.

    Args:
        folder: a run's `tensorboard` folder, after `rewind`.
        flush_s: events reach the file at least this often, from a thread of the writer's own.
        clock: seconds since 1970.
        fence: asked before each write; raises where the run is no longer ours.

    Raises:
        MachineError: the file cannot be made. Later on what a volume refuses waits in memory.
    """

    def __init__(
        self,
        folder: Path,
        flush_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        now = clock()
        self._fence = fence
        self._pending: list[bytes] = []
        self._lock = threading.Lock()
        self._error: OSError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._wall_base = max(now, newest_wall_time(folder)) - time.monotonic()
            self.path = folder / next_file_name(folder, now)
            self._file = self.path.open("xb", buffering=0)
            sync_folder(folder)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        self._append(Event(wall_time=self._wall_time(), file_version=FILE_VERSION))
        try:
            self.flush()
        except OSError as error:
            raise _cannot_write(folder, error) from error
        self._closed = threading.Event()
        self._flusher = threading.Thread(target=self._flush_often, args=(flush_s,), name="tensorboard", daemon=True)
        self._flusher.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One event with a point for each tag."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._log(points, step)

    def image(self, tag: str, picture: Picture, step: int) -> None:
        """A PNG of `picture`, (H, W, 3) uint8."""
        height, width, channels = picture.shape
        encoded = io.BytesIO()
        Image.fromarray(picture).save(encoded, "PNG", compress_level=4)
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue())
        self._log([Summary.Value(tag=tag, image=image)], step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text for the Text page."""
        self._log([_string_value(tag, "text", markdown.encode(), [1])], step)

    def layout(self, serialized: bytes) -> None:
        """The layout of the Custom Scalars page; TensorBoard merges that of each attempt into one."""
        self._log([_string_value(LAYOUT_TAG, "custom_scalars", serialized, [])], 0)

    def write(self) -> None:
        """Writes what waits, as far as the volume takes it."""
        self._write(sync=False)

    def flush(self) -> None:
        """Writes what waits and makes it durable.

        Raises:
            OSError: the volume did not take it; it waits.
        """
        self._write(sync=True)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Flushes and closes the file; may be called twice.

        Raises:
            MachineError: the last points are lost.
        """
        if self._file.closed:
            return
        self._closed.set()
        self._flusher.join()
        try:
            self.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            self._file.close()

    def _wall_time(self) -> float:
        # The monotonic clock: TensorBoard's time axis must not go back with the host's.
        return self._wall_base + time.monotonic()

    def _log(self, values: list[Summary.Value], step: int) -> None:
        self._append(Event(wall_time=self._wall_time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        self._pending.append(frame(event.SerializeToString()))

    def _flush_often(self, flush_s: float) -> None:
        while not self._closed.wait(flush_s):
            try:
                self._write(sync=False)
            except LockError:
                # The training thread meets the same fence and says so.
                return

    def _write(self, *, sync: bool) -> None:
        with self._lock:
            self._fence()
            count = len(self._pending)
            data = b"".join(self._pending[:count])
            try:
                while data:
                    data = data[self._file.write(data) :]
                if sync:
                    os.fsync(self._file.fileno())
                self._error = None
            except OSError as error:
                if self._error is None:
                    log.error("%s takes no more points (%s): they wait in memory", self.path, error.strerror)
                self._error = error
            # What a full disk refused stays first in line, so that the file never has a hole.
            self._pending[:count] = [data] if data else []


def _string_value(tag: str, plugin: str, content: bytes, shape: list[int]) -> Summary.Value:
    dimensions = [TensorShapeProto.Dim(size=size) for size in shape]
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin)),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto(dim=dimensions)),
    )


def _cannot_write(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot write the event file {path}: {error.strerror}. Make its volume writable and free some space; "
        f"the run goes on from its last checkpoint"
    )
