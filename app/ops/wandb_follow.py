"""Weights & Biases, the other process: reads the event files and sends them, until its standard input says so or ends.

Which points are sent:
- offline: all, from the first one on, in each attempt. Offline folders of one run overwrite each other when they are
  synced (with `resume` they would add to each other), so the newest one is complete, and older ones are deleted as
  soon as it is.
- online: those that the server lacks. It says itself how far it got: the last value of each axis stands in the run's
  summary. Points at that very position are sent again, because it may have got only some of them; a repeated point has
  the same position and the same value.

The best values in the run's summary are taken from all points of the event files, sent or not: what `define_metric` has
for this (`summary="min"`) starts anew with each attempt that is online.

The step is logged as a value with `define_metric`, never as `step=`: the server drops rows whose step goes back, and a
run has three kinds of steps.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import wandb
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event

from app.env import Environment
from app.log import setup_logging
from app.ops.event_files import EventReader
from app.ops.wandb_checkpoints import CheckpointSender, remove_links
from app.tags import BEST, NO_AXIS, axis, best_name, is_axis
from app.workspace import RunDir

log = logging.getLogger(__name__)

POLL_S = 5.0
RETRY_S = 300.0
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0
NICE = 10
"""On a machine without an idle core, training comes first."""
FLUSH_S = 2.0
"""Interval at which wandb writes its own file."""

SHARE_FOR_CHECKPOINTS = 0.8
"""Of the time that is left at the end."""


class Trainer(Protocol):
    """The process that started this one."""

    def ended(self, timeout_s: float) -> bool:
        """Waits up to so many seconds; True as soon as the trainer has ended its log or is dead."""

    def seconds_left(self) -> float:
        """How long it waits for this process, once it has ended; 0 where it is dead."""


@dataclass(frozen=True)
class Job:
    """What to send where; the trainer writes it into the pipe."""

    root: str
    tensorboard: str
    run_id: str
    run_name: str | None
    project: str
    entity: str | None
    mode: Literal["online", "offline"]
    config: dict[str, Any]
    epochs: dict[str, int]
    """Of each stage."""
    images: bool
    checkpoints: bool

    @property
    def folder(self) -> Path:
        """Where wandb keeps its runs."""
        return self.run_dir.wandb

    @property
    def run_dir(self) -> RunDir:
        """The run."""
        return RunDir(Path(self.root))


def follow(job: Job, trainer: Trainer) -> None:
    """Sends the events of `job` until `trainer` has ended, then what is left."""
    with _only_one(job.folder):
        run = _start(job, trainer)
        if run is None:
            return
        sender = Sender(run, job.images)
        checkpoints = None
        if job.checkpoints:
            checkpoints = CheckpointSender(run, job.run_dir, job.epochs, offline=job.mode == "offline")
        reader = EventReader(Path(job.tensorboard))
        complete_since = None
        last = False
        while not last:
            last = trainer.ended(POLL_S if complete_since else 0.0)
            for event in reader.poll():
                sender.send(event)
            sender.send_bests()
            complete_since = complete_since or time.monotonic()
            if time.monotonic() - complete_since > 2 * FLUSH_S:
                _remove_superseded(job, run)
        if checkpoints is not None:
            checkpoints.finish(SHARE_FOR_CHECKPOINTS * trainer.seconds_left())
        run.finish()
        _remove_superseded(job, run)
        needed = () if checkpoints is None else checkpoints.needed()
        if needed is not None:
            remove_links(job.run_dir, needed)


class Sender:
    """Turns events into rows of one run; pictures only where `images` says so."""

    def __init__(self, run: wandb.Run, images: bool) -> None:
        self._run = run
        self._images = images
        self._defined: set[str] = set()
        self._sent = _positions(run) if run.resumed else {}
        self._best: dict[str, float] = {}
        self._best_sent: dict[str, float] = {}

    def send(self, event: Event) -> None:
        """Sends the points of `event` that the server lacks; one row for each axis."""
        rows: dict[str, dict[str, Any]] = {}
        for value in event.summary.value:
            self._compare(value.tag, value.simple_value, event.step)
            content = self._content(value)
            name = axis(value.tag)
            if content is None or event.step < self._sent.get(name, event.step):
                continue
            self._define(value.tag, name)
            rows.setdefault(name, {} if name == NO_AXIS else {name: event.step})[value.tag] = content
        for row in rows.values():
            self._run.log({**row, "_timestamp": event.wall_time})

    def send_bests(self) -> None:
        """Puts the best values so far into the summary, where they have changed."""
        changed = {name: best for name, best in self._best.items() if self._best_sent.get(name) != best}
        if changed:
            self._run.summary.update(changed)
            self._best_sent.update(changed)

    def _compare(self, tag: str, found: float, epochs: int) -> None:
        """A stage's first validation, before it is trained, is never its best: no checkpoint is."""
        better = BEST.get(tag.partition("/")[2])
        if better is not None and epochs > 0:
            name = best_name(tag)
            self._best[name] = better(self._best.get(name, found), found)

    def _content(self, value: Any) -> Any:
        """What is logged for a point; None for texts and layouts, which the config and W&B's own pages replace."""
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            return value.simple_value
        if kind == "image" and self._images:
            return wandb.Image(Image.open(io.BytesIO(value.image.encoded_image_string)))
        return None

    def _define(self, tag: str, name: str) -> None:
        if tag in self._defined or name == NO_AXIS:
            return
        if name not in self._defined:
            self._run.define_metric(name, hidden=True)
        self._run.define_metric(tag, step_metric=name)
        self._defined |= {tag, name}


def _positions(run: wandb.Run) -> dict[str, int]:
    """The last step number of each axis that the server has."""
    summary: Any = run.summary
    found = {name: summary.get(name) for name in list(summary.keys()) if is_axis(name)}
    return {name: int(value) for name, value in found.items() if isinstance(value, int | float)}


def _start(job: Job, trainer: Trainer) -> wandb.Run | None:
    """The run, as soon as the server can be reached; None if the trainer ends before that."""
    warned = False
    while True:
        try:
            return wandb.init(
                id=job.run_id,
                name=job.run_name,
                project=job.project,
                entity=job.entity,
                config=job.config,
                mode=job.mode,
                resume="allow" if job.mode == "online" else None,
                settings=_settings(job),
            )
        except wandb.errors.CommError as error:
            if not warned:
                log.warning("Weights & Biases cannot be reached, trying again every %.0f s: %s", RETRY_S, _line(error))
            warned = True
        # Its service still holds the run that could not be opened, and would refuse the next attempt.
        wandb.teardown()
        if trainer.ended(RETRY_S):
            return None


def _settings(job: Job) -> wandb.Settings:
    """Nothing about this machine leaves it: no console, code, git, packages, host, user or paths; and of its figures
    those that are in the curves, not what wandb would measure."""
    return wandb.Settings(
        root_dir=job.root,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        console="off",
        silent=True,
        symlink=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        host="",
        username="",
        program="",
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_S,
    )


def _remove_superseded(job: Job, run: wandb.Run) -> None:
    """Deletes the folders of earlier attempts: this one holds all that they hold, and syncing them would undo it."""
    current = Path(run.dir).parent.name
    for folder in job.folder.glob(f"*run-*-{job.run_id}*"):
        if folder.name != current and folder.is_dir():
            shutil.rmtree(folder)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Waits until the process of an earlier attempt has gone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class Pipe:
    """A `Trainer` at the other end of the standard input: a line with the job, and one when its log has ended."""

    def __init__(self) -> None:
        # Unbuffered, so that `select` sees the second line even if both have come.
        self._file = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115

    def job(self) -> Job:
        """What to do."""
        return Job(**json.loads(self._file.readline()))

    def ended(self, timeout_s: float) -> bool:
        """Whether the trainer wrote its second line, or has gone."""
        readable, _, _ = select.select([self._file], [], [], timeout_s)
        return bool(readable)

    def seconds_left(self) -> float:
        """What stands in the second line."""
        return float(self._file.readline() or 0.0)


def run_from_pipe() -> None:
    """Follows the job that stands in the first line of the standard input, until there is a second line or the end."""
    # Only the trainer ends this process: it writes when it is done, and its death closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    setup_logging(None, Environment.read())
    pipe = Pipe()
    job = pipe.job()
    # For the paths of checkpoints, which are sent along with them.
    os.chdir(job.root)
    try:
        follow(job, pipe)
    except Exception as error:  # noqa: BLE001 - whatever wandb raises, it costs the run one line and nothing else
        log.warning("Weights & Biases is off from here on: %s: %s", type(error).__name__, _line(error))


if __name__ == "__main__":
    run_from_pipe()
