"""Containers of the real image, through the command line of a real Docker engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conftest import ROOT
from tests.container.stand_in import stand_in_base

IMAGE = "hybrid-vit-cascade:test"
WORKSPACE = "/workspace"


def docker(*arguments: str, check: bool = True) -> str:
    """Output of a docker command, stdout and stderr in one."""
    done = subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    if check and done.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout[-5000:]}")
    return done.stdout


def torch_requirement() -> str:
    """The version that the tests outside the container run on."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def revision() -> str:
    """The commit that is checked out."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def build_image() -> str:
    """The product's image on the stand-in base, from what would be sent to any engine; returns its name."""
    arguments = [
        f"BASE_IMAGE={stand_in_base()}",
        f"TORCH={torch_requirement()}",
        "TORCH_INDEX=",
        f"REVISION={revision().strip()}",
    ]
    options = [option for argument in arguments for option in ("--build-arg", argument)]
    docker("build", "--network", "host", "--platform", "linux/amd64", *options, "-t", IMAGE, str(ROOT))
    return IMAGE


class Container:
    """One container; removed with its anonymous volumes at the end of `with`."""

    def __init__(
        self,
        *arguments: str,
        workspace: Path | None = None,
        env: dict[str, str] | None = None,
        options: Sequence[str] = (),
        image: str = IMAGE,
    ) -> None:
        """Arguments are those of the entrypoint; `workspace` is mounted, port 6006 is published on loopback."""
        self.name = f"hvc-test-{uuid.uuid4().hex[:8]}"
        run = ["create", "--name", self.name, "--publish", "127.0.0.1::6006"]
        if workspace is not None:
            run += ["--volume", f"{workspace}:{WORKSPACE}"]
        for key, value in (env or {}).items():
            run += ["--env", f"{key}={value}"]
        self._create = [*run, *options, image, *arguments]

    def __enter__(self) -> Self:
        docker(*self._create)
        docker("start", self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- log of {self.name}\n{self.logs()}\n")
        docker("rm", "--force", "--volumes", self.name)

    def start(self) -> None:
        """Start it again."""
        docker("start", self.name)

    def kill(self) -> None:
        """SIGKILL for everything in it."""
        docker("kill", "--signal", "KILL", self.name)
        docker("wait", self.name)

    def stop(self, grace_s: int) -> float:
        """SIGTERM, then SIGKILL after `grace_s`; returns how long it took, in seconds."""
        started = time.monotonic()
        docker("stop", "--time", str(grace_s), self.name)
        return time.monotonic() - started

    def wait(self) -> int:
        """Wait for its end; returns the exit code of PID 1."""
        return int(docker("wait", self.name))

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command inside it."""
        return docker("exec", self.name, *command, check=check)

    def logs(self) -> str:
        """All that it printed since it was created."""
        return docker("logs", self.name, check=False)

    def state(self) -> dict[str, Any]:
        """The engine's view: Running, ExitCode, Health, ..."""
        state: dict[str, Any] = json.loads(docker("inspect", "--format", "{{json .State}}", self.name))
        return state

    @property
    def url(self) -> str:
        """Where the dashboard is from outside; the port changes with each start."""
        return f"http://{docker('port', self.name, '6006/tcp').split()[0]}"

    def wait_for(self, condition: Callable[[], Any], what: str, limit_s: float = 90.0, every_s: float = 0.1) -> None:
        """Poll a condition while the container runs."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if not self.state()["Running"] and not condition():
                raise AssertionError(f"the container ended, exit code {self.state()['ExitCode']}, before: {what}")
            assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
            time.sleep(every_s)

    def wait_for_log(self, text: str, count: int = 1, limit_s: float = 90.0) -> None:
        """Poll the log for a text."""
        self.wait_for(lambda: self.logs().count(text) >= count, f"{text!r} in the log", limit_s, every_s=0.3)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of a page from outside; 0 where nobody answers."""
        return fetch(self.url + path, headers)


def fetch(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a page; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
