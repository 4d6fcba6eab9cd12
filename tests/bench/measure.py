"""How benchmarks measure: ways in turn, medians with spread, growth of memory, a table, and JSON.

Ways that are compared are called one after the other, round by round, so that whatever the machine does meanwhile meets
all of them. The first round warms up and does not count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from app.workspace import atomic_write

Way = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one way."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Of single measurements; low and high are the extremes."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def cell(self, unit: float = 1e3, digits: int = 1) -> str:
        """`median (low to high)`, in ms unless `unit` says how many of another unit are a second."""
        low, middle, high = (f"{value * unit:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} ({low} to {high})"


def in_turn(ways: Mapping[str, Way], repeats: int, patience_s: float = 60.0) -> dict[str, Times]:
    """Time every way `repeats` times; one that takes longer than `patience_s` in all is measured less often."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            spent = sum(seconds[name])
            if number > 1 and spent + spent / len(seconds[name]) > patience_s:
                continue
            start = time.perf_counter()
            way()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times.of(values[1:]) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Begin to look for a new peak: of the resident set (proc(5), clear_refs), or of the GPU's allocator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def growth_bytes(work: Way) -> int:
    """By how many bytes the memory of this process grew at most in a call of `work`: resident set, or the GPU's.

    The call before it has warmed up caches and pools of the libraries; what the allocator kept of it is given back.
    Resident memory on Linux, malloc_trim(3).
    """
    work()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
    work()
    synchronize()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")) - before


def resident_bytes(name: str) -> int:
    """A field of /proc/self/status: `VmRSS` is now, `VmHWM` the most since the start or since it was cleared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def parser(name: str, description: str | None, repeats: int | None) -> argparse.ArgumentParser:
    """A command line with `--json`, and with `--repeats` unless that is None."""
    made = argparse.ArgumentParser(
        prog=f"scripts/bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help=f"measurements that count ({repeats})")
    default = Path(f"workspace/bench/{name}.json")
    made.add_argument("--json", type=Path, default=default, metavar="FILE", help=f"the figures again ({default})")
    return made


def machine() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads of {os.cpu_count()} CPU cores, {platform.machine()}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their headings, in columns as wide as they need; the first to the left."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def save(record: Mapping[str, Any], path: Path) -> None:
    """The figures, the command and the machine, as JSON."""
    header = {"command": ["scripts/bench", Path(sys.argv[0]).stem, *sys.argv[1:]], "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({**header, **record}, indent=1, default=_plain).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Times):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON")
