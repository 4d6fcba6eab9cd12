"""The dashboard as seen from outside the container."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chromium import Browser
from tests.conftest import TINY
from tests.container.engine import Container
from tests.container.test_browser import CURVES
from tests.runs import RUN

PASSWORD = "correct horse battery staple"
AUTHORIZATION = {"Authorization": "Basic " + base64.b64encode(f"any:{PASSWORD}".encode()).decode()}
LISTENING, LOOPBACK = "0A", "0100007F"
"""As /proc/net/tcp writes them."""
PORT = 6006


@pytest.fixture(scope="module")
def trained(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A container with a password whose run is finished."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY.read_text())
    env = {"CONFIG": "/workspace/tiny.yaml", "DASHBOARD_PASSWORD": PASSWORD}
    with Container(workspace=folder, env=env) as container:
        container.wait_for((folder / RUN / "DONE").exists, "DONE", limit_s=180)
        container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
        yield container


def test_only_the_dashboard_listens(trained: Container) -> None:
    """Port 6006 is the only one that another machine can reach; TensorBoard's own data server stays on loopback."""
    assert reachable_ports(trained) == {PORT}
    assert len(listening(trained) - {PORT}) <= 1


def test_nothing_but_health_without_the_password(trained: Container) -> None:
    """401 for every page; `/healthz` says that it is well and nothing about the run."""
    for path in ("/", "/status", "/data/runs", "/data/plugin/scalars/tags", "/nothing"):
        assert trained.get(path)[0] == 401, path
    status, body = trained.get("/healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok"})
    assert "tiny" in trained.get("/status", AUTHORIZATION)[1].decode()
    assert PASSWORD not in trained.logs()


def test_a_browser_shows_the_curves_of_the_run(trained: Container, tmp_path: Path) -> None:
    """The scalars page of what was really trained; `test_browser.py` compares drawn curves with known values."""
    with Browser(tmp_path / "profile", PASSWORD) as browser:
        # TensorBoard opens the first two groups, which are those of the machine, and what is searched for.
        assert browser.open(f"{trained.url}/#scalars&tagFilter=stage_8") == 200
        browser.wait_for(f"{CURVES}.some(curve => curve[0].startsWith('stage_8/'))")


def test_a_generated_password_is_printed_once_and_opens_the_door(workspace: Path) -> None:
    """Where none is set; an unresolved placeholder counts as unset."""
    env = {"CONFIG": "/workspace/tiny.yaml", "DASHBOARD_PASSWORD": "{{ RUNPOD_SECRET_dashboard }}"}
    with Container(workspace=workspace, env=env) as container:
        container.wait_for_log("/?token=")
        assert container.get("/status")[0] == 401
        password = container.logs().partition("/?token=")[2].split()[0]
        container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
        given = {"Authorization": "Basic " + base64.b64encode(f":{password}".encode()).decode()}
        assert container.get("/status", given)[0] == 200
        mode, owner = container.run("stat", "-c", "%a %U", "/run/hybrid_vit_cascade.password").split()
        assert (mode, owner) == ("600", "root")
        written = [path for path in workspace.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
        assert written == []


def listening(container: Container, local: bool = True) -> set[int]:
    """The TCP ports that something in a container listens on; without those of its loopback where asked."""
    rows = [row.split() for row in container.run("cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()]
    addresses = [fields[1].split(":") for fields in rows if fields[3] == LISTENING]
    return {int(port, 16) for address, port in addresses if local or address != LOOPBACK}


def reachable_ports(container: Container) -> set[int]:
    """The TCP ports of a container that another machine can reach."""
    return listening(container, local=False)
