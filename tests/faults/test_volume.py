"""A volume that takes no more while a run trains: training goes on, old files stay, the next save succeeds."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.train.checkpoint import CheckpointFolder
from app.workspace import RunDir
from tests.conftest import ROOT
from tests.runs import RUN, assert_same_run, manifest, marked_step, start, train, wait_until

LONG = ("--set", "stages.stage_8.epochs=40", "--set", "checkpoint.min_free_gib=0")
STOP_AFTER = ("--stages", "stage_8")
VOLUME_MIB = 48


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run on a volume that works."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace, *LONG, *STOP_AFTER)
    assert code == 0, output
    return workspace / RUN


def whole_files(run: Path) -> dict[str, int]:
    """Name and step of every checkpoint that is what was written."""
    folder = CheckpointFolder(RunDir(run))
    return {entry.path.name: entry.counters.step for entry in folder.entries() if folder.damage(entry) is None}


def survives(workspace: Path, process: subprocess.Popen[str], run: Path, uninterrupted: Path, repair: Path) -> str:
    """After the volume has failed: steps go on, files stay; `repair` deleted, saves go on; the output at the end."""
    log = workspace / "hybrid_vit_cascade/logs/train.log"
    wait_until(lambda: "a checkpoint cannot be written" in log.read_text(), process)
    before, step = whole_files(run), marked_step(run)
    assert before
    wait_until(lambda: marked_step(run) > step + 3, process)
    after = whole_files(run)
    assert all(after[name] == before[name] for name in before)
    saves = len(manifest(run))
    repair.unlink()
    wait_until(lambda: len(manifest(run)) > saves, process)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "the volume takes checkpoints again" in output
    assert_same_run(run, uninterrupted)
    return output


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB for the checkpoints."""
    checkpoints = tmp_path / "hybrid_vit_cascade/checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={VOLUME_MIB}m", "tmpfs", str(checkpoints)], check=True)
    yield checkpoints
    subprocess.run(["umount", "--lazy", str(checkpoints)], check=True)


def test_a_full_volume_is_waited_out(tmp_path: Path, small_volume: Path, uninterrupted: Path) -> None:
    """ENOSPC from a real file system that somebody else has filled, until that somebody makes room."""
    run = tmp_path / RUN
    process = start(tmp_path, *LONG, *STOP_AFTER, "--set", "checkpoint.save_every_n_epochs=40")
    wait_until(lambda: len(manifest(run)) > 3, process)
    ballast = small_volume / "ballast"
    with ballast.open("wb") as file:
        subprocess.run(["dd", "if=/dev/zero", "bs=64k"], stdout=file, stderr=subprocess.DEVNULL, check=False)
    assert shutil.disk_usage(small_volume).free < 2**20
    log = tmp_path / "hybrid_vit_cascade/logs/train.log"
    wait_until(lambda: "a checkpoint cannot be written" in log.read_text(), process)
    before, step = whole_files(run), marked_step(run)
    wait_until(lambda: marked_step(run) > step + 3, process)
    assert all(whole_files(run)[name] == before[name] for name in before)
    ballast.unlink()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "No space left on device" in output or "are free, a save takes" in output
    assert "the volume takes checkpoints again" in output
    # Only the first and the last epoch of the quiet run are compared: the others' files would not fit on the volume.
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for path in uninterrupted.iterdir():
        if "_epoch_" not in path.name:
            (quiet / path.name).symlink_to(path)
    assert_same_run(run, quiet)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=["EIO", "EROFS"])
def test_a_broken_volume_is_waited_out(tmp_path: Path, uninterrupted: Path, number: int) -> None:
    """Every system call that would write a checkpoint fails, until the volume works again."""
    library, switch, run = tmp_path / "failing_disk.so", tmp_path / "failing", tmp_path / RUN
    source = ROOT / "tests/faults/failing_disk.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    env = {"LD_PRELOAD": str(library), "FAILING_DISK": str(switch)}
    process = start(tmp_path, *LONG, *STOP_AFTER, env=env)
    wait_until(lambda: len(manifest(run)) > 3, process)
    switch.write_text(str(number))
    output = survives(tmp_path, process, run, uninterrupted, switch)
    assert {errno.EIO: "Input/output error", errno.EROFS: "Read-only file system"}[number] in output
