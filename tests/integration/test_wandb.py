"""Weights & Biases gets what TensorBoard gets, learns nothing about the machine, and cannot hold the run up."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from app.config import Config
from app.config_file import config_as_dict
from app.ops.event_files import EventReader, rewind
from app.ops.provenance import provenance
from app.ops.wandb_log import WandbLog, at_end_s
from app.ops.writers import RunLog, TensorBoardLog
from app.tags import (
    ALARM,
    CHECKPOINT_TAGS,
    DATA_WAIT,
    GOODPUT,
    GPU_FIGURES,
    HOST_FIGURES,
    INTERRUPTIONS,
    MFU,
    PHYSICS_WEIGHT,
    SAMPLES_PER_S,
    STEP_TIME,
    TFLOP_PER_S,
    VAL_GAIN,
    VAL_PSNR,
    VAL_XRAY_USE,
    axis,
    keep_before,
    names,
)
from app.workspace import RunDir
from tests.wandb_files import (
    Points,
    config_of,
    points_of,
    records,
    rows,
    start_log,
    summary_of,
    tensorboard_points,
    wandb_file,
)
from tests.wandb_server import KEY, Server, serving

STAGES = ("stage_64", "stage_128", "stage_256")
PERF = (STEP_TIME, SAMPLES_PER_S, DATA_WAIT, TFLOP_PER_S, MFU)
CARDS = ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA H100 80GB HBM3 x 2")


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


def test_an_offline_run_holds_what_tensorboard_holds_after_a_resume(run: RunDir) -> None:
    """The second attempt's folder is complete, repeated steps stand in it once, and the first folder is gone."""
    config = Config.model_validate({"wandb": {"images": True}})
    log = start_log(run, config=config)
    log_steps(log, 1, 37)
    log.close()
    first = wandb_file(run)
    run_id = (run.wandb / "wandb_id").read_text()

    rewind(run.tensorboard, keep_before(["stage_16"], "stage_16", step=25, epochs=2, global_step=25))
    log = start_log(run, config=config)
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
    log = start_log(run)
    log_steps(log, 1, 3)
    log.close()
    times = {event.wall_time for event in EventReader(run.tensorboard).poll() if event.summary.value}
    assert {row["_timestamp"] for row in rows(wandb_file(run))} == times


def test_nothing_about_the_machine_or_a_secret_is_in_the_offline_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key, webhook, data folder, host, user and command line stay out of every file that wandb writes."""
    planted = {
        "WANDB_API_KEY": KEY,
        "NOTIFY_URL": "https://hooks.example.org/T0P53CR3T",
        "USER": "planted-user",
        "LOGNAME": "planted-user",
    }
    for name, text in planted.items():
        monkeypatch.setenv(name, text)
    config = Config.model_validate({"data": {"path": "/data/Doe^Jane"}, "run_name": "demo"})
    log = start_log(run, config=config)
    log_steps(log, 1, 10)
    log.close()
    # Two letters of a short host name stand in any compressed picture: such a name is looked for in quotes.
    host = socket.gethostname()
    forbidden = [*planted.values(), "Doe^Jane", host if len(host) > 5 else f'"{host}"', "pytest", "wandb_follow.py"]
    content = wandb_file(run).read_bytes()
    assert [text for text in forbidden if text.encode() in content] == []
    for path in run.wandb.rglob("*"):
        if path.is_file():
            # Its debug log names the run folder, which this test has below a folder of pytest's.
            secret = [text for text in forbidden[:-2] if text.encode() in path.read_bytes()]
            assert (path, secret) == (path, [])


def test_the_config_is_shown_without_paths(run: RunDir) -> None:
    """W&B has the resolved config and what the run is made with; the path of the data is not part of it."""
    config = Config.model_validate({"data": {"path": "/data/Doe^Jane"}, "seed": 17})
    log = start_log(run, config=config)
    log_steps(log, 1, 1)
    log.close()
    found = config_of(wandb_file(run))
    assert found.pop("provenance") == provenance("cpu")
    assert found == config_as_dict(config.without_paths())
    assert found["seed"] == 17
    assert found["data"]["path"] is None


def log_everything(log: RunLog, first_epoch: int) -> None:
    """Two epochs of one step of each stage, with a value for every tag that a run on a GPU has."""
    machine = [f"gpu/0/{name}" for name in GPU_FIGURES] + [f"host/{name}" for name in HOST_FIGURES]
    for number in (first_epoch, first_epoch + 1):
        log.scalars(dict.fromkeys([*PERF, *machine, *CHECKPOINT_TAGS, GOODPUT, INTERRUPTIONS], 0.5), number)
        for stage in STAGES:
            sampled = [f"{stage}/{name}" for name in (PHYSICS_WEIGHT, VAL_PSNR, VAL_GAIN, VAL_XRAY_USE)]
            log.scalars(dict.fromkeys([*names(stage), *sampled], 1.0 + number), number)
            log.text(f"{stage}/{ALARM}", "an alarm", number)
            log.image(f"{stage}/held_out_1", np.zeros((8, 8, 3), np.uint8), number)


def test_three_attempts_are_one_record_with_everything_and_nothing_else(run: RunDir) -> None:
    """One id, all tags at their steps, the last attempt's config and GPU; no record of console, code or machine, and
    none of the pictures, which nobody asked for."""
    ids = set()
    for attempt in range(3):
        config = Config.model_validate({"logging": {"log_every_n_steps": 1 + attempt}})
        log = start_log(run, config=config, device=CARDS[attempt])
        log_everything(log, 1 + 2 * attempt)
        log.close()
        ids.add(wandb_file(run).stem.removeprefix("run-"))
    path = wandb_file(run)
    kinds = {record.WhichOneof("record_type") for record in records(path)}
    assert kinds == {"header", "run", "telemetry", "metric", "history", "summary", "exit"}
    points = points_of(path)
    assert points == tensorboard_points(run.tensorboard)
    assert {tag for stage in STAGES for tag in names(stage)} < set(points)
    assert {len(found) for found in points.values()} == {6}
    shown = config_of(path)
    assert shown["logging"]["log_every_n_steps"] == 3
    assert shown["provenance"]["device"] == CARDS[2]
    summary = summary_of(path)
    assert {summary[f"{stage}/best_val_loss"] for stage in STAGES} == {2.0}
    assert {summary[f"{stage}/best_val_psnr_db"] for stage in STAGES} == {7.0}
    (record,) = [record.run for record in records(path) if record.HasField("run")]
    assert ids == {record.run_id}
    assert record.project == "hybrid-vit-cascade"
    assert (record.host, record.git.commit, record.git.remote_url, list(record.tags)) == ("", "", "", [])
    assert list((path.parent / "files").iterdir()) == []


def log_epochs(log: RunLog, first: int, val_losses: Sequence[float]) -> None:
    """Validations of one stage; PSNR is worst where the loss is best."""
    for epoch, val_loss in enumerate(val_losses, start=first):
        log.scalars({"stage_16/val_loss": val_loss, "stage_16/val_psnr_db": 20 + val_loss}, epoch)


BEST = {"stage_16/best_val_loss": 1.0, "stage_16/best_val_psnr_db": 25.0}


def test_the_best_of_all_attempts_stands_in_an_offline_summary(run: RunDir) -> None:
    """Later attempts are worse and the untrained network's figures are better than all: neither counts."""
    for first, val_losses in ((0, [0.5, 5.0, 1.0]), (3, [2.0]), (4, [4.0, 3.0])):
        log = start_log(run)
        log_epochs(log, first, val_losses)
        log.close()
    summary = summary_of(wandb_file(run))
    assert {name: summary[name] for name in BEST} == BEST
    assert summary["stage_16/val_loss"] == 3.0


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server to which the environment points."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def test_an_online_run_goes_on_where_the_server_stands(run: RunDir, online: Server) -> None:
    """Steps that are repeated are not sent again: each point is there once, save those of the last position, which the
    server may have got in part."""
    log = start_log(run, "online")
    log_steps(log, 1, 37)
    log.close()
    assert online.summary["stage_16/step"] == 37

    rewind(run.tensorboard, keep_before(["stage_16"], "stage_16", step=25, epochs=2, global_step=25))
    log = start_log(run, "online")
    log_steps(log, 26, 45)
    log.close()

    assert [row["_step"] for row in online.history] == list(range(len(online.history)))
    found: Points = defaultdict(list)
    for row in online.history:
        for tag in ("stage_16/train_loss_step", "perf/samples_per_s", "stage_16/val_loss"):
            if tag in row:
                found[tag].append((row[axis(tag)], float(row[tag])))
    expected = tensorboard_points(run.tensorboard)
    for tag, last in (("stage_16/train_loss_step", 37), ("perf/samples_per_s", 37), ("stage_16/val_loss", 3)):
        again = [point for point in expected[tag] if point[0] == last]
        assert sorted(found[tag]) == sorted(expected[tag] + again)


def test_the_best_of_all_attempts_stands_at_the_server(run: RunDir, online: Server) -> None:
    """Though the later attempts send worse points only."""
    for first, val_losses in ((0, [0.5, 5.0, 1.0]), (3, [2.0]), (4, [4.0, 3.0])):
        log = start_log(run, "online")
        log_epochs(log, first, val_losses)
        log.close()
        assert {name: online.summary[name] for name in BEST} == BEST
    assert online.summary["stage_16/val_loss"] == 3.0


def test_the_server_has_the_config_of_the_last_attempt(run: RunDir, online: Server) -> None:
    """What may change on resume does: another card, another cadence."""
    for attempt, card in enumerate(CARDS):
        log = start_log(run, "online", Config.model_validate({"logging": {"log_every_n_steps": 1 + attempt}}), card)
        log_steps(log, 1 + attempt, 1 + attempt)
        log.close()
        assert online.config["provenance"]["value"] == provenance(card)
        assert online.config["logging"]["value"]["log_every_n_steps"] == 1 + attempt


def test_nothing_about_the_machine_is_sent(run: RunDir, online: Server) -> None:
    """No request to the server names the host, a path, the command or the key."""
    log = start_log(run, "online", Config.model_validate({"data": {"path": "/data/Doe^Jane"}}))
    log_steps(log, 1, 10)
    log.close()
    sent = b"\n".join(online.requests)
    assert b"stage_16/val_loss" in sent
    forbidden = ["Doe^Jane", socket.gethostname(), str(run.path), "pytest", "wandb_follow", KEY]
    assert [text for text in forbidden if text.encode() in sent] == []


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
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        log = start_log(run, "online")
        log_steps(log, 1, 40)
        assert time.monotonic() - began < 1
        time.sleep(1.5)
        began = time.monotonic()
        log.close(limit_s=0.5)
        assert time.monotonic() - began < 1.5
    assert [step for step, _ in tensorboard_points(run.tensorboard)["perf/samples_per_s"]] == list(range(1, 41))
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases did not finish within 0.5 s; the next attempt sends the rest"
    ]


IMPATIENT = "import app.ops.wandb_follow as w; w.INIT_TIMEOUT_S, w.RETRY_S, w.POLL_S = 1.0, 0.5, 0.5; w.run_from_pipe()"


def test_points_from_before_the_network_came_are_sent_later(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tries find nobody; when the server appears it gets everything, in order, and the log has one line."""
    log = RunLog(TensorBoardLog(run.tensorboard))
    log_steps(log, 1, 10)
    log.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    job = {"root": str(run.path), "tensorboard": str(run.tensorboard), "run_id": "0a1b2c3d", "run_name": None}
    job |= {"project": "p", "entity": None, "mode": "online", "config": {}, "epochs": {}}
    job |= {"images": False, "checkpoints": False}
    command = [sys.executable, "-c", IMPATIENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert "Weights & Biases cannot be reached, trying again every" in process.stderr.readline()
        with serving(port) as server:
            deadline = time.monotonic() + 20
            while not any(b"UpsertBucket" in request for request in server.requests) and time.monotonic() < deadline:
                time.sleep(0.1)
            process.stdin.close()
            assert process.wait(20) == 0
        assert process.stderr.read() == ""
    steps = [row["stage_16/step"] for row in server.history if "stage_16/train_loss_step" in row]
    assert steps == list(range(1, 11))


def test_a_worker_that_holds_the_pipe_does_not_delay_the_end(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """Forked workers inherit the trainer's end of the pipe and may outlive the log."""
    follower = WandbLog(run, Config(), "offline", "cpu")
    copy = os.dup(follower._pipe.fileno())
    log = RunLog(TensorBoardLog(run.tensorboard), [follower])
    log_steps(log, 1, 3)
    log.close()
    os.close(copy)
    assert not caplog.records
    assert points_of(wandb_file(run)) == tensorboard_points(run.tensorboard)


def test_a_wandb_that_dies_is_reported_and_no_more(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """The process is killed in the middle; the run logs on and says at its end what happened."""
    follower = WandbLog(run, Config(), "offline", "cpu")
    log = RunLog(TensorBoardLog(run.tensorboard), [follower])
    log_steps(log, 1, 5)
    os.kill(follower._process.pid, 9)
    log_steps(log, 6, 10)
    log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases ended early (exit -9); TensorBoard has all points"
    ]
    assert len(tensorboard_points(run.tensorboard)["perf/samples_per_s"]) == 10


def test_a_finished_run_waits_longer_for_checkpoints_but_not_until_it_counts_as_hung() -> None:
    """A minute for curves, ten for files, and less where the watchdog would end the trainer before."""
    assert at_end_s(Config()) == 60
    for hang_after_s, expected in ((900, 600), (300, 200)):
        sections = {"wandb": {"checkpoints": True}, "compute": {"hang_after_s": hang_after_s}}
        assert at_end_s(Config.model_validate(sections)) == expected
