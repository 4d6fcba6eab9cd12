"""The mark of the furthest step outlives its process."""

import os
import subprocess
import sys
from pathlib import Path

from app.ops.step_mark import StepMark, marked
from tests.conftest import ROOT

KILLED = """
import os, signal, sys
from pathlib import Path
from app.ops.step_mark import StepMark
mark = StepMark(Path(sys.argv[1]), 5)
for step in range(6, 1001):
    mark(step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_last_step(tmp_path: Path) -> None:
    """SIGKILL right after the step: the number is there."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "steps")], cwd=ROOT, check=False)
    assert marked(tmp_path / "steps") == 1000


def test_a_new_attempt_sets_the_mark_back_and_the_file_keeps_its_size(tmp_path: Path) -> None:
    """Nothing is appended: a full volume has room for it."""
    path = tmp_path / "steps"
    assert marked(path) is None
    StepMark(path, 123456).close()
    size = path.stat().st_size
    mark = StepMark(path, 7)
    mark(8)
    mark.close()
    assert (marked(path), path.stat().st_size) == (8, size)


def test_a_mark_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path, caplog) -> None:
    """Counting what was lost is not worth a run."""
    mark = StepMark(tmp_path / "steps", 0)
    os.close(mark._file)
    mark._file = os.open(tmp_path / "steps", os.O_RDONLY)
    mark(1)
    mark(2)
    assert caplog.text.count("lost steps are not counted") == 1
