"""Weights & Biases gets what TensorBoard gets, learns nothing about the machine, and cannot hold the run up."""

import json
import os
import socket
import struct
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb.proto.wandb_internal_pb2 import Record

from app.config import Config
from app.ops.event_files import EventReader, rewind
from app.ops.wandb_log import WandbLog, public_config
from app.ops.writers import RunLog, TensorBoardLog
from app.tags import axis, is_axis, keep_before
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
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


def points_of(path: Path) -> Points:
    """Scalars by tag, each at the position that its row gives for the tag's axis."""
    found: Points = defaultdict(list)
    for row in rows(path):
        for tag, content in row.items():
            if not is_axis(tag) and axis(tag) in row and isinstance(content, int | float):
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


def log_steps(log: RunLog, first: int, last: int) -> None:
    """Steps of one stage with epochs of ten."""
    for step in range(first, last + 1):
        log.scalars({"stage_16/train_loss_step": 1 / step, "stage_16/train_physics_step": 0.1}, step)
        log.scalar("perf/samples_per_s", 3.0, step)
        if step % 10 == 0:
            log.scalars({"stage_16/val_loss": 2 / step}, step // 10)
            log.image("stage_16/pictures/3fa2", np.full((8, 8, 3), step, np.uint8), step // 10)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run without a name."""
    return RunDir(tmp_path / "checkpoints")


def start(run: RunDir, mode: Any = "offline", config: Config | None = None) -> RunLog:
    """The log of one attempt."""
    return RunLog(TensorBoardLog(run.tensorboard, flush_s=0.5), [WandbLog(run, config or Config(), mode)])


def test_an_offline_run_holds_what_tensorboard_holds_after_a_resume(run: RunDir) -> None:
    """The second attempt's folder is complete, repeated steps stand in it once, and the first folder is gone."""
    log = start(run)
    log_steps(log, 1, 37)
    log.close()
    first = wandb_file(run)
    run_id = (run.wandb / "wandb_id").read_text()

    rewind(run.tensorboard, keep_before(["stage_16"], "stage_16", step=25, epochs=2, global_step=25))
    log = start(run)
    log_steps(log, 26, 40)
    log.close()

    path = wandb_file(run)
    assert path != first
    assert path.name == first.name == f"run-{run_id}.wandb"
    assert points_of(path) == tensorboard_points(run.tensorboard)
    assert [step for step, _ in points_of(path)["stage_16/train_loss_step"]] == list(range(1, 41))
    assert [step for step, _ in points_of(path)["stage_16/val_loss"]] == [1, 2, 3, 4]
    assert len(list((path.parent / "files" / "media" / "images").rglob("*.png"))) == 4
    metrics = {record.metric.name: record.metric.step_metric for record in records(path) if record.HasField("metric")}
    assert metrics["stage_16/train_loss_step"] == "stage_16/step"
    assert metrics["stage_16/val_loss"] == "stage_16/epoch"
    assert metrics["perf/samples_per_s"] == "global_step"


def test_an_offline_run_keeps_the_times_of_its_points(run: RunDir) -> None:
    """A point that is sent again after a resume keeps the time at which it was logged."""
    log = start(run)
    log_steps(log, 1, 3)
    log.close()
    times = {event.wall_time for event in EventReader(run.tensorboard).poll() if event.summary.value}
    assert {row["_timestamp"] for row in rows(wandb_file(run))} == times


def test_nothing_about_the_machine_or_a_secret_is_in_the_offline_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key, webhook, data folder, host, user and command line stay out of every file that wandb writes."""
    planted = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "NOTIFY_URL": "https://hooks.example.org/T0P53CR3T",
        "USER": "planted-user",
        "LOGNAME": "planted-user",
    }
    for name, text in planted.items():
        monkeypatch.setenv(name, text)
    config = Config.model_validate({"data": {"path": "/data/Doe^Jane"}, "run_name": "demo"})
    log = start(run, config=config)
    log_steps(log, 1, 10)
    log.close()
    forbidden = [*planted.values(), "Doe^Jane", socket.gethostname(), "pytest", "wandb_follow.py"]
    content = wandb_file(run).read_bytes()
    assert [text for text in forbidden if text.encode() in content] == []
    for path in run.wandb.rglob("*"):
        if path.is_file():
            # Its debug log names the run folder, which this test has below a folder of pytest's.
            secret = [text for text in forbidden[:-2] if text.encode() in path.read_bytes()]
            assert (path, secret) == (path, [])


def test_the_config_is_shown_without_paths(run: RunDir) -> None:
    """W&B has the resolved config; the path of the data is not part of it."""
    config = Config.model_validate({"data": {"path": "/data/Doe^Jane"}, "seed": 17})
    log = start(run, config=config)
    log_steps(log, 1, 1)
    log.close()
    updates = {
        item.key: json.loads(item.value_json)
        for record in records(wandb_file(run))
        if record.HasField("run")
        for item in record.run.config.update
    }
    del updates["_wandb"]
    assert updates == public_config(config)
    assert updates["seed"] == 17
    assert "path" not in updates["data"]


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_a_dead_network_costs_neither_steps_nor_the_end(
    run: RunDir, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Logging goes on at full speed, TensorBoard has all points, and the end waits no longer than its limit."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "never answers":
            listener.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        began = time.monotonic()
        log = start(run, "online")
        log_steps(log, 1, 40)
        assert time.monotonic() - began < 1
        time.sleep(3)
        began = time.monotonic()
        log.close(limit_s=0.5)
        assert time.monotonic() - began < 1.5
    assert [step for step, _ in tensorboard_points(run.tensorboard)["perf/samples_per_s"]] == list(range(1, 41))
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases did not finish within 0.5 s; the next attempt sends the rest"
    ]


def test_a_wandb_that_dies_is_reported_and_no_more(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """The process is killed in the middle; the run logs on and says at its end what happened."""
    follower = WandbLog(run, Config(), "offline")
    log = RunLog(TensorBoardLog(run.tensorboard), [follower])
    log_steps(log, 1, 5)
    os.kill(follower._process.pid, 9)
    log_steps(log, 6, 10)
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases ended early (exit -9); TensorBoard has all points"
    ]
    assert len(tensorboard_points(run.tensorboard)["perf/samples_per_s"]) == 10
