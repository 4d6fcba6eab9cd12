"""Checks of the volume: what it is, whether it outlives the machine, how fast it writes, and whether the run fits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from app.config import Config
from app.doctor.finding import Finding, failed, passed, warned
from app.env import Environment
from app.errors import MachineError
from app.ops.disk_forecast import files_to_come
from app.train.volume import TEST_BLOCKS, write_speed
from app.workspace import RunDir

GIB, MIB = 2**30, 2**20
NETWORK = re.compile(r"nfs4?|cifs|smb3?|smbfs|ceph|lustre|gpfs|beegfs|glusterfs|9p|afs|virtiofs|fuse(\..+)?")
IN_MEMORY = ("tmpfs", "ramfs")
OVERLAY = "overlay"
MOUNTS = "proc/self/mountinfo"
"""Of Linux alone."""
LEAST_FREE = 4 * TEST_BLOCKS * MIB
"""With less, the file of the test might be what fills the volume under a trainer."""
STOP_S = 3.0
"""A pod that is stopped leaves the trainer about this long for its last save."""


def filesystem(workspace: Path, root: Path = Path("/")) -> Finding | None:
    """What kind of file system the workspace lies on."""
    if not (root / MOUNTS).exists():
        return None
    mount, kind, source = _mount_of(existing(workspace), root)
    found = f"{workspace}: {kind} on {source}, mounted at {mount}"
    if mount == "/" and kind == OVERLAY:
        what = f"Mount a volume at {workspace}: without one all checkpoints are lost with the container"
        return warned("volume", f"{workspace} is the container's own disk ({kind})", what)
    if kind in IN_MEMORY:
        return warned("volume", found, f"Mount a disk at {workspace}: what lies in memory is lost with the machine")
    if NETWORK.fullmatch(kind):
        return passed("volume", f"{found}: a network or shared volume; its free space may not know a quota")
    return passed("volume", f"{found}: a local disk")


def pod_disk(env: Environment) -> Finding | None:
    """Whether the disk of a RunPod pod outlives the pod."""
    if env.runpod_pod_id is None:
        return None
    if env.runpod_volume_id is not None:
        return passed("pod_disk", f"network volume {env.runpod_volume_id}: it outlives the pod")
    what = (
        "It outlives a stop, not the pod. Attach a network volume to be able to go on elsewhere, or copy checkpoints "
        "out (rsync) before the pod is terminated"
    )
    return warned("pod_disk", "no RUNPOD_VOLUME_ID: the disk is deleted with the pod", what)


def write(folder: Path, checkpoint_bytes: int) -> Finding:
    """How fast the volume writes, by a durable file of 16 MiB.

    Args:
        folder: on the volume.
        checkpoint_bytes: of the run's largest checkpoint; 0 while nobody knows.
    """
    place = existing(folder)
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE:
        what = "Make room, or mount a larger volume: a save would find none"
        return failed("write", f"{free / MIB:.0f} MiB free in {place}: not tried with a file of 16 MiB", what)
    try:
        speed = write_speed(place)
    except OSError as error:
        what = f"Make {place} writable and free some space, or set WORKSPACE to another folder: train refuses (69)"
        return failed("write", f"{place} does not take a file of 16 MiB: {error.strerror}", what)
    seconds = checkpoint_bytes / MIB / speed
    found = f"{speed:.0f} MiB/s"
    if checkpoint_bytes:
        found += f": the largest checkpoint, {checkpoint_bytes / MIB:.0f} MiB, takes {seconds:.1f} s"
    if seconds > STOP_S:
        what = (
            f"A stopped pod leaves {STOP_S:.0f} s for the last save: then the run goes on from the last rolling one "
            "(checkpoint.save_every_s). A faster volume loses less"
        )
        return warned("write", found, what)
    return passed("write", found)


def room(config: Config, run_dir: RunDir, sizes: Mapping[str, int]) -> Finding:
    """Whether the volume takes the checkpoints that the run will still write and keep.

    Args:
        config: says how many.
        run_dir: the run, with those that it has.
        sizes: bytes of a checkpoint of each stage that is known.
    """
    free = shutil.disk_usage(existing(run_dir.path)).free
    kinds: dict[str, list[str]] = {}
    for stage, kind, _ in run_dir.checkpoints():
        kinds.setdefault(stage, []).append(kind)
    if not sizes:
        return _spare(config, free)
    # One more, because a file replaces another only when it is whole.
    least = max(sizes.values())
    spare = config.checkpoint.min_free_gib * GIB + least
    needed = {
        keep: sum(
            sizes.get(stage.name, least)
            * files_to_come(
                stage,
                config.checkpoint.model_copy(update={"keep_last_n_checkpoints": keep}),
                kinds.get(stage.name, []),
            )
            for stage in config.stages
        )
        for keep in (config.checkpoint.keep_last_n_checkpoints, *range(10, 0, -1))
    }
    wanted = needed[config.checkpoint.keep_last_n_checkpoints]
    found = f"{free / GIB:.1f} GiB free; the run's checkpoints will take {wanted / GIB:.1f} GiB"
    if free >= wanted + spare:
        return passed("room", found)
    fitting = [keep for keep, size in needed.items() if keep is not None and free >= size + spare]
    if fitting:
        what = f"Set checkpoint.keep_last_n_checkpoints={fitting[0]}, which may change at any resume, or make room"
        return warned("room", found, what)
    least_gib = (needed[1] + spare) / GIB
    what = f"A larger volume: with checkpoint.keep_last_n_checkpoints=1 the run needs {least_gib:.1f} GiB"
    return failed("room", found, what)


def _spare(config: Config, free: int) -> Finding:
    """Before the first checkpoint, while nobody knows how large one is."""
    found = f"{free / GIB:.1f} GiB free"
    if free < config.checkpoint.min_free_gib * GIB:
        what = "Make room, or mount a larger volume: no checkpoint can be saved"
        return failed("room", f"{found}, less than checkpoint.min_free_gib {config.checkpoint.min_free_gib:g}", what)
    return passed("room", found)


def known_sizes(run_dir: RunDir) -> dict[str, int]:
    """Bytes of the largest checkpoint of each stage that has some."""
    sizes: dict[str, int] = {}
    for stage, _, path in run_dir.checkpoints():
        try:
            sizes[stage] = max(sizes.get(stage, 0), path.stat().st_size)
        except FileNotFoundError:
            # A running trainer has just replaced it.
            continue
    return sizes


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: a first run makes the rest.

    Raises:
        MachineError: what is there is no folder.
    """
    folder = folder.absolute()
    found = next(path for path in [folder, *folder.parents] if path.exists())
    if not found.is_dir():
        raise MachineError(f"{found}: expected a folder, found a file. Move it away, or set WORKSPACE to a folder")
    return found


def _mount_of(folder: Path, root: Path) -> tuple[str, str, str]:
    """Mount point, type and source of the file system below a folder; the newest of the longest mount point."""
    best = ("/", "unknown", "unknown")
    for line in (root / MOUNTS).read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = _unescaped(left.split()[4])
        kind, source = right.split()[:2]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind, _unescaped(source))
    return best


def _unescaped(text: str) -> str:
    r"""The kernel writes a blank as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
