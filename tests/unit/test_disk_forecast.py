"""When the volume is full, by hand, and by what a run really leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import pytest

from app.config import CheckpointConfig, Config, StageConfig
from app.ops import disk_forecast
from app.ops.disk_forecast import HOUR_S, DiskForecast, files_to_come
from app.train.stage import train_stage
from app.workspace import RunDir
from tests.conftest import tiny_config
from tests.unit.test_stage import set_up

GIB = 2**30


class Usage(NamedTuple):
    """As of `shutil.disk_usage`."""

    free: float


class Volume:
    """A run's folder with sparse files, a clock, and a volume whose free space the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config, free_gib: float) -> None:
        self.folder, self.now, self.free_gib = folder, 0.0, free_gib
        monkeypatch.setattr(disk_forecast.shutil, "disk_usage", lambda path: Usage(self.free_gib * GIB))
        self.forecast = DiskForecast(RunDir(folder), config, lambda: self.now)

    def write(self, name: str, gib: float) -> None:
        """A checkpoint, which takes room."""
        with (self.folder / name).open("wb") as file:
            file.truncate(int(gib * GIB))
        self.free_gib -= gib


@pytest.mark.parametrize("keep", ["null", "1"])
def test_a_stage_adds_the_files_that_were_foretold(tmp_path: Path, keep: str) -> None:
    """Trained to its end: as many checkpoints as a fresh stage was said to add, and nothing is to come."""
    quick = (
        "stages.stage_8.epochs=2",
        "validation.pictures=0",
        "validation.sampled_cases=1",
        "validation.cases=1",
        "validation.noise_levels=1",
    )
    state, run, _ = set_up(tmp_path, f"checkpoint.keep_last_n_checkpoints={keep}", *quick)
    stage, config = state.stage, state.config.checkpoint
    foretold = files_to_come(stage, config, [])
    train_stage(state, run)
    kinds = [kind for _, kind, _ in RunDir(tmp_path).checkpoints()]
    assert (len(kinds), files_to_come(stage, config, kinds)) == (foretold, 0)


@pytest.mark.parametrize(
    ("keep", "kinds", "to_come"),
    [
        (None, [], 40 + 4),
        (None, ["last", "last_previous", "best", "epoch_5", "epoch_10"], 38 + 1),
        (None, ["last", "epoch_150"], 10 + 3),
        (3, ["last", "last_previous", "best", "epoch_5"], 2 + 1),
        (3, ["last", "last_previous", "best", "epoch_90", "epoch_95", "epoch_100"], 0 + 1),
        (None, ["best", "final"], 0),
    ],
    ids=["fresh", "under way", "some deleted by hand", "few kept", "all kept", "taken over"],
)
def test_the_files_to_come_by_hand(keep: int | None, kinds: list[str], to_come: int) -> None:
    """200 epochs, a periodic file each 5, and best, final, last and last_previous."""
    stage = StageConfig(resolution=64, epochs=200)
    assert files_to_come(stage, CheckpointConfig(keep_last_n_checkpoints=keep), kinds) == to_come


def test_the_hours_are_room_over_pace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By hand: 7 + 6 + 6 files of 1 GiB, two of them there, in 10 h, and others write 0.5 GiB/h: 26 GiB last for
    (26 - 0.2) / (1.7 + 0.5) h, which is longer than the run, and nobody is warned."""
    volume = Volume(monkeypatch, tmp_path, tiny_config(), 29.0)
    volume.write("stage_8_last.pt", 1.0)
    volume.forecast.read(None)
    volume.now, volume.free_gib = 2 * HOUR_S, 27.0
    volume.write("stage_8_best.pt", 1.0)
    figures = volume.forecast.read(10 * HOUR_S)
    assert figures["disk_free_gib"] == 26.0
    assert figures["disk_needed_gib"] == pytest.approx(7 + 6 + 6 - 2)
    assert figures["disk_full_in_h"] == pytest.approx((26 - 0.2) / (1.7 + 0.5))


@pytest.mark.parametrize(
    ("free_gib", "others_gib_per_h", "warned"), [(40.0, 0.0, False), (15.0, 0.0, True), (40.0, 3.0, True)]
)
def test_a_volume_that_is_full_before_the_end_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    free_gib: float,
    others_gib_per_h: float,
    warned: bool,
) -> None:
    """Because the checkpoints do not fit, or because others fill the volume meanwhile; 18 GiB are needed in 10 h."""
    volume = Volume(monkeypatch, tmp_path, tiny_config(), free_gib + 1)
    volume.write("stage_8_last.pt", 1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            volume.forecast.read(10 * HOUR_S)
            volume.now += HOUR_S
            volume.free_gib -= others_gib_per_h
    assert len(caplog.records) == warned
    if warned:
        assert "the volume will be full in about" in caplog.text
        assert "checkpoint.keep_last_n_checkpoints" in caplog.text


def test_a_folder_is_read_once_a_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may lie on a network volume."""
    volume = Volume(monkeypatch, tmp_path, tiny_config(), 5.0)
    found = []
    for volume.now in (0.0, 10.0, 59.0, 61.0, 70.0):
        found.append(bool(volume.forecast.read(None)))
    assert found == [True, False, False, True, False]
