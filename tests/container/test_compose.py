"""The compose files, read and run by a real docker-compose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.tags import names
from tests.conftest import ROOT
from tests.container.engine import fetch
from tests.container.test_resume import short_demo
from tests.integration.test_verbs import free_port


class Project:
    """A compose project of its own: project name, port and variables."""

    def __init__(self, folder: Path, **variables: str) -> None:
        """`folder` holds the compose files; variables are what a user exports or writes into .env."""
        self.folder = folder
        self.port = free_port()
        self.name = f"hvctest{self.port}"
        self.env = {**os.environ, "PORT": str(self.port), "COMPOSE_PROJECT_NAME": self.name, **variables}

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Output of docker-compose."""
        done = subprocess.run(
            ["docker-compose", *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"docker-compose {' '.join(arguments)}:\n{done.stdout[-5000:]}"
        return done.stdout

    def get(self, path: str) -> Any:
        """JSON of a page, None where it is not there yet."""
        status, body = fetch(f"http://localhost:{self.port}{path}")
        return json.loads(body) if status == 200 else None

    def tags(self, run: str) -> set[str]:
        """The scalar tags of a run through TensorBoard's API."""
        found = self.get("/data/plugin/scalars/tags") or {}
        return set(found.get(run, {}))

    def wait_for(self, condition: Callable[[], Any], what: str, limit_s: float) -> None:
        """Poll."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit_s} s: {what}\n{self.compose('logs', check=False)}"
            time.sleep(0.5)

    def health(self) -> str:
        """The engine's verdict on the container."""
        container = self.compose("ps", "-q", "trainer").strip()
        shown = ["docker", "inspect", "--format", "{{.State.Health.Status}}", container]
        return subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def files(image: str, tmp_path: Path) -> Path:
    """A folder with the compose files and nothing else."""
    (tmp_path / "docker").mkdir()
    for name in ("docker-compose.yml", "docker/compose.gpu.yml", "docker/compose.spot.yml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def project(files: Path, image: str) -> Iterator[Callable[..., Project]]:
    """Makes projects on the tested image, and takes them down with their volumes."""
    made = []

    def make(**variables: str) -> Project:
        made.append(Project(files, IMAGE=image, **variables))
        return made[-1]

    yield make
    for each in made:
        each.compose("down", "--volumes", "--timeout", "5")


def test_compose_up_trains_the_demo(project: Callable[..., Project]) -> None:
    """As it is, without any file or variable: curves of the first stage, a healthy container, loopback only."""
    demo = project()
    demo.compose("up", "--detach", "--no-build")
    demo.wait_for(lambda: "stage_16/train_loss_step" in demo.tags("demo/tensorboard"), "curves of stage_16", 300)
    demo.wait_for(lambda: demo.health() == "healthy", "healthy", 60)
    assert demo.compose("port", "trainer", "6006").strip() == f"127.0.0.1:{demo.port}"
    started = time.monotonic()
    demo.compose("stop")
    assert time.monotonic() - started < 6
    assert "the state is saved" in demo.compose("logs")


def test_the_api_gives_the_tags_of_stage_64(project: Callable[..., Project], files: Path) -> None:
    """The demo's networks with fewer patients and steps, from a folder of the host and variables in .env; as a spot pod
    that loses its container on the way."""
    (files / "workspace").mkdir()
    (files / "workspace/short.yaml").write_text(yaml.safe_dump(short_demo()))
    (files / ".env").write_text("CONFIG=/workspace/short.yaml\nWORKSPACE=./workspace\n")
    spot = ("-f", "docker-compose.yml", "-f", "docker/compose.spot.yml")
    short = project()
    short.compose(*spot, "up", "--detach", "--no-build")
    short.wait_for(lambda: "stage_32/val_loss" in short.tags("short/tensorboard"), "curves of stage_32", 300)
    short.compose(*spot, "kill")
    short.compose(*spot, "up", "--detach", "--no-build", "--force-recreate")
    short.wait_for(lambda: set(names("stage_64")) <= short.tags("short/tensorboard"), "tags of stage_64", 300)


def test_the_overlays_are_read(project: Callable[..., Project]) -> None:
    """GPU: a reservation, and the big config; spot: five seconds. The base asks for none of it."""
    files = ("-f", "docker-compose.yml", "-f")
    base = yaml.safe_load(project().compose("config"))["services"]["trainer"]
    gpu = yaml.safe_load(project().compose(*files, "docker/compose.gpu.yml", "config"))["services"]["trainer"]
    spot = yaml.safe_load(project().compose(*files, "docker/compose.spot.yml", "config"))["services"]["trainer"]
    assert "deploy" not in base
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu["environment"]["CONFIG"] == "configs/runpod.yaml"
    assert gpu["build"]["args"]["TORCH_INDEX"].endswith("/cu128")
    assert (base["stop_grace_period"], spot["stop_grace_period"], spot["restart"]) == ("15s", "5s", "always")
