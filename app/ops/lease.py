"""What `run.lock` says: whose run folder it is, and until when that can be relied on.

A record has a fixed width and is overwritten in place, so that a heartbeat needs no room on a full volume; a checksum
tells a record that was read half-written.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTH = 512
"""Bytes of a record, checksum and newline included."""
HOST_WIDTH = 64
TORN_RETRIES, TORN_PAUSE_S = 5, 0.02


@dataclass(frozen=True)
class Lease:
    """A process's claim on the run folder, as it stood at its last heartbeat."""

    pid: int
    token: str = ""
    """Random for each holder; empty in files of an older format, which hold nothing but a process number."""
    host: str = ""
    boot: str = ""
    """Of the kernel: same text, same kernel that has not been restarted since."""
    pid_namespace: str = ""
    """In which `pid` means something: two containers on one machine each have their own process 7."""
    started: int = 0
    """Of the process, in clock ticks since boot: another process with the same number has another."""
    device: int = 0
    """Of the mounted volume: within one kernel and one mount, flock tells for certain whether the holder lives."""
    since: float = 0.0
    beat: int = 0
    time: float = 0.0
    """Of the last heartbeat, by the holder's clock."""
    released: bool = False

    def same_mount(self, other: Lease) -> bool:
        """Whether an flock of the one excludes the other."""
        return bool(self.boot) and (self.boot, self.device) == (other.boot, other.device)

    def runs(self, reader: Lease) -> bool | None:
        """Whether the holder's process exists; None where `reader` cannot know."""
        if not self.boot or (self.boot, self.pid_namespace) != (reader.boot, reader.pid_namespace):
            return None
        return _start_of(self.pid) == self.started

    def encode(self) -> bytes:
        """`WIDTH` bytes: JSON, blanks, checksum."""
        text = json.dumps(asdict(self)).ljust(WIDTH - 10).encode()
        return text + b" %08x\n" % zlib.crc32(text)


@dataclass(frozen=True)
class Reading:
    """The file as it was found."""

    raw: bytes
    lease: Lease | None
    """None where the file is missing, blank, or torn."""
    modified: float
    """By the clock of whoever stamps the files of this volume."""
    missing: bool = False

    @property
    def blank(self) -> bool:
        """Nothing was written yet; zeros are what a power cut leaves of a new file."""
        return not self.raw.strip(b"\0")

    def __str__(self) -> str:
        """The holder, for messages."""
        if self.lease is None:
            return "holder unknown"
        if not self.lease.token:
            return f"pid {self.lease.pid}"
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.lease.since))
        return (
            f"host {self.lease.host}, pid {self.lease.pid}, since {since}, last heartbeat "
            f"{max(0.0, time.time() - self.modified):.0f} s ago"
        )


def own_lease(device: int) -> Lease:
    """A new claim of this process on a volume."""
    now = time.time()
    return Lease(
        pid=os.getpid(),
        token=secrets.token_hex(16),
        host=socket.gethostname().encode("ascii", "replace").decode()[:HOST_WIDTH],
        boot=_boot_id(),
        pid_namespace=_pid_namespace(),
        started=_start_of(os.getpid()) or 0,
        device=device,
        since=now,
        time=now,
    )


def decode(raw: bytes) -> Lease | None:
    """The record; None where it is blank or torn."""
    record = raw[:WIDTH]
    text, checksum = record[: WIDTH - 10], record[WIDTH - 10 :]
    try:
        fields = json.loads(text)
        if isinstance(fields, dict) and checksum == b" %08x\n" % zlib.crc32(text):
            return Lease(**fields)
        if isinstance(fields, dict) and set(fields) == {"pid"}:
            return Lease(pid=int(fields["pid"]))
    except (ValueError, TypeError):
        pass
    return None


def read_lease(path: Path) -> Reading:
    """The file, opened anew, because network file systems look for news only then; read again where it was torn.

    Raises:
        OSError: the volume does not answer.
    """
    for attempt in range(TORN_RETRIES):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return Reading(b"", None, 0.0, missing=True)
        try:
            raw, modified = os.pread(descriptor, WIDTH, 0), os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        reading = Reading(raw, decode(raw), modified)
        if reading.lease is not None or reading.blank:
            break
        if attempt + 1 < TORN_RETRIES:
            time.sleep(TORN_PAUSE_S)
    return reading


def write_lease(descriptor: int, lease: Lease) -> None:
    """Over the old record, and out to the volume, where another machine can see it."""
    os.pwrite(descriptor, lease.encode(), 0)
    os.fdatasync(descriptor)


def age_s(path: Path, modified: float) -> float | None:
    """How old a time stamp of the volume is by the volume's own clock; None where it takes no new file.

    Args:
        path: of the file that has the stamp; a probe is written next to it.
        modified: the stamp.
    """
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with probe.open("wb") as file:
            file.write(b"?")
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime - modified
    except OSError:
        return None
    finally:
        _remove(probe)


def _remove(probe: Path) -> None:
    try:
        probe.unlink(missing_ok=True)
    except OSError:
        # The next start removes temporary files.
        return


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is none, or only its exit code is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in brackets, may contain anything.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
