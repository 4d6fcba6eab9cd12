"""A supervised trainer, or a whole container without Docker, as real processes for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, TINY


class Container:
    """`python -m app supervise` with its output."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        command: str = "supervise",
        config: str = str(TINY),
        program: tuple[str, ...] = ("app",),
    ) -> None:
        self.workspace = folder / "workspace"
        self.runtime = folder / "run"
        self.runtime.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        place = ["--runtime", str(self.runtime)] if command == "supervise" else ["--pid-file", str(self.pid_file)]
        added = {"WORKSPACE": str(self.workspace), "PORT": str(self.port), "CONFIG": config, "DASHBOARD_AUTH": "none"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program, command, *place, *arguments],
            cwd=ROOT,
            env={**os.environ, **added, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid_file(self) -> Path:
        """Where the trainer's process number stands."""
        return self.runtime / "hybrid_vit_cascade.trainer.json"

    @property
    def output(self) -> str:
        """Everything said so far."""
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def until(self, condition: Callable[[], object], limit_s: float = 240.0) -> None:
        """Poll."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"too slow:\n{self.output}"
            time.sleep(0.01)

    def says(self, text: str) -> None:
        """Wait for a text in the output."""
        self.until(lambda: text in self.output)

    def trainer(self) -> int:
        """Wait for the trainer's process."""
        self.until(self.pid_file.exists)
        self.until(lambda: self.pid_file.exists() and self.pid_file.read_text().endswith("]"))
        return int(json.loads(self.pid_file.read_text())[0])

    def healthy(self) -> bool:
        """Whether the dashboard answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def stop(self) -> tuple[int, float]:
        """SIGTERM: exit code and seconds until it is gone."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        return code, time.monotonic() - start

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            for pid in [*below(self.process.pid), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def processes() -> dict[int, tuple[str, int]]:
    """(state, parent) of each process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(entry.name)] = (state, int(parent))
    return found


def below(pid: int) -> list[int]:
    """All processes below one, zombies included."""
    every = processes()
    found = [child for child, (_, parent) in every.items() if parent == pid]
    return found + [further for child in found for further in below(child)]
