"""The doctor's checks of memory, clock and volume: real event files, real files, kernel files where they are given."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from app.config import Config
from app.doctor import machine, volume
from app.doctor.finding import Finding, Verdict
from app.env import Environment
from app.errors import MachineError
from app.workspace import RunDir
from tests.conftest import tiny_config

GIB, MIB = 2**30, 2**20
LOADING = ("compute.workers=4", "stages.stage_32.micro_batch=2")
"""Cases of stage_32 in a micro-batch of 2: cubes of 32 and 16 and two radiographs."""
LOADING_BYTES = 4 * 2 * 2 * (2 * 32**3 + 8 * 32**2 + 2 * 16**3)


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_shared_memory_is_needed_by_loading_processes_alone(tmp_path: Path) -> None:
    """Without it, a run with them cannot go on; their need is two batches each."""
    assert machine.shm(tiny_config(), tmp_path).verdict is Verdict.PASS
    missing = machine.shm(tiny_config(*LOADING), tmp_path)
    assert (missing.verdict, "set compute.workers=0" in missing.what_to_do) == (Verdict.FAIL, True)
    here = machine.shm(tiny_config(*LOADING))
    assert (here.verdict, here.found.endswith(f"4 workers need {LOADING_BYTES / MIB:.0f}")) == (Verdict.PASS, True)


def memory(root: Path, total_gib: float, available_gib: float, limit_gib: float | None, used_gib: float = 0) -> Path:
    """A machine and its container's limit, as the kernel tells them."""
    kib = 2**20
    meminfo = f"MemTotal: {int(total_gib * kib)} kB\nMemAvailable: {int(available_gib * kib)} kB\n"
    files = {"proc/meminfo": meminfo, "proc/self/cgroup": "0::/pod\n"}
    if limit_gib is not None:
        files |= {
            "sys/fs/cgroup/pod/memory.max": f"{int(limit_gib * GIB)}\n",
            "sys/fs/cgroup/pod/memory.current": f"{int(used_gib * GIB)}\n",
        }
    return write(root, files)


@pytest.mark.parametrize(
    ("figures", "on_gpu", "expected"),
    [
        ((32, 30, None), True, Verdict.PASS),
        ((32, 30, 8, 1), True, Verdict.PASS),
        ((32, 30, 8, 3), True, Verdict.WARN),
        ((32, 30, 6, 0), True, Verdict.FAIL),
        ((32, 5, None), True, Verdict.WARN),
        ((6, 5, None), True, Verdict.FAIL),
        ((6, 5, None), False, Verdict.PASS),
    ],
)
def test_memory_is_what_machine_and_container_leave(
    tmp_path: Path, figures: tuple[float, ...], on_gpu: bool, expected: Verdict
) -> None:
    """For the trainer with CUDA 4 GiB, for four loading processes 1.2, for the copy that is saved 1: 6.2 of them."""
    finding = machine.ram(tiny_config(*LOADING), GIB, on_gpu, memory(tmp_path, *figures))
    assert finding is not None
    assert finding.verdict is expected, finding.found
    assert f"a run takes about {6.2 if on_gpu else 3.2}" in finding.found


def test_a_machine_that_tells_nothing_of_its_memory(tmp_path: Path) -> None:
    """No /proc: no finding, and the whole memory for a run on the CPU."""
    assert machine.ram(tiny_config(), GIB, False, tmp_path) is None
    assert machine.usable_ram(tmp_path) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.usable_ram(memory(tmp_path, 32, 30, 0.5)) == GIB // 2


def with_event(run_dir: RunDir, wall_time: float) -> RunDir:
    """A run whose newest point is of that time."""
    run_dir.tensorboard.mkdir(parents=True)
    with (run_dir.tensorboard / "events.out.tfevents.1700000000.1").open("wb") as file:
        RecordWriter(file).write(Event(wall_time=wall_time, step=1).SerializeToString())
    return run_dir


def test_a_clock_behind_the_newest_point(tmp_path: Path) -> None:
    """Two hours ahead of this machine's own clock; behind it all is well, and without points there is no question."""
    assert machine.clock(RunDir(tmp_path / "none")) is None
    ahead = machine.clock(with_event(RunDir(tmp_path / "ahead"), time.time() + 7230))
    assert ahead is not None
    assert (ahead.verdict, "the clock is 2.0 h behind the newest point" in ahead.found) == (Verdict.WARN, True)
    behind = machine.clock(with_event(RunDir(tmp_path / "behind"), time.time() - 90))
    assert behind is not None
    assert (behind.verdict, behind.found) == (Verdict.PASS, "the newest point of the run is 1.5 min old")


MOUNTS = """\
22 1 0:21 / / rw,relatime - {root} overlay rw
23 22 0:4 / {folder}/work\\040space rw shared:1 - {kind} {source} rw
24 22 0:5 / {folder}/work\\040space2 rw - ext4 /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("kind", "source", "expected", "words"),
    [
        ("ext4", "/dev/sda1", Verdict.PASS, "a local disk"),
        ("xfs", "/dev/nvme0n1", Verdict.PASS, "a local disk"),
        ("nfs4", "10.0.0.1:/v", Verdict.PASS, "a network or shared volume"),
        ("fuse", "mfs#eu.runpod.net:9421", Verdict.PASS, "a network or shared volume"),
        ("fuse.juicefs", "JuiceFS:v", Verdict.PASS, "a network or shared volume"),
        ("tmpfs", "tmpfs", Verdict.WARN, "tmpfs on tmpfs"),
    ],
)
def test_the_kind_of_the_volume(tmp_path: Path, kind: str, source: str, expected: Verdict, words: str) -> None:
    """By the mount that the workspace lies on, whose name has a blank in it, before the workspace is there."""
    folder = tmp_path.resolve()
    (folder / "work space").mkdir()
    root = write(
        tmp_path / "root",
        {"proc/self/mountinfo": MOUNTS.format(root="overlay", folder=folder, kind=kind, source=source)},
    )
    finding = volume.filesystem(folder / "work space/runs/new", root)
    assert finding is not None
    assert (finding.verdict, words in finding.found, source in finding.found) == (expected, True, True)


@pytest.mark.parametrize(("kind", "expected"), [("overlay", Verdict.WARN), ("ext4", Verdict.PASS)])
def test_a_container_s_own_disk_is_no_volume(tmp_path: Path, kind: str, expected: Verdict) -> None:
    """Everything in it is lost with the container; a desk's disk is something else."""
    line = f"22 1 0:21 / / rw - {kind} disk rw\n"
    finding = volume.filesystem(tmp_path, write(tmp_path, {"proc/self/mountinfo": line}))
    assert finding is not None
    assert (finding.verdict, "Mount a volume" in finding.what_to_do) == (expected, expected is Verdict.WARN)
    assert volume.filesystem(tmp_path, tmp_path / "nowhere") is None


def test_a_pod_without_a_network_volume() -> None:
    """Its disk is deleted with it; at a desk there is no pod."""
    assert volume.pod_disk(Environment.read({})) is None
    alone = volume.pod_disk(Environment.read({"RUNPOD_POD_ID": "abc"}))
    assert alone is not None
    assert (alone.verdict, alone.found.startswith("no RUNPOD_VOLUME_ID")) == (Verdict.WARN, True)
    durable = volume.pod_disk(Environment.read({"RUNPOD_POD_ID": "abc", "RUNPOD_VOLUME_ID": "vol1"}))
    assert durable is not None
    assert (durable.verdict, "vol1" in durable.found) == (Verdict.PASS, True)


def test_the_volume_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    """Below the nearest folder that is there; a checkpoint too large for the last seconds of a pod is a warning."""
    good = volume.write(tmp_path / "checkpoints/run", 0)
    assert (good.verdict, good.found.endswith("MiB/s")) == (Verdict.PASS, True)
    slow = volume.write(tmp_path, 10**14)
    assert (slow.verdict, "checkpoint.save_every_s" in slow.what_to_do) == (Verdict.WARN, True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_workspace(tmp_path: Path) -> None:
    """Found by every check that looks there."""
    (tmp_path / "workspace").write_text("")
    with pytest.raises(MachineError, match=r"workspace: expected a folder, found a file\. Move it away"):
        volume.existing(tmp_path / "workspace/checkpoints")


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """The largest of each stage."""
    for name, size in {"stage_8_best.pt": 10, "stage_8_last.pt": 30, "stage_16_last.pt": 20, "other.pt": 99}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert volume.known_sizes(RunDir(tmp_path)) == {"stage_8": 30, "stage_16": 20}


def room(config: Config, run: Path, free: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """The check on a volume with so many bytes free."""
    usage = type(volume.shutil.disk_usage(run))(10**15, 0, free)
    monkeypatch.setattr(volume.shutil, "disk_usage", lambda _: usage)
    sizes = {stage.name: size for stage in config.stages} if size else {}
    return volume.room(config, RunDir(run), sizes)


@pytest.mark.parametrize(
    ("free_gib", "expected", "advice"),
    [
        (20, Verdict.PASS, ""),
        (19, Verdict.WARN, "Set checkpoint.keep_last_n_checkpoints=2, which"),
        (17, Verdict.WARN, "Set checkpoint.keep_last_n_checkpoints=1, which"),
        (16, Verdict.WARN, "Set checkpoint.keep_last_n_checkpoints=1, which"),
        (15, Verdict.FAIL, "with checkpoint.keep_last_n_checkpoints=1 the run needs 16.0 GiB"),
    ],
)
def test_room_for_all_that_the_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int, expected: Verdict, advice: str
) -> None:
    """Of three stages of 3, 2 and 2 epochs: 7 periodic files, 12 others, and one that is being written, of 1 GiB each;
    with two kept 6 periodic ones, with one 3."""
    config = tiny_config("checkpoint.min_free_gib=0")
    finding = room(config, tmp_path, free_gib * GIB, GIB, monkeypatch)
    assert (finding.verdict, advice in finding.what_to_do) == (expected, True), finding
    assert "the run's checkpoints will take 19.0 GiB" in finding.found


def test_room_for_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished stages need none, and min_free_gib stays free."""
    for stage in ("stage_8", "stage_16"):
        (tmp_path / f"{stage}_final.pt").touch()
    config = tiny_config("checkpoint.min_free_gib=1")
    assert room(config, tmp_path, 8 * GIB, GIB, monkeypatch).verdict is Verdict.PASS
    assert room(config, tmp_path, 8 * GIB - 1, GIB, monkeypatch).verdict is Verdict.WARN


def test_room_before_anybody_knows_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first start of a container: room for none at all is a failure."""
    config = tiny_config("checkpoint.min_free_gib=1")
    assert room(config, tmp_path, GIB, 0, monkeypatch).verdict is Verdict.PASS
    full = room(config, tmp_path, GIB - 1, 0, monkeypatch)
    assert (full.verdict, "less than checkpoint.min_free_gib 1" in full.found) == (Verdict.FAIL, True)
