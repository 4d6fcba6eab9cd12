"""What the container may use and does use, from the kernel's control groups of version 1 and 2.

A limit holds for a group and all below it, so the narrowest one on the way up counts, with the use of its own group.
Inside a container the path in `/proc/self/cgroup` may be the host's; then the group is at the mount itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("sys/fs/cgroup")
UNLIMITED_BYTES = 1 << 60
"""Version 1 has no word for "no limit", but a number above this one."""


@dataclass(frozen=True)
class Use:
    """Of one resource, in bytes of memory or in CPU cores."""

    limit: float
    used: float
    """Memory: bytes. CPU: seconds of all cores since the group was made."""


def memory(root: Path) -> Use | None:
    """The container's limit in bytes, and its use without what the kernel would give back first; None: no limit."""
    return _narrowest(_groups(root, "memory"), _memory_of_v2) or _narrowest(_groups(root, "memory"), _memory_of_v1)


def cpu(root: Path) -> Use | None:
    """The container's limit in cores, and the seconds that it used; None: no limit."""
    return _narrowest(_groups(root, "cpu"), _cpu_of_v2) or _narrowest(
        _groups(root, "cpu"), lambda group: _cpu_of_v1(group, root / GROUPS)
    )


def _narrowest(groups: list[Path], read: Callable[[Path], Use | None]) -> Use | None:
    uses = [use for use in map(read, groups) if use is not None]
    return min(uses, key=lambda use: use.limit, default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's group and those above it, where they can be seen."""
    found: list[Path] = []
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        mounts = [root / GROUPS / controller] if controller in names.split(",") else []
        mounts += [root / GROUPS, root / GROUPS / "unified"] if not names else []
        for mount in mounts:
            own = mount / path.lstrip("/")
            found += [group for group in (own, *own.parents) if group.is_relative_to(mount) and group.is_dir()]
    return found


def _memory_of_v2(group: Path) -> Use | None:
    limit, used = text(group / "memory.max"), text(group / "memory.current")
    if limit is None or used is None or limit == "max":
        return None
    return Use(float(limit), int(used) - _field(group / "memory.stat", "inactive_file"))


def _memory_of_v1(group: Path) -> Use | None:
    limit, used = text(group / "memory.limit_in_bytes"), text(group / "memory.usage_in_bytes")
    if limit is None or used is None or int(limit) >= UNLIMITED_BYTES:
        return None
    return Use(float(limit), int(used) - _field(group / "memory.stat", "total_inactive_file"))


def _cpu_of_v2(group: Path) -> Use | None:
    limit = text(group / "cpu.max")
    if limit is None or limit.startswith("max"):
        return None
    quota, period = limit.split()
    return Use(int(quota) / int(period), _field(group / "cpu.stat", "usage_usec") / 1e6)


def _cpu_of_v1(group: Path, groups: Path) -> Use | None:
    quota, period = text(group / "cpu.cfs_quota_us"), text(group / "cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:
        return None
    # The seconds are counted by a controller of its own, which is often mounted at the same place.
    used = text(groups / "cpuacct" / group.relative_to(groups / "cpu") / "cpuacct.usage")
    if used is None:
        return None
    return Use(int(quota) / int(period), int(used) / 1e9)


def _field(path: Path, name: str) -> int:
    """The number behind `name` in a file of such lines; 0 where there is none."""
    for line in (text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def text(path: Path) -> str | None:
    """A file of the kernel's, stripped; None where this system, or this container, does not have it."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
