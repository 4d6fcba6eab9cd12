"""The SSH server of a pod: there only with a key, and for nothing but that key."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.workspace import Workspace
from tests.container.engine import Container, docker
from tests.container.test_dashboard import reachable_ports
from tests.dashboard_process import add_run

PASSWORD = "correct horse battery staple"


@dataclass(frozen=True)
class Pod:
    """A container that got a public key, and the private half."""

    container: Container
    workspace: Path
    key: Path

    def ssh_options(self, *options: str) -> list[str]:
        """Of ssh, for this container and no other settings of this machine."""
        port = docker("port", self.container.name, "22/tcp").split()[0].rpartition(":")[2]
        fixed = [
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            f"UserKnownHostsFile={self.key.parent / 'known'}",
        ]
        return [*fixed, "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-p", port, *options]

    def ssh(self, *command: str, options: tuple[str, ...] | None = None) -> subprocess.CompletedProcess[str]:
        """A command in a shell by SSH."""
        options = ("-i", str(self.key)) if options is None else options
        line = ["ssh", *self.ssh_options(*options), "root@127.0.0.1", *command]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def pod(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """Waits for data, as a new pod does."""
    folder = tmp_path_factory.mktemp("pod")
    key, workspace = folder / "id", folder / "workspace"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    add_run(Workspace(workspace), "demo")
    env = {"PUBLIC_KEY": key.with_suffix(".pub").read_text(), "DASHBOARD_PASSWORD": PASSWORD, "RUN_NAME": "demo"}
    env |= {"CONFIG": "configs/real-small.yaml", "WANDB_MODE": "disabled", "SOMETHING_ELSE": "private"}
    with Container(workspace=workspace, env=env, options=("--publish", "127.0.0.1::22")) as container:
        container.wait_for_log("waiting for data")
        yield Pod(container, workspace, key)


def test_a_shell_with_the_key_works_as_the_container_does(pod: Pod) -> None:
    """The application, its workspace and its variables are there; what is not ours is not."""
    done = pod.ssh("bash -lc 'python -m app status && env'")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert {"RUN_NAME=demo", "WORKSPACE=/workspace"} <= set(done.stdout.splitlines())
    assert "SOMETHING_ELSE" not in done.stdout


def test_no_other_key_and_no_password_opens_it(pod: Pod) -> None:
    """The server does not even offer to ask for a password."""
    other = pod.key.with_name("other")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    for options in (("-i", str(other)), ("-o", "PubkeyAuthentication=no")):
        done = pod.ssh("true", options=options)
        assert done.returncode == 255
        assert "Permission denied (publickey)" in done.stderr


def test_rsync_brings_data_in(pod: Pod, tmp_path: Path) -> None:
    """Into the data folder, as the README says."""
    (tmp_path / "notes.txt").write_text("some data\n")
    shell = " ".join(["ssh", *pod.ssh_options("-i", str(pod.key))])
    command = ["rsync", "-a", "-e", shell, f"{tmp_path}/", "root@127.0.0.1:/workspace/data/"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert (pod.workspace / "data/notes.txt").read_text() == "some data\n"


def test_it_listens_only_where_a_key_is_given(pod: Pod) -> None:
    """With a key two ports can be reached; nothing private lies on the volume."""
    assert reachable_ports(pod.container) == {22, 6006}
    private = pod.container.run("bash", "-c", "cat /run/hybrid_vit_cascade_ssh/host_key").strip().splitlines()[1]
    on_volume = [path for path in pod.workspace.rglob("*") if path.is_file() and private.encode() in path.read_bytes()]
    assert on_volume == []
