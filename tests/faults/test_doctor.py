"""The doctor on file systems that are small, full or read-only, and at the start of a container: real mounts, real
processes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.doctor import machine, volume
from app.doctor.finding import Verdict
from app.workspace import RunDir
from tests.conftest import tiny_config
from tests.runs import RUN, manifest
from tests.supervised import Container, below, processes
from tests.unit.test_doctor_machine import with_event

MIB = 2**20
Mount = Callable[[Path, int], Path]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Real file systems of so many MiB."""
    mounted: list[Path] = []

    def begin(folder: Path, mib: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
        mounted.append(folder)
        return folder

    yield begin
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, mib: int) -> Path:
    """A file of so many MiB."""
    path = folder / "ballast"
    path.write_bytes(bytes(mib * MIB))
    return path


def test_a_small_shared_memory(tmp_path: Path, mount: Mount) -> None:
    """1 MiB where 1.3 are needed is a failure; 4 MiB are enough, until somebody else has filled them."""
    config = tiny_config("compute.workers=4", "stages.stage_32.micro_batch=2")
    mount(tmp_path / "small/dev/shm", 1)
    small = machine.shm(config, tmp_path / "small")
    assert (small.verdict, "--shm-size" in small.what_to_do) == (Verdict.FAIL, True), small.found
    shm = mount(tmp_path / "enough/dev/shm", 4)
    assert machine.shm(config, tmp_path / "enough").verdict is Verdict.PASS
    fill(shm, 3)
    full = machine.shm(config, tmp_path / "enough")
    assert (full.verdict, "Delete what other processes left" in full.what_to_do) == (Verdict.WARN, True), full.found


def test_a_workspace_in_memory_that_is_small_and_fills_up(tmp_path: Path, mount: Mount) -> None:
    """It is named as what it is; the run's files fit, fit with fewer kept, do not fit, and no file of a test either."""
    folder = mount(tmp_path / "workspace", 128)
    kind = volume.filesystem(folder)
    assert kind is not None
    assert (kind.verdict, "what lies in memory is lost" in kind.what_to_do) == (Verdict.WARN, True)
    config = tiny_config("checkpoint.min_free_gib=0")
    sizes = {stage.name: 6 * MIB for stage in config.stages}
    assert volume.room(config, RunDir(folder), sizes).verdict is Verdict.PASS
    ballast = fill(folder, 20)
    fewer = volume.room(config, RunDir(folder), sizes)
    assert (fewer.verdict, "keep_last_n_checkpoints=1" in fewer.what_to_do) == (Verdict.WARN, True), fewer
    assert volume.write(folder, 0).verdict is Verdict.PASS
    ballast.unlink()
    fill(folder, 100)
    assert volume.room(config, RunDir(folder), sizes).verdict is Verdict.FAIL
    full = volume.write(folder, 0)
    assert (full.verdict, full.found.startswith("28 MiB free in")) == (Verdict.FAIL, True)


def test_a_volume_that_cannot_be_written(tmp_path: Path, mount: Mount) -> None:
    """The system's own words."""
    folder = mount(tmp_path / "workspace", 128)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    finding = volume.write(folder / "checkpoints", 0)
    assert finding.verdict is Verdict.FAIL
    assert finding.found == f"{folder} does not take a file of 16 MiB: Read-only file system"


def test_a_container_begins_with_what_is_wrong(
    start: Callable[..., Container], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the trainer's first line, once each, and nothing of what is right; a failure does not end the run."""
    monkeypatch.setenv("HF_TOKEN", "{{ RUNPOD_SECRET_hf }}")
    monkeypatch.setenv("WANDB_API_KEY", "{{ RUNPOD_SECRET_wandb_api_key }}")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with_event(RunDir(tmp_path / "workspace" / RUN), time.time() + 86400)
    container = start("--set", "checkpoint.min_free_gib=1e6", "--set", "stages.*.epochs=1")
    container.says("prepared phantom 1 of 6")
    lines = [line for line in container.lines if "app.doctor" in line]
    assert [line.split()[1:3] for line in lines] == [
        ["WARNING", "app.doctor.report:"],
        ["WARNING", "app.doctor.report:"],
        ["ERROR", "app.doctor.report:"],
        ["WARNING", "app.doctor.report:"],
    ]
    assert [line.split()[3] for line in lines] == ["secrets:", "launch:", "room:", "clock:"]
    assert "WANDB_API_KEY holds the unresolved placeholder {{ RUNPOD_SECRET_wandb_api_key }}" in lines[0]
    summary = re.search(r"INFO app: doctor: \d+ checks: \d+ PASS, 3 WARN, 1 FAIL\n", container.output)
    assert summary
    assert summary.start() < container.output.index("prepared phantom 1 of 6")
    container.until(lambda: manifest(container.workspace / RUN) or "a checkpoint cannot be written" in container.output)
    assert container.stop()[0] == 143


@pytest.fixture
def hanging_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python imports this module at the start of every process."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import sys, time\nif 'doctor' in sys.orig_argv:\n    time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(hook))


@pytest.mark.usefixtures("hanging_doctor")
def test_a_doctor_that_hangs_does_not_hold_the_trainer_up(start: Callable[..., Container]) -> None:
    """It trains beside it, and a stop ends both."""
    container = start("--set", "stages.*.epochs=100000")
    container.until(lambda: len(manifest(container.workspace / RUN)) > 0)
    assert "doctor:" not in container.output
    family = below(container.process.pid)
    assert container.stop()[0] == 143
    assert "killing" not in container.output
    assert not set(family) & set(processes())


@pytest.mark.usefixtures("hanging_doctor")
def test_a_container_is_stopped_while_the_doctor_looks(start: Callable[..., Container]) -> None:
    """Nothing has been started yet, and nothing is."""
    container = start()
    container.until(lambda: below(container.process.pid))
    code, _ = container.stop()
    container.close()
    assert (code, "spawned" in container.output) == (143, False)
