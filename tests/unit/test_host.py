"""Figures of the machine against `df`, libc and a real allocation; the container's against trees of kernel files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from app.ops import cgroup
from app.ops.host import Host

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    """A tree of files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_shared_memory_is_what_df_says() -> None:
    """Free space of `/dev/shm`, to 1 %."""
    answer = subprocess.run(["df", "-B1", "--output=avail", "/dev/shm"], capture_output=True, text=True, check=True)
    assert Host().read()["shm_free_gib"] * GIB == pytest.approx(int(answer.stdout.split()[-1]), rel=0.01)


def test_memory_in_use_is_between_what_libc_says() -> None:
    """More than nothing, and not more than all pages but the free ones; the trainer's grows by what it allocates."""
    host = Host()
    before = host.read()
    page = os.sysconf("SC_PAGE_SIZE")
    taken = (os.sysconf("SC_PHYS_PAGES") - os.sysconf("SC_AVPHYS_PAGES")) * page / GIB
    assert 0 < before["trainer_ram_gib"] < before["ram_gib"] < taken + 0.1
    kept = np.ones(GIB // 8, np.uint8)
    assert host.read()["trainer_ram_gib"] - before["trainer_ram_gib"] == pytest.approx(kept.nbytes / GIB, abs=0.02)


def test_the_cpu_is_busy_for_the_time_that_is_not_idle(tmp_path: Path) -> None:
    """Between two readings 100 of 400 ticks idle or wait for a disk; guests, which user has too, count once."""
    write(tmp_path, {"proc/stat": "cpu  1000 0 500 8000 500 0 0 0 300 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"})
    host = Host(tmp_path)
    assert "cpu_percent" not in host.read()
    write(tmp_path, {"proc/stat": "cpu  1200 10 560 8080 520 20 10 0 350 0\n"})
    assert host.read()["cpu_percent"] == pytest.approx(75.0)


def test_a_system_without_such_files_has_no_figures(tmp_path: Path) -> None:
    """No `/proc`, no groups, no `/dev/shm`: nothing is made up."""
    assert Host(tmp_path).read() == {}


V2 = {
    "proc/self/cgroup": "0::/pod/trainer\n",
    "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{6 * GIB}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    "sys/fs/cgroup/pod/cpu.max": "350000 100000\n",
    "sys/fs/cgroup/pod/cpu.stat": "usage_usec 12500000\nuser_usec 1\n",
    "sys/fs/cgroup/pod/trainer/memory.max": f"{16 * GIB}\n",
    "sys/fs/cgroup/pod/trainer/memory.current": f"{3 * GIB}\n",
    "sys/fs/cgroup/pod/trainer/cpu.max": "max 100000\n",
}
V1_GROUP = {
    "memory.limit_in_bytes": f"{8 * GIB}\n",
    "memory.usage_in_bytes": f"{6 * GIB}\n",
    "memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\n",
}
V1 = {
    # Inside a container the host's path leads nowhere, and the group is at the mount.
    "proc/self/cgroup": "4:memory:/docker/3fa2\n2:cpu,cpuacct:/docker/3fa2\n0::/docker/3fa2\n",
    **{f"sys/fs/cgroup/memory/{name}": content for name, content in V1_GROUP.items()},
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "350000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpuacct/cpuacct.usage": "12500000000\n",
}


@pytest.mark.parametrize("tree", [V2, V1], ids=["v2", "v1"])
def test_the_container_s_limit_is_the_narrowest_one(tmp_path: Path, tree: dict[str, str]) -> None:
    """8 GiB and 3.5 cores; of 6 GiB in use the kernel would give 2 back before it kills."""
    write(tmp_path, tree)
    assert cgroup.memory(tmp_path) == cgroup.Use(8 * GIB, 4 * GIB)
    assert cgroup.cpu(tmp_path) == cgroup.Use(3.5, 12.5)


def test_the_container_s_cpu_is_counted_in_cores(tmp_path: Path) -> None:
    """12.5 s of all cores in 5 s are 2.5 cores."""
    write(tmp_path, V2)
    times = iter([100.0, 105.0])
    host = Host(tmp_path, lambda: next(times))
    assert "container_cpu_cores" not in host.read()
    write(tmp_path, {"sys/fs/cgroup/pod/cpu.stat": "usage_usec 25000000\n"})
    figures = host.read()
    assert (figures["container_cpu_cores"], figures["container_cpu_limit_cores"]) == (2.5, 3.5)
    assert (figures["container_ram_gib"], figures["container_ram_limit_gib"]) == (4.0, 8.0)


@pytest.mark.parametrize(
    "tree",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.stat": "anon 1\n"},
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["v2", "v1"],
)
def test_without_a_limit_there_are_no_figures_of_a_container(tmp_path: Path, tree: dict[str, str]) -> None:
    """The root group of either version."""
    write(tmp_path, tree)
    assert (cgroup.memory(tmp_path), cgroup.cpu(tmp_path)) == (None, None)
