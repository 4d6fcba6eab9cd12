"""Saving beside training: a copy between two steps, written by a thread.

The training thread is blocked only while the state is copied into buffers that are kept from save to save (first
touching new memory costs twenty times the copy). One thread writes, one save at a time. A state is published whole or
not at all, and in the order in which the states were reached: what an epoch's end owes (`best`, `epoch_N`, `final`)
is written before anything newer, so that a resume never finds a newer state beside a missing older file.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.config import CheckpointConfig
from app.errors import AppError, Stopped
from app.tags import CHECKPOINT_TAGS
from app.train.checkpoint import CheckpointFolder, Counters
from app.train.pace import Pace
from app.train.protocols import Grace, Status
from app.train.state import StageState
from app.train.volume import expect_room

log = logging.getLogger(__name__)

PAUSE_AFTER_S = 1800.0
"""Without a good save for this long, training waits: more steps would only be more to lose."""
FIRST_RETRY_S, LONGEST_RETRY_S = 2.0, 30.0
OWED_AT_MOST_BYTES = 2 << 30
"""Of states that wait in memory for a volume that takes no more, the one being written aside."""
CLOSE_WITHIN_S = 60.0
POLL_S = 0.05
ROLLING = "last"


class Buffers:
    """Copies of a state's tensors in memory that is kept."""

    def __init__(self) -> None:
        """Nothing is allocated before the first copy."""
        self._tensors: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @torch.no_grad()
    def copy(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """`payload` with every tensor replaced by its copy on the CPU; the copies are overwritten by the next call."""
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        copied: dict[str, Any] = self._replace(payload, "", sources, targets)
        torch._foreach_copy_(targets, sources, non_blocking=True)
        for device in {source.device for source in sources if source.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return copied

    def _replace(self, value: Any, name: str, sources: list[Tensor], targets: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            sources.append(value.detach())
            targets.append(self._target(name, value))
            return targets[-1]
        if isinstance(value, Mapping):
            return {key: self._replace(item, f"{name}.{key}", sources, targets) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._replace(item, f"{name}.{index}", sources, targets) for index, item in enumerate(value)]
        return value

    def _target(self, name: str, source: Tensor) -> Tensor:
        target = self._tensors.get(name)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            # Pinned, a copy from the GPU runs at the speed of the bus.
            target = torch.empty_like(source, device="cpu", pin_memory=source.device.type == "cuda")
            self._tensors[name] = target
        return target


@dataclass
class Job:
    """A staged state and the files that it is still to be written to."""

    stage: str
    payload: dict[str, Any]
    buffers: Buffers
    counters: Counters
    kinds: list[str]
    error: OSError | None = None

    def __post_init__(self) -> None:
        self.owed = self.kinds != [ROLLING]
        """Whether nothing newer may take its place."""


@dataclass(frozen=True)
class SaveReport:
    """The newest file that was published, and what it cost."""

    file: str
    step: int
    scalars: dict[str, float]
    """Points of the `ops/` curves."""


@dataclass
class _Shared:
    """What the two threads share, under `lock`."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    queue: deque[Job] = field(default_factory=deque)
    """The first one is being written, or waits to be written again."""
    writing: bool = False
    hurry: bool = False
    """Try again at once."""
    closed: bool = False
    fatal: BaseException | None = None
    last_good: float = field(default_factory=time.monotonic)
    published: Counters | None = None
    report: SaveReport | None = None
    failures: int = 0
    failing: bool = False
    """The volume has refused a save and has taken none since."""


class Saver:
    """The saves of one stage.

    Args:
        folder: where checkpoints go.
        config: cadence, and the bound of its cost.
        pace: measured speeds; shared by the stages of a run.
        flush: makes every curve point so far durable; a resumed run does not repeat the points up to its state.
        grace: how long the process may take once it was asked to stop.
        status: told of every save and of every pause.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        pace: Pace,
        flush: Callable[[], None],
        grace: Grace,
        status: Status,
    ) -> None:
        self._folder, self._config, self._pace, self._flush = folder, config, pace, flush
        self._grace, self._status = grace, status
        self._spare: Buffers | None = None
        self._shared = _Shared()
        self._last_staged = time.monotonic()
        grace.at_the_last_moment(self._last_moment)
        self._thread = threading.Thread(target=self._write_jobs, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, state: StageState, kinds: Sequence[str]) -> None:
        """Stage `state` for these files, after what is owed; returns when training may go on.

        Raises:
            Stopped: asked to stop while waiting for the volume.
            LockError: the run is no longer ours.
        """
        started, shared = time.monotonic(), self._shared
        self._wait(self._settled)
        if list(kinds) == [ROLLING] and shared.queue and any(job.owed for job in shared.queue):
            return
        if sum(job.buffers.size for job in shared.queue) > OWED_AT_MOST_BYTES:
            self._pause(f"{len(shared.queue)} states wait in memory for the volume")
        self._stage(state, list(kinds), started)

    def save_if_due(self, state: StageState, epoch_ends_in_s: float) -> bool:
        """A rolling save, if the last one is long enough ago and the end of the epoch does not save anyway."""
        self._raise_fatal()
        shared, now = self._shared, time.monotonic()
        settled = self._settled()
        if settled and shared.queue and now - shared.last_good > PAUSE_AFTER_S:
            self._pause(f"no checkpoint could be written for {PAUSE_AFTER_S / 60:.0f} minutes")
        since = now - self._last_staged
        # The measured interval is never shorter than the one asked for, which costs nothing to look at.
        due = since >= self._config.save_every_s and since >= self._pace.interval_s(self._config)
        if due and settled and epoch_ends_in_s > self._pace.save_s:
            self.save(state, [ROLLING])
            return True
        return False

    def report(self) -> SaveReport | None:
        """What the newest save cost, once."""
        with self._shared.lock:
            report, self._shared.report = self._shared.report, None
        return report

    def writing(self) -> bool:
        """Whether a save is being written, which slows steps."""
        return self._shared.writing

    def drain(self) -> None:
        """Wait until everything that was staged is published, however long the volume takes.

        Raises:
            Stopped: asked to stop meanwhile.
        """
        self._wait(self._settled)
        if self._shared.queue:
            self._pause("the end of a stage cannot be written")

    def save_before_leaving(self, state: StageState) -> bool:
        """Publish the newest complete state that the time left allows for; whether it is `state`."""
        shared, counters = self._shared, state.progress.counters
        with shared.lock:
            shared.hurry = True
            shared.lock.notify_all()
        self._wait_while_time_is_left(self._settled)
        if shared.published != counters and shared.fatal is None:
            left, needs = self._grace.seconds_left(), self._pace.save_s
            if needs < left and self._settled():
                self._stage(state, [ROLLING], time.monotonic())
                self._wait_while_time_is_left(self._settled)
            else:
                log.warning("a save takes %.1f s and %.1f s are left: what was staged before stands", needs, left)
        return shared.published == counters

    def close(self) -> None:
        """Finish what is being written and end the thread."""
        shared = self._shared
        self._grace.at_the_last_moment(None)
        deadline = time.monotonic() + min(CLOSE_WITHIN_S, self._grace.seconds_left())
        with shared.lock:
            shared.closed = True
            shared.lock.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _settled(self) -> bool:
        """Whether the writing thread has nothing to write, or has failed and waits: no buffer is being read."""
        shared = self._shared
        return not shared.writing and (not shared.queue or shared.queue[0].error is not None)

    def _stage(self, state: StageState, kinds: list[str], started: float) -> None:
        """Copy and hand over, while the writing thread is settled; `started` is when the training thread came."""
        shared = self._shared
        with shared.lock:
            # What failed and is not owed makes room for what is newer.
            for job in [job for job in shared.queue if not job.owed]:
                shared.queue.remove(job)
                self._spare = job.buffers
        buffers, self._spare = self._spare or Buffers(), None
        payload = buffers.copy(state.payload())
        self._last_staged = time.monotonic()
        self._pace.blocked(self._last_staged - started, buffers.size)
        with shared.lock:
            shared.queue.append(Job(state.stage.name, payload, buffers, state.progress.counters, kinds))
            shared.lock.notify_all()

    def _pause(self, why: str) -> None:
        """Wait until all that was staged is published.

        Raises:
            Stopped: asked to stop meanwhile.
        """
        shared = self._shared
        error = shared.queue[0].error if shared.queue else None
        log.error("training pauses: %s (%s). Make room or mount the volume again: it goes on by itself", why, error)
        self._status(state=f"paused: {why}")
        self._wait(lambda: not shared.queue)
        log.info("the volume takes checkpoints again; training goes on")
        self._status(state="training")

    def _wait(self, condition: Callable[[], bool]) -> None:
        shared = self._shared
        with shared.lock:
            while not condition() and shared.fatal is None:
                if math.isfinite(self._grace.seconds_left()):
                    raise Stopped("stopped while waiting for the volume")
                shared.lock.wait(POLL_S)
        self._raise_fatal()

    def _wait_while_time_is_left(self, condition: Callable[[], bool]) -> None:
        shared = self._shared
        with shared.lock:
            while not condition() and shared.fatal is None and self._grace.seconds_left() > 0:
                shared.lock.wait(POLL_S)

    def _raise_fatal(self) -> None:
        if self._shared.fatal is not None:
            raise self._shared.fatal

    def _last_moment(self, seconds: float) -> None:
        """In the signal thread, while the training thread does not answer: let a write end that is under way."""
        deadline = time.monotonic() + seconds
        shared = self._shared
        while shared.queue and shared.queue[0].error is None and time.monotonic() < deadline:
            time.sleep(POLL_S / 5)

    def _write_jobs(self) -> None:
        """The writing thread."""
        shared, retry_s = self._shared, FIRST_RETRY_S
        while True:
            with shared.lock:
                while not shared.queue and not shared.closed:
                    shared.lock.wait()
                if not shared.queue:
                    return
                job = shared.queue[0]
                shared.writing = True
            failed = self._write(job)
            with shared.lock:
                shared.writing = False
                if failed is None or shared.fatal is not None:
                    retry_s = FIRST_RETRY_S
                    if job in shared.queue:
                        shared.queue.remove(job)
                    self._spare = job.buffers
                job.error = failed
                shared.lock.notify_all()
                if shared.fatal is not None or (failed is not None and shared.closed):
                    return
                if failed is not None:
                    shared.hurry = False
                    self._wait_to_retry(retry_s)
                    retry_s = min(2 * retry_s, LONGEST_RETRY_S)

    def _wait_to_retry(self, seconds: float) -> None:
        """Under the lock; cut short by anything new to write and by the wish to leave."""
        shared = self._shared
        known = len(shared.queue)
        shared.lock.wait_for(lambda: shared.hurry or shared.closed or len(shared.queue) != known, seconds)

    def _write(self, job: Job) -> OSError | None:
        """Publish what is left of a job; the error of a volume that does not take it."""
        shared = self._shared
        started = time.monotonic()
        try:
            expect_room(self._folder.run_dir.path, job.buffers.size, self._config.min_free_gib)
            self._flush()
            while job.kinds:
                self._folder.publish(job.stage, job.kinds[:1], job.payload, job.counters)
                self._done(job, time.monotonic() - started)
                started = time.monotonic()
            if job.owed:
                self._folder.retain(job.stage, self._config.keep_last_n_checkpoints)
        except OSError as error:
            shared.failures += 1
            log.log(
                logging.DEBUG if shared.failing else logging.ERROR,
                "%s: a checkpoint cannot be written: %s. Training goes on, older files are whole, it is tried again",
                job.stage,
                error.strerror or error,
            )
            shared.failing = True
            return error
        except AppError as error:
            shared.fatal = error
        except Exception as error:  # noqa: BLE001 - raised in the training thread
            shared.fatal = error
        return None

    def _done(self, job: Job, seconds: float) -> None:
        shared = self._shared
        kind = job.kinds.pop(0)
        self._pace.wrote(seconds, job.buffers.size)
        with shared.lock:
            if shared.failing:
                log.info("%s_%s.pt: the volume takes checkpoints again", job.stage, kind)
            job.error, shared.failing = None, False
            shared.last_good, shared.published = time.monotonic(), job.counters
            values = (
                self._pace.blocked_s,
                seconds,
                job.buffers.size / 2**20 / max(seconds, 1e-6),
                self._pace.interval_s(self._config),
                self._pace.overhead(self._config),
                shared.failures,
            )
            name = self._folder.run_dir.checkpoint(job.stage, kind).name
            shared.report = SaveReport(name, job.counters.step, dict(zip(CHECKPOINT_TAGS, values, strict=True)))
