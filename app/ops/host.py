"""The machine beside its GPUs: processors, memory, `/dev/shm`, and what the container may use of them.

Figures that a system does not have, such as those of `/proc` outside Linux, are left out.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from app.ops import cgroup

GIB = 2**30
IDLE_FIELDS = (3, 4)
"""idle and iowait, of the columns of `/proc/stat`."""
COUNTED_FIELDS = 8
"""What follows them, guests, is in user and nice too."""


class Host:
    """Figures of this machine, by the names of the `host/` curves.

    Args:
        root: the root of the file system.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._cpu: tuple[int, int] | None = None
        self._container_cpu: tuple[float, float] | None = None

    def read(self) -> dict[str, float]:
        """What can be read now; shares of the CPU are since the call before, and so missing in the first one."""
        found = {**self._cpu_percent(), **self._memory(), **self._container()}
        shm = self._root / "dev/shm"
        if shm.is_dir():
            found["shm_free_gib"] = shutil.disk_usage(shm).free / GIB
        return found

    def _cpu_percent(self) -> dict[str, float]:
        """Busy share of all processors of the machine, whatever of them the container may use."""
        line = (cgroup.text(self._root / "proc/stat") or "").partition("\n")[0].split()
        if not line:
            return {}
        times = [int(field) for field in line[1 : COUNTED_FIELDS + 1]]
        total, idle = sum(times), sum(times[field] for field in IDLE_FIELDS)
        before, self._cpu = self._cpu, (total, idle)
        if before is None or total == before[0]:
            return {}
        return {"cpu_percent": 100.0 * (1 - (idle - before[1]) / (total - before[0]))}

    def _memory(self) -> dict[str, float]:
        lines = (line.split() for line in (cgroup.text(self._root / "proc/meminfo") or "").splitlines())
        kib = {fields[0].rstrip(":"): int(fields[1]) for fields in lines}
        found = {}
        if "MemTotal" in kib and "MemAvailable" in kib:
            found["ram_gib"] = (kib["MemTotal"] - kib["MemAvailable"]) * 1024 / GIB
        pages = (cgroup.text(self._root / "proc/self/statm") or "").split()
        if pages:
            found["trainer_ram_gib"] = int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
        return found

    def _container(self) -> dict[str, float]:
        """Use and limit, where there is a limit."""
        found: dict[str, float] = {}
        memory = cgroup.memory(self._root)
        if memory is not None:
            found |= {"container_ram_gib": memory.used / GIB, "container_ram_limit_gib": memory.limit / GIB}
        cpu, now = cgroup.cpu(self._root), self._clock()
        before, self._container_cpu = self._container_cpu, None if cpu is None else (now, cpu.used)
        if cpu is not None:
            found["container_cpu_limit_cores"] = cpu.limit
            if before is not None and now > before[0]:
                found["container_cpu_cores"] = (cpu.used - before[1]) / (now - before[0])
        return found
