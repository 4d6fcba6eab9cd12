"""What is logged can be read by TensorBoard itself, soon, in order, and whatever the clock or the disk do."""

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from app.errors import LockError, MachineError
from app.ops.event_files import EventReader
from app.ops.layout import layout
from app.ops.writers import LAYOUT_TAG, RunLog, TensorBoardLog
from app.tags import COST, COST_AT_END, PHYSICS_WEIGHT, VAL_GAIN, VAL_PROJECTION_ERROR, VAL_PSNR, VAL_XRAY_USE, names

STAGES = ("stage_16", "stage_32", "stage_64")


def read(folder: Path) -> EventAccumulator:
    """TensorBoard's own view of a folder, without thinning out."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_scalars_come_back_from_tensorboard(tmp_path: Path) -> None:
    """Tag, step and value, to the accuracy of 32 bits; one by one or together."""
    log = RunLog(TensorBoardLog(tmp_path))
    log.scalar("stage_16/train_loss_step", 0.1, 1)
    log.scalars({"stage_16/val_loss": 1e30, "stage_16/val_physics": float("inf")}, 7)
    log.close()
    found = read(tmp_path)
    points = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert points == {
        "stage_16/train_loss_step": [(1, np.float32(0.1))],
        "stage_16/val_loss": [(7, np.float32(1e30))],
        "stage_16/val_physics": [(7, np.inf)],
    }


def test_a_picture_comes_back_pixel_by_pixel(tmp_path: Path) -> None:
    """Images are lossless."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    log = RunLog(TensorBoardLog(tmp_path))
    log.image("stage_16/pictures/3fa2", picture, 3)
    log.close()
    (event,) = read(tmp_path).Images("stage_16/pictures/3fa2")
    assert (event.step, event.width, event.height) == (3, 30, 20)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)


def test_a_text_comes_back(tmp_path: Path) -> None:
    """Texts reach the Text page."""
    log = RunLog(TensorBoardLog(tmp_path))
    log.text("config", "    seed: 0\n    note: \u00b5", 0)
    log.close()
    found = read(tmp_path)
    assert found.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (event,) = found.Tensors("config")
    assert event.tensor_proto.string_val[0].decode() == "    seed: 0\n    note: \u00b5"


def test_the_layout_comes_back_and_its_expressions_match_our_tags(tmp_path: Path) -> None:
    """Every line of every chart finds a tag that is logged, and the stage comparison finds one in each stage."""
    log = RunLog(TensorBoardLog(tmp_path))
    log.layout(layout(STAGES))
    log.close()
    (event,) = read(tmp_path).Tensors(LAYOUT_TAG)
    parsed = Layout.FromString(event.tensor_proto.string_val[0])
    more = (PHYSICS_WEIGHT, VAL_PSNR, VAL_GAIN, VAL_XRAY_USE, VAL_PROJECTION_ERROR)
    tags = [tag for stage in STAGES for tag in (*names(stage), *(f"{stage}/{tag}" for tag in more))]
    tags += [COST, COST_AT_END]

    def matches(title: str, chart: int) -> list[str]:
        (category,) = [category for category in parsed.category if category.title == title]
        return [tag for line in category.chart[chart].multiline.tag for tag in tags if re.match(line, tag)]

    # Those of the machine are matched with what is read of one, in test_telemetry.py.
    assert all(
        any(re.match(line, tag) for tag in tags)
        for category in parsed.category[:-1]
        for chart in category.chart
        for line in chart.multiline.tag
    )
    assert matches("Stage comparison", 0) == [f"{stage}/val_loss" for stage in STAGES]
    assert matches("Stage comparison", 1) == [f"{stage}/train_loss" for stage in STAGES]
    assert matches("Training vs validation", 1) == ["stage_32/train_loss", "stage_32/val_loss"]
    assert matches("Diffusion vs physics", 4) == ["stage_64/train_diffusion", "stage_64/train_physics"]
    assert matches("Diffusion vs physics", 5) == ["stage_64/val_diffusion", "stage_64/val_physics"]
    assert matches("Schedule and speed", 0) == [f"{stage}/learning_rate" for stage in STAGES]
    assert matches("Schedule and speed", 2) == [f"{stage}/epoch_time" for stage in STAGES]
    assert matches("Schedule and speed", 3) == [COST, COST_AT_END]


def test_points_reach_the_file_by_time_alone(tmp_path: Path) -> None:
    """Nobody calls flush in a long epoch, and a kill gives no notice."""
    log = TensorBoardLog(tmp_path, flush_s=0.05)
    log.scalars({"a": 1.0}, 1)
    deadline = time.monotonic() + 5
    steps: list[int] = []
    reader = EventReader(tmp_path)
    while not steps and time.monotonic() < deadline:
        steps = [event.step for event in reader.poll() if event.summary.value]
        time.sleep(0.01)
    log.close()
    assert steps == [1]


def test_flush_is_immediate(tmp_path: Path) -> None:
    """What was logged before a checkpoint is in the file when the checkpoint is committed."""
    log = RunLog(TensorBoardLog(tmp_path, flush_s=60))
    log.scalar("a", 1.0, 1)
    log.flush()
    assert [event.step for event in EventReader(tmp_path).poll() if event.summary.value] == [1]
    log.close()


def test_time_never_goes_back(tmp_path: Path) -> None:
    """The second attempt's clock is an hour behind: its file and its events still come last."""
    for start, step in ((1_700_000_000.0, 1), (1_699_996_400.0, 2)):
        log = TensorBoardLog(tmp_path, clock=lambda start=start: start)
        log.scalars({"a": 1.0}, step)
        log.close()
    events = list(EventReader(tmp_path).poll())
    assert [event.wall_time for event in events] == sorted(event.wall_time for event in events)
    assert [event.step for event in events if event.summary.value] == [1, 2]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "events.out.tfevents.1700000000.1",
        "events.out.tfevents.1700000001.2",
    ]
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2


def test_a_scalar_costs_less_than_50_microseconds(tmp_path: Path) -> None:
    """Logging may not show in the time of a step."""
    log = RunLog(TensorBoardLog(tmp_path))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for step in range(200):
            log.scalar("stage_16/train_loss_step", 0.5, step)
        best = min(best, (time.perf_counter() - start) / 200)
    log.close()
    assert best < 50e-6


def test_points_wait_in_memory_while_the_disk_is_full_and_leave_no_hole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logging goes on, a flush fails, it is said once; what the disk took in part is completed when there is room."""
    log = TensorBoardLog(tmp_path, flush_s=60)
    real = log._file

    class Full:
        """A file that takes ten bytes and then no more."""

        closed = False
        room = 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = real.write(data[: self.room])
            self.room -= taken
            return taken

        def fileno(self) -> int:
            return real.fileno()

    log._file = Full()  # type: ignore[assignment]
    log.scalars({"a": 1.0}, 1)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left on device"):
            log.flush()
        log.scalars({"a": 1.0}, step)
    assert caplog.text.count(f"{log.path} takes no more points (No space left on device): they wait in memory") == 1
    log._file = real
    log.flush()
    log.scalars({"a": 1.0}, 4)
    log.close()
    assert [event.step for event in EventReader(tmp_path).poll() if event.summary.value] == [1, 2, 3, 4]


def test_a_fence_keeps_a_process_that_lost_the_run_from_logging(tmp_path: Path) -> None:
    """Its points never reach the file."""
    ours = True

    def fence() -> None:
        if not ours:
            raise LockError("the run is another's")

    log = TensorBoardLog(tmp_path, flush_s=60, fence=fence)
    log.scalars({"a": 1.0}, 1)
    log.flush()
    ours = False
    log.scalars({"a": 1.0}, 2)
    with pytest.raises(LockError):
        log.flush()
    with pytest.raises(LockError):
        log.close()
    assert [event.step for event in EventReader(tmp_path).poll() if event.summary.value] == [1]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    """A file lies where the folder should be."""
    (tmp_path / "tensorboard").touch()
    with pytest.raises(MachineError, match=rf"cannot write the event file {tmp_path}/tensorboard: File exists"):
        TensorBoardLog(tmp_path / "tensorboard")


def test_followers_are_closed_after_the_last_point_is_written(tmp_path: Path) -> None:
    """A follower that reads the files at its end sees everything, and gets what is left of the limit."""

    class Reader:
        steps: tuple[int, ...] = ()
        limit_s = 0.0

        def close(self, limit_s: float) -> None:
            self.steps = tuple(event.step for event in EventReader(tmp_path).poll() if event.summary.value)
            self.limit_s = limit_s

    follower = Reader()
    log = RunLog(TensorBoardLog(tmp_path, flush_s=60), [follower])
    log.scalar("a", 1.0, 1)
    log.close(limit_s=3.0)
    assert follower.steps == (1,)
    assert 2.0 < follower.limit_s <= 3.0
