"""A dashboard as its own process over a real event folder, and requests to it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from app.ops.layout import layout
from app.ops.writers import RunLog, TensorBoardLog
from app.workspace import RunDir, Workspace
from tests.conftest import ROOT

EPOCHS = 30
STAGES = ("stage_16", "stage_32")


def loss(stage: str, epoch: int) -> float:
    """A curve that falls, different for each stage."""
    return float(np.float32(0.05 + 1.0 / (epoch + STAGES.index(stage) + 1)))


def add_run(workspace: Workspace, name: str | None) -> RunDir:
    """What a trainer leaves: event files through the real writer, a status and a picture."""
    run_dir = workspace.run_dir(name)
    run_dir.ensure()
    log = RunLog(TensorBoardLog(run_dir.tensorboard))
    log.layout(layout(STAGES))
    for stage in STAGES:
        for epoch in range(EPOCHS):
            log.scalars({f"{stage}/val_loss": loss(stage, epoch), f"{stage}/train_loss": loss(stage, epoch)}, epoch)
            log.image(f"{stage}/pictures/3fa2", np.full((8, 8, 3), epoch, np.uint8), epoch)
    log.close()
    fields = {"state": "finished", "time": time.time(), "stage": "stage_32", "epoch": EPOCHS, "epochs": EPOCHS}
    run_dir.status.write_text(json.dumps({**fields, "step": 60, "steps": 60, "loss": 0.0123}))
    Image.new("RGB", (160, 90), "white").save(run_dir.progress_png)
    return run_dir


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def basic(password: str) -> dict[str, str]:
    """The header of HTTP Basic."""
    return {"Authorization": "Basic " + base64.b64encode(f"any:{password}".encode()).decode()}


class Answer:
    """Status, headers and body; `seconds` from the first byte sent to the last received."""

    def __init__(self, port: int, path: str, headers: dict[str, str], method: str = "GET", body: bytes = b"") -> None:
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            self.status, self.headers, self.body = answer.status, answer.headers, answer.read()
        finally:
            connection.close()
        self.seconds = time.monotonic() - started

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Dashboard:
    """`python -m app dashboard`, its log in a file; ends with the `with` block."""

    def __init__(self, folder: Path, workspace: Workspace, port: int | None = None, **variables: str) -> None:
        """`folder` gets the log and is the process's runtime folder."""
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "dashboard.log"
        # Nothing that this machine has set for its own dashboards.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("DASHBOARD_")}
        own = {"WORKSPACE": str(workspace.root), "PORT": str(self.port)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app", "dashboard", "--runtime", str(folder)],
                env={**inherited, **own, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        if error is not None:
            sys.stderr.write(self.log)

    @property
    def log(self) -> str:
        """All that it printed."""
        return self._log.read_text()

    def get(self, path: str, headers: dict[str, str] | None = None, **options: Any) -> Answer:
        """One request."""
        return Answer(self.port, path, headers or {}, **options)

    def wait_until_ready(self) -> None:
        """Until `/healthz` says ok."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.get("/healthz").status == 200:
                    return
            except (ConnectionError, http.client.HTTPException):
                pass
            time.sleep(0.05)
        raise AssertionError(f"the dashboard did not start:\n{self.log}")

    @property
    def children(self) -> list[int]:
        """Processes that it started and that live."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

    def terminate(self) -> tuple[int, float]:
        """SIGTERM; returns the exit code and the seconds until the end."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        return code, time.monotonic() - started
