"""The mark of the furthest step outlives its process."""

import os
import subprocess
import sys
import time
from pathlib import Path

from app.ops.step_mark import Mark, StepMark, marked, read_mark
from tests.conftest import ROOT

KILLED = """
import os, signal, sys
from pathlib import Path
from app.ops.step_mark import StepMark
mark = StepMark(Path(sys.argv[1]), 5)
for step in range(6, 1001):
    mark(step, 0.5 * step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_last_step(tmp_path: Path) -> None:
    """SIGKILL right after the step: the number is there, with the seconds that were spent and the time."""
    before = time.time()
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "steps")], cwd=ROOT, check=False)
    assert marked(tmp_path / "steps") == 1000
    mark = read_mark(tmp_path / "steps")
    assert mark is not None
    assert mark.run_seconds == 500.0
    assert mark.time is not None
    assert before - 0.001 <= mark.time <= time.time()


def test_a_mark_of_an_older_version_is_a_number_alone(tmp_path: Path) -> None:
    """It is read, and overwritten."""
    path = tmp_path / "steps"
    path.write_text(f"{77:20d}\n")
    assert read_mark(path) == Mark(77, None, None)
    StepMark(path, 5, 2.5).close()
    mark = read_mark(path)
    assert mark is not None
    assert (mark.global_step, mark.run_seconds) == (5, 2.5)


def test_a_new_attempt_sets_the_mark_back_and_the_file_keeps_its_size(tmp_path: Path) -> None:
    """Nothing is appended: a full volume has room for it."""
    path = tmp_path / "steps"
    assert marked(path) is None
    StepMark(path, 123456).close()
    size = path.stat().st_size
    mark = StepMark(path, 7)
    mark(8, 1.0)
    mark.close()
    assert (marked(path), path.stat().st_size) == (8, size)


def test_a_mark_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path, caplog) -> None:
    """Counting what was lost is not worth a run."""
    mark = StepMark(tmp_path / "steps", 0)
    os.close(mark._file)
    mark._file = os.open(tmp_path / "steps", os.O_RDONLY)
    mark(1, 1.0)
    mark(2, 2.0)
    assert caplog.text.count("lost steps are not counted") == 1
