"""`progress.png` shows the whole run, also after a resume, and is never half written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.ops.event_files import rewind
from app.ops.progress import CHARTS, ProgressPicture
from app.ops.writers import TensorBoardLog

STAGES = ("stage_16", "stage_32", "stage_64")
MAGENTA = (255, 0, 255)


def log_epochs(folder: Path, stage: str, epochs: range, scale: float = 1.0) -> None:
    """One attempt that logs some epochs of one stage."""
    log = TensorBoardLog(folder)
    for epoch in epochs:
        log.scalars({f"{stage}/{tag}": scale / epoch for chart in CHARTS for tag, _ in chart.lines}, epoch)
    log.close()


def written(path: Path, tensorboard: Path) -> np.ndarray:
    """The picture by a process that has just started."""
    ProgressPicture(path, tensorboard, STAGES).write("stage_32, epoch 3 of 10", 4000.0)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are compared carry the same time."""
    monkeypatch.setattr("app.ops.progress._now", lambda: "2026-01-31 23:59 UTC")


def test_a_picture_before_the_first_point(tmp_path: Path) -> None:
    """A run of no epochs has a picture as well."""
    assert written(tmp_path / "progress.png", tmp_path / "tensorboard").shape == (810, 1440, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.png"]


def test_the_picture_after_a_resume_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Two attempts, points of the first taken back, give the same pixels as one attempt."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        log_epochs(folder, "stage_16", range(1, 6))
    log_epochs(whole, "stage_32", range(1, 6))
    log_epochs(broken, "stage_32", range(1, 4))
    rewind(broken, lambda tag, epoch: not tag.startswith("stage_32") or epoch <= 2)
    log_epochs(broken, "stage_32", range(3, 6))
    pictures = [written(folder / "progress.png", folder) for folder in (whole, broken)]
    np.testing.assert_array_equal(*pictures)


def test_a_later_call_adds_what_was_logged_since(tmp_path: Path) -> None:
    """A picture that grew is that of a process which read everything at once, new points and slices included."""
    folder, path = tmp_path / "tensorboard", tmp_path / "progress.png"
    log_epochs(folder, "stage_16", range(1, 4))
    progress = ProgressPicture(path, folder, STAGES)
    progress.write("stage_32, epoch 3 of 10", 4000.0)
    before = np.asarray(Image.open(path).convert("RGB"))
    log = TensorBoardLog(folder)
    log.image("stage_16/pictures/3fa2", np.full((40, 30, 3), MAGENTA, np.uint8), 4)
    log.close()
    log_epochs(folder, "stage_16", range(4, 6))
    progress.write("stage_32, epoch 3 of 10", 4000.0)
    after = np.asarray(Image.open(path).convert("RGB"))
    assert not np.array_equal(before, after)
    assert (after == MAGENTA).all(axis=2).sum() > 10_000
    np.testing.assert_array_equal(after, written(tmp_path / "again.png", folder))


@pytest.mark.parametrize(("epoch_s", "count"), [(1.0, 4), (60.0, 200)])
def test_pictures_take_a_hundredth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch_s: float, count: int
) -> None:
    """200 epochs and pictures of half a second: one in fifty of short epochs has one, each that takes a minute."""
    clock, drawn = [0.0], []

    def draw(*_: object) -> None:
        drawn.append(clock[0])
        clock[0] += 0.5

    progress = ProgressPicture(tmp_path / "progress.png", tmp_path, STAGES, clock=lambda: clock[0])
    monkeypatch.setattr(progress, "write", draw)
    for _ in range(200):
        clock[0] += epoch_s
        progress.write_sometimes("stage_32, epoch 3 of 10", None)
    assert len(drawn) == count


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
def test_values_without_a_logarithm_do_not_stop_the_run(tmp_path: Path, value: float) -> None:
    """Physics may be zero while it is masked; the chart is drawn without a warning."""
    log = TensorBoardLog(tmp_path)
    log.scalars({"stage_16/val_physics": value, "stage_16/train_physics": value}, 1)
    log.close()
    assert written(tmp_path / "progress.png", tmp_path).size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "time left: unknown"),
        (20, "time left: 0 min"),
        (4000, "time left: 1 h 07 min"),
        (360_000, "time left: 100 h 00 min"),
    ],
)
def test_time_left(seconds: float | None, text: str) -> None:
    """Hours and minutes, as people say them."""
    from app.ops.progress import _eta

    assert _eta(seconds) == text
