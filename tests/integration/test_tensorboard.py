"""A killed and resumed run, seen through a real TensorBoard server: each step once, whatever the clock does."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.ops.event_files import rewind
from app.ops.layout import layout
from app.ops.writers import RunLog, TensorBoardLog
from app.tags import keep_before

STAGES = ("stage_16", "stage_32")
STEPS_PER_EPOCH = 10
CLOCK = 1_700_000_000.0

ATTEMPT = """
import sys, time
from pathlib import Path
from tests.integration.test_tensorboard import CLOCK, log_steps
from app.ops.writers import RunLog, TensorBoardLog
log = RunLog(TensorBoardLog(Path(sys.argv[1]), clock=lambda: CLOCK))
log_steps(log, "stage_16", 1, 40, 0)
log_steps(log, "stage_32", 1, 36, 40)
log.flush()
print("logged", flush=True)
log_steps(log, "stage_32", 37, 39, 40)
time.sleep(60)
"""


def value(stage: str, step: int) -> float:
    """The loss at a step, the same in each attempt."""
    return 1.0 / step + STAGES.index(stage)


def log_steps(log: RunLog, stage: str, first: int, last: int, earlier: int) -> None:
    """What a trainer logs for some steps of a stage, `earlier` being the steps of the stages before."""
    for step in range(first, last + 1):
        log.scalar(f"{stage}/train_loss_step", value(stage, step), step)
        log.scalar("perf/samples_per_s", 1.0, earlier + step)
        if step % STEPS_PER_EPOCH == 0:
            log.scalars({f"{stage}/val_loss": value(stage, step)}, step // STEPS_PER_EPOCH)
            log.image(f"{stage}/pictures/3fa2", np.zeros((8, 8, 3), np.uint8), step // STEPS_PER_EPOCH)


@contextmanager
def server(logdir: Path, fast: bool) -> Iterator[str]:
    """A TensorBoard process on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--logdir", str(logdir), "--port", str(port), "--host", "127.0.0.1", "--reload_interval", "1"]
    options += ["--load_fast", "true" if fast else "false"]
    with subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}/data"
        finally:
            process.kill()


def get(url: str, **query: str) -> Any:
    """JSON of a route, None as long as the server does not answer it."""
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError):
        return None


def wait_for(url: str, tag: str, steps: list[int]) -> list[list[float]]:
    """The points (wall time, step, value) of a tag, as soon as they are those steps or after half a minute."""
    deadline = time.monotonic() + 30
    points: list[list[float]] = []
    while time.monotonic() < deadline:
        points = get(f"{url}/plugin/scalars/scalars", run="tensorboard", tag=tag) or []
        if [point[1] for point in points] == steps:
            break
        time.sleep(0.2)
    return points


def kill_an_attempt(folder: Path) -> None:
    """Runs a process that logs and is killed without notice while points wait in its memory."""
    with subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(folder)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"logged\n"
        process.send_signal(signal.SIGKILL)
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes() + b"\x20\0\0\0\0\0\0\0torn")


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """A folder of checkpoints, of which `tensorboard/` is the unnamed run."""
    (tmp_path / "tensorboard").mkdir()
    return tmp_path


def test_a_killed_run_goes_on_without_a_seam(logdir: Path) -> None:
    """Killed at step 36 or later of stage_32, resumed from step 25 on a host whose clock is a day behind: both loaders,
    and a server that was there all the time, show each step once with its value, in order of time."""
    folder = logdir / "tensorboard"
    with server(logdir, fast=True) as live:
        kill_an_attempt(folder)
        assert len(wait_for(live, "stage_32/train_loss_step", list(range(1, 37)))) >= 36

        keep = keep_before(STAGES, "stage_32", step=25, epochs=2, global_step=65)
        report = rewind(folder, keep)
        assert (report.files, report.damaged) == (1, 1)
        assert report.dropped >= 2 * 11 + 2
        log = RunLog(TensorBoardLog(folder, clock=lambda: CLOCK - 86_400))
        log.layout(layout(STAGES))
        log_steps(log, "stage_32", 26, 40, 40)
        log.close()

        with server(logdir, fast=False) as slow, server(logdir, fast=True) as fast:
            for url in (live, slow, fast):
                check(url)
                check_layout(url)


def check(url: str) -> None:
    """The server shows what an uninterrupted run would show."""
    for stage in STAGES:
        steps = wait_for(url, f"{stage}/train_loss_step", list(range(1, 41)))
        assert [point[1] for point in steps] == list(range(1, 41))
        assert [point[2] for point in steps] == [float(np.float32(value(stage, step))) for step in range(1, 41)]
        assert [point[0] for point in steps] == sorted(point[0] for point in steps)
        epochs = wait_for(url, f"{stage}/val_loss", [1, 2, 3, 4])
        assert [(point[1], point[2]) for point in epochs] == [
            (epoch, float(np.float32(value(stage, epoch * STEPS_PER_EPOCH)))) for epoch in (1, 2, 3, 4)
        ]
    speed = wait_for(url, "perf/samples_per_s", list(range(1, 81)))
    assert [point[1] for point in speed] == list(range(1, 81))
    images = get(f"{url}/plugin/images/images", run="tensorboard", tag="stage_32/pictures/3fa2", sample="0")
    assert [image["step"] for image in images] == [1, 2, 3, 4]


def check_layout(url: str) -> None:
    """The Custom Scalars page has our charts, and its expressions find our tags."""
    deadline = time.monotonic() + 30
    while not (found := get(f"{url}/plugin/custom_scalars/layout")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (comparison,) = [category for category in found["category"] if category["title"] == "Stage comparison"]
    (line,) = comparison["chart"][0]["multiline"]["tag"]
    answer = get(f"{url}/plugin/custom_scalars/scalars", run="tensorboard", tag=line)
    assert set(answer["tag_to_events"]) == {"stage_16/val_loss", "stage_32/val_loss"}
