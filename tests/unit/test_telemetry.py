"""What a run logs of its machine: real training, the real pynvml above a library that stands in for the driver's."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
import torch
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from app.config import Config
from app.ops.disk_forecast import DiskForecast
from app.ops.gpu_alarms import IdleAlarm
from app.ops.host import Host
from app.ops.layout import layout
from app.ops.nvml import Gpus
from app.ops.telemetry import Telemetry
from app.tags import GLOBAL_AXIS, axis
from app.train.stage import train_stage
from app.workspace import RunDir
from tests.conftest import tiny_config
from tests.nvml_library import GIB, Card, Library, install
from tests.unit.test_stage import set_up

SETTINGS = (
    "logging.log_every_n_steps=5",
    "logging.telemetry_every_s=0.02",
    "stages.stage_8.epochs=2",
    "validation.pictures=0",
    "validation.sampled_cases=1",
    "validation.cases=1",
    "validation.noise_levels=1",
)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RecordingForecast(DiskForecast):
    """Keeps what it is told of the run's end."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        super().__init__(run_dir, config)
        self.told: list[float | None] = []

    def read(self, run_takes_s: float | None) -> dict[str, float]:
        self.told.append(run_takes_s)
        return super().read(run_takes_s)


def telemetry_of(folder: Path, clock: Clock, total_steps: int = 100) -> tuple[Telemetry, RecordingForecast]:
    """Without its thread: the test reads."""
    forecast = RecordingForecast(RunDir(folder), tiny_config())
    telemetry = Telemetry(
        Gpus(None, True, clock), Host(clock=clock), forecast, IdleAlarm(1, 0), total_steps, 10.0, clock
    )
    return telemetry, forecast


def wait_for(library: Library) -> None:
    """Until the thread has asked for everything once."""
    deadline = time.monotonic() + 10
    while library.reads == 0:
        assert time.monotonic() < deadline, "nothing was read"
        time.sleep(0.005)


def test_a_run_logs_its_gpus_and_trains_as_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Points stand at logged steps over all stages, the training thread calls nothing of NVML, and no weight differs by
    a bit."""
    library = Library(Card("GPU-3fa2"), Card("GPU-9c1d", milliwatts=300_000))
    install(monkeypatch, library)
    (tmp_path / "plain").mkdir()
    (tmp_path / "watched").mkdir()
    plain, run, _ = set_up(tmp_path / "plain", *SETTINGS)
    train_stage(plain, run)

    watched, run, recorder = set_up(tmp_path / "watched", *SETTINGS)
    telemetry = Telemetry.of_run(watched.config, run.checkpoints.run_dir, trains_on=2)
    wait_for(library)
    train_stage(watched, replace(run, telemetry=telemetry))
    telemetry.close()

    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))
    assert library.threads == {"telemetry"}
    assert recorder.steps("gpu/0/power_w")[0] == 101
    assert set(recorder.steps("gpu/1/power_w")) <= {101, 105}
    assert {value for tag, _, value in recorder.points if tag == "gpu/1/power_w"} == {300.0}
    machine = {tag for tag, _, _ in recorder.points if tag.startswith(("gpu/", "host/", "perf/"))}
    assert {"gpu/0/utilization_percent", "host/disk_free_gib", "perf/tflop_per_s"} <= machine
    assert {axis(tag) for tag in machine} == {GLOBAL_AXIS}


def test_a_point_is_the_mean_or_the_worst_since_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three readings: means of load and power, the highest temperature and memory, a third of them throttled."""
    card, clock = Card("GPU-3fa2"), Clock()
    install(monkeypatch, Library(card))
    telemetry, _ = telemetry_of(tmp_path, clock)
    hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown
    for values in ((90, 500_000, 60, 10, 0), (60, 600_000, 84, 30, hot), (0, 100_000, 70, 20, 0)):
        card.gpu_percent, card.milliwatts, card.celsius, used, card.reasons = values
        card.used, card.uncorrected = used * GIB, card.uncorrected + 1
        telemetry.read()
        clock.now += 10
    found = {tag: value for tag, value in telemetry.scalars().items() if tag.startswith("gpu/")}
    assert found == {
        "gpu/0/utilization_percent": 50.0,
        "gpu/0/power_w": 400.0,
        "gpu/0/temperature_c": 84.0,
        "gpu/0/memory_gib": 30.0,
        "gpu/0/throttled": pytest.approx(1 / 3),
        "gpu/0/uncorrected_errors": 3.0,
    }
    assert telemetry.scalars() == {}


def test_a_gpu_that_is_lost_ends_its_curves_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The host's curves go on, and so do warnings of nothing but the loss."""
    card, clock = Card("GPU-3fa2"), Clock()
    install(monkeypatch, Library(card))
    telemetry, _ = telemetry_of(tmp_path, clock)
    telemetry.read()
    assert "gpu/0/power_w" in telemetry.scalars()
    card.every = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(30):
        clock.now += 10
        telemetry.read()
    groups = {tag.partition("/")[0] for tag in telemetry.scalars()}
    assert groups == {"host"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_end_of_the_run_is_estimated_from_its_pace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """10 s a step with all that stands between them: 100 steps from step 40 on are 600 s; unknown before two steps."""
    install(monkeypatch, None)
    clock = Clock()
    telemetry, forecast = telemetry_of(tmp_path, clock, total_steps=100)
    for step in (20, 30, 40):
        telemetry.read()
        telemetry.step(step, 1.0, 0.5)
        clock.now += 100
    telemetry.read()
    assert forecast.told == [None, None, 700.0, 600.0]


def test_a_reading_that_hangs_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NVML may wait for a lost card for ever: training logs on, and leaves without waiting for it."""
    library, clock, hangs = Library(Card("GPU-3fa2")), Clock(), threading.Event()
    install(monkeypatch, library)
    telemetry, _ = telemetry_of(tmp_path, clock)
    monkeypatch.setattr(Host, "read", lambda host: {"hung": float(hangs.wait(20))})
    telemetry.start()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += 100
            assert telemetry.scalars() == {}
    telemetry.close()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "telemetry"]
    hangs.set()
    # It leaves NVML, which must not be the next test's.
    thread.join()
    assert [record.getMessage() for record in caplog.records] == [
        "GPUs and machine were not read for 200 s: NVML or a volume does not answer"
    ]


def test_the_charts_of_the_machine_find_its_tags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every line of the page's last group matches a tag that is really logged; MFU needs a card that is known."""
    install(monkeypatch, Library(Card("GPU-3fa2")))
    (tmp_path / "stage_8_last.pt").write_bytes(b"state")
    clock = Clock()
    telemetry, _ = telemetry_of(tmp_path, clock)
    telemetry.read()
    time.sleep(0.05)
    telemetry.read()
    tags = {*telemetry.scalars(), "perf/data_wait", "perf/mfu"}
    group = Layout.FromString(layout(["stage_8"])).category[-1]
    lines = [line for chart in group.chart for line in chart.multiline.tag]
    assert lines
    assert [line for line in lines if not any(re.match(line, tag) for tag in tags)] == []
