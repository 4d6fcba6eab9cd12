"""Saving beside training: never torn, never mixed, in order, and patient with a volume."""

from __future__ import annotations

import errno
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import app.train.saver as saver_module
from app.config import CheckpointConfig
from app.errors import LockError, Stopped
from app.train.checkpoint import CheckpointFolder, Counters
from app.train.pace import Pace
from app.train.saver import Saver
from app.workspace import RunDir

STAGE = "stage_8"


class State:
    """Two tensors that every step changes together."""

    def __init__(self) -> None:
        self.tensors = [torch.zeros(200_000), torch.zeros(200_000)]
        self.step = 0
        self.epochs = 0
        self.stage = SimpleNamespace(name=STAGE)

    @property
    def progress(self) -> Any:
        return SimpleNamespace(counters=Counters(self.epochs, self.step))

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step += 1
            for tensor in self.tensors:
                tensor += 1

    def payload(self) -> dict[str, Any]:
        return {
            "model_state_dict": {"a": self.tensors[0], "b": self.tensors[1]},
            **{key: {} for key in ("optimizer_state_dict", "scaler_state_dict", "config")},
            "epoch": self.epochs - 1,
            "val_loss": math.inf,
            "resume": {"format": 1, "stage": STAGE, "step": self.step},
        }


class Folder(CheckpointFolder):
    """A volume that can be held up, or fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(RunDir(path))
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def publish(self, *arguments: Any) -> None:
        self.open.wait(30)
        if self.error is not None:
            raise self.error
        super().publish(*arguments)


class Grace:
    """A stop that comes when the test says so."""

    left = math.inf
    work: Any = None

    def seconds_left(self) -> float:
        return self.left

    def at_the_last_moment(self, work: Any) -> None:
        self.work = work


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[Saver, Folder, State, Grace]]:
    """A saver with everything around it."""
    folder, grace = Folder(tmp_path), Grace()
    config = CheckpointConfig(save_every_s=0.001, max_overhead=1.0, min_free_gib=0.0)
    saver = Saver(folder, config, Pace(1000.0), lambda: None, grace, lambda **_: None)
    yield saver, folder, State(), grace
    folder.open.set()
    folder.error = None
    saver.close()


def found(folder: Folder) -> dict[str, tuple[int, float, float]]:
    """Kind -> (step, value of each of the two tensors) of every file."""
    result = {}
    for entry in folder.entries(STAGE):
        assert folder.damage(entry) is None
        payload = folder.load(entry)
        values = [set(tensor.tolist()) for tensor in payload["model_state_dict"].values()]
        assert all(len(value) == 1 for value in values)
        result[entry.kind] = (payload["resume"]["step"], *(value.pop() for value in values))
    return result


def test_what_is_written_is_the_state_of_one_step(parts: tuple[Saver, Folder, State, Grace]) -> None:
    """Steps go on while the file is written; the file has the tensors of the step in which it was staged."""
    saver, folder, state, _ = parts
    folder.open.clear()
    state.train(3)
    saver.save(state, ["last"])  # type: ignore[arg-type]
    state.train(5)
    assert not saver.save_if_due(state, math.inf)  # type: ignore[arg-type]
    folder.open.set()
    saver.drain()
    assert found(folder) == {"last": (3, 3.0, 3.0)}


def test_a_failed_volume_is_waited_out_in_order(
    parts: tuple[Saver, Folder, State, Grace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rolling state gives way to a newer one, an epoch's end does not; each file has its own state in the end."""
    monkeypatch.setattr(saver_module, "FIRST_RETRY_S", 0.05)
    caplog.set_level(logging.INFO)
    saver, folder, state, _ = parts
    folder.error = OSError(errno.ENOSPC, "No space left on device")
    state.train()
    saver.save(state, ["last"])  # type: ignore[arg-type]
    state.train()
    state.epochs = 1
    saver.save(state, ["last", "best"])  # type: ignore[arg-type]
    state.train()
    saver.save(state, ["last"])  # type: ignore[arg-type]
    state.train()
    state.epochs = 2
    saver.save(state, ["last", "epoch_2"])  # type: ignore[arg-type]
    assert found(folder) == {}
    folder.error = None
    saver.drain()
    assert found(folder) == {
        "best": (2, 2.0, 2.0),
        "epoch_2": (4, 4.0, 4.0),
        "last": (4, 4.0, 4.0),
        "last_previous": (2, 2.0, 2.0),
    }
    assert caplog.text.count("a checkpoint cannot be written: No space left on device") == 1
    assert caplog.text.count(".pt: the volume takes checkpoints again") == 1


def test_training_pauses_after_half_an_hour_without_a_save(
    parts: tuple[Saver, Folder, State, Grace], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the limit cut to nothing: the next step waits, says so, and goes on when a save has succeeded."""
    monkeypatch.setattr(saver_module, "PAUSE_AFTER_S", 0.0)
    monkeypatch.setattr(saver_module, "FIRST_RETRY_S", 0.05)
    caplog.set_level(logging.INFO)
    saver, folder, state, _ = parts
    folder.error = OSError(errno.EIO, "Input/output error")
    state.train()
    saver.save(state, ["last"])  # type: ignore[arg-type]
    time.sleep(0.2)
    repair = threading.Timer(0.5, lambda: setattr(folder, "error", None))
    repair.start()
    begin = time.monotonic()
    saver.save_if_due(state, math.inf)  # type: ignore[arg-type]
    assert time.monotonic() - begin > 0.3
    assert "training pauses: no checkpoint could be written for" in caplog.text
    assert "the volume takes checkpoints again; training goes on" in caplog.text


def test_a_stop_ends_a_pause(parts: tuple[Saver, Folder, State, Grace]) -> None:
    """SIGTERM while the end of a stage waits for the volume."""
    saver, folder, state, grace = parts
    folder.error = OSError(errno.EIO, "Input/output error")
    saver.save(state, ["last", "final"])  # type: ignore[arg-type]
    threading.Timer(0.2, lambda: setattr(grace, "left", 0.5)).start()
    with pytest.raises(Stopped):
        saver.drain()
    assert not saver.save_before_leaving(state)  # type: ignore[arg-type]


def test_with_time_left_the_newest_step_is_saved_before_leaving(parts: tuple[Saver, Folder, State, Grace]) -> None:
    """And without it what was staged before stands."""
    saver, folder, state, grace = parts
    state.train(2)
    saver.save(state, ["last"])  # type: ignore[arg-type]
    state.train()
    grace.left = 3.0
    assert saver.save_before_leaving(state)  # type: ignore[arg-type]
    assert found(folder)["last"][0] == 3
    state.train()
    grace.left = 1e-9
    assert not saver.save_before_leaving(state)  # type: ignore[arg-type]
    assert found(folder)["last"][0] == 3


def test_a_lost_lock_surfaces_in_the_training_thread(parts: tuple[Saver, Folder, State, Grace]) -> None:
    """At the next step, as the error that it is."""
    saver, folder, state, _ = parts
    folder.error = LockError("another process has the run")
    saver.save(state, ["last"])  # type: ignore[arg-type]
    with pytest.raises(LockError):
        saver.drain()


def test_the_interval_grows_until_saves_cost_no_more_than_they_may() -> None:
    """Blocked for 0.1 s, and steps of 1.0 s that take 1.25 s beside a write of 2 s: 0.5 s a save, 25 s at 2 %."""
    pace = Pace(100.0)
    config = CheckpointConfig(save_every_s=10.0, max_overhead=0.02)
    assert pace.interval_s(config) == 10.0
    pace.blocked(0.1, 200 << 20)
    for _ in range(7):
        pace.wrote(2.0, 200 << 20)
    pace.step(1.0, disturbed=False)
    pace.step(1.25, disturbed=True)
    assert pace.cost_s == pytest.approx(0.1 + 0.2 * 2.0)
    assert pace.interval_s(config) == pytest.approx(25.0)
    assert pace.overhead(config) == pytest.approx(0.02)
    assert pace.save_s == pytest.approx(2.1)
