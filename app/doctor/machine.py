"""Checks of the machine beside GPUs and volume: shared memory, memory, clock."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from app.config import Config
from app.doctor.finding import Finding, failed, passed, warned
from app.ops import cgroup
from app.ops.event_files import newest_wall_time
from app.workspace import RunDir

GIB, MIB = 2**30, 2**20
BATCHES_AHEAD = 2
"""Of each loading process, in shared memory: `prefetch_factor` of torch's DataLoader."""
PROCESS_GIB = {False: 1.0, True: 4.0}
"""Of the trainer beside tensors, without and with CUDA; rough."""
WORKER_GIB = 0.3
"""Of a loading process; rough."""
CLOCK_S = 1.0
"""Less is the clock's own going."""


def shm(config: Config, root: Path = Path("/")) -> Finding:
    """Whether /dev/shm takes the cases that loading processes hand over; where it is full they die of a bus error."""
    workers, folder = config.compute.workers, root / "dev/shm"
    if not folder.is_dir():
        if workers == 0:
            return passed("shm", "no /dev/shm, and compute.workers is 0: not used")
        what = "Mount one (`docker run --shm-size 2g`), or set compute.workers=0"
        return failed("shm", f"no /dev/shm, and compute.workers is {workers}", what)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / MIB:.0f} of {usage.total / MIB:.0f} MiB free"
    if workers == 0:
        return passed("shm", f"{found}; compute.workers is 0: not used")
    needed = workers * BATCHES_AHEAD * _largest_batch(config)
    found += f"; {workers} workers need {needed / MIB:.0f}"
    if usage.total < needed:
        what = "`docker run --shm-size 2g`, `shm_size` in a compose file, a larger pod, or compute.workers=0"
        return failed("shm", found, what)
    if usage.free < needed:
        return warned("shm", found, f"Delete what other processes left in {folder}, or set compute.workers=0")
    return passed("shm", found)


def _largest_batch(config: Config) -> int:
    """Bytes of the cases of a micro-batch: int16 cube, two float32 radiographs, int16 cube of the stage before."""
    sizes, before = [], 0
    for stage in config.stages:
        edge = stage.resolution
        sizes.append((stage.micro_batch or stage.batch) * (2 * edge**3 + 8 * edge**2 + 2 * before**3))
        before = edge
    return max(sizes)


def usable_ram(root: Path = Path("/")) -> int:
    """Bytes that the trainer may have at most: of the machine, or the container's limit."""
    limit, whole = cgroup.memory(root), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole if limit is None else min(whole, int(limit.limit))


def ram(config: Config, checkpoint_bytes: int, on_gpu: bool, root: Path = Path("/")) -> Finding | None:
    """Whether memory holds trainer, loading processes and the copy of the state that is being saved.

    Args:
        config: the run.
        checkpoint_bytes: of its largest checkpoint.
        on_gpu: whether it trains on one.
        root: of the file system.
    """
    needed = PROCESS_GIB[on_gpu] + config.compute.workers * WORKER_GIB + checkpoint_bytes / GIB
    limit, meminfo = cgroup.memory(root), _meminfo(root)
    if not meminfo:
        return None
    free = meminfo["MemAvailable"] / GIB
    whole = meminfo["MemTotal"] / GIB
    found = f"{free:.1f} of {whole:.1f} GiB available"
    if limit is not None:
        left = (limit.limit - limit.used) / GIB
        free, whole = min(free, left), min(whole, limit.limit / GIB)
        found += f"; the container's limit leaves {left:.1f} of {limit.limit / GIB:.1f}"
    found += f"; a run takes about {needed:.1f}"
    if whole < needed:
        what = "A larger machine or container limit (`docker run --memory`): the kernel would kill the trainer"
        return failed("ram", found, what)
    if free < needed:
        return warned("ram", found, "End what else runs here; fewer compute.workers take less")
    return passed("ram", found)


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name, of /proc/meminfo."""
    lines = (cgroup.text(root / "proc/meminfo") or "").splitlines()
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def clock(run_dir: RunDir, now: float | None = None) -> Finding | None:
    """Whether the clock is behind the newest event of the run: curves over time and the ledger would go back."""
    newest = newest_wall_time(run_dir.tensorboard)
    if newest == 0:
        return None
    ahead_s = newest - (time.time() if now is None else now)
    if ahead_s <= CLOCK_S:
        return passed("clock", f"the newest point of the run is {_span(-ahead_s)} old")
    found = f"the clock is {_span(ahead_s)} behind the newest point in {run_dir.tensorboard}"
    what = (
        "Set the machine's clock (NTP), or take another machine. Steps stay right; curves over time, the ledger's "
        "seconds and goodput do not"
    )
    return warned("clock", found, what)


def _span(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
