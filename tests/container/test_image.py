"""Claims about the image itself: what is in it, and what its ENTRYPOINT does with arguments."""

from __future__ import annotations

import json
import subprocess

from tests.conftest import ROOT
from tests.container.engine import docker, revision

CODE = "/opt/hybrid_vit_cascade"


def run(image: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a container with these arguments and nothing mounted."""
    done = subprocess.run(
        ["docker", "run", "--rm", image, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_the_image_holds_the_tracked_code_and_its_commit_and_nothing_else(image: str) -> None:
    """Neither the tests nor what lies about in a working tree."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    starts = ("docker/entrypoint.sh", "docker/profile.sh", "docker/supervisord.conf", "requirements.txt")
    expected = {name for name in tracked if name.startswith(("app/", "configs/")) or name in starts}
    _, output = run(image, "bash", "-c", f"cd {CODE} && find . -type f -not -name '*.pyc'")
    assert {line.removeprefix("./") for line in output.split()} == expected | {"REVISION"}
    assert run(image, "bash", "-c", f"cat {CODE}/REVISION") == (0, revision())


def test_no_build_tools_and_no_keys_are_left(image: str) -> None:
    """No compiler and no pip; host keys in an image would be everybody's keys."""
    _, output = run(
        image, "bash", "-c", "command -v gcc cc g++ make pip pip3; ls /etc/ssh/ssh_host_* 2>/dev/null; true"
    )
    assert output == ""


def test_the_image_names_its_port_volume_and_health_check(image: str) -> None:
    """What `docker inspect` and RunPod's console read."""
    config = json.loads(docker("inspect", "--format", "{{json .Config}}", image))
    assert list(config["ExposedPorts"]) == ["6006/tcp"]
    assert list(config["Volumes"]) == ["/workspace"]
    assert config["Entrypoint"] == [f"{CODE}/docker/entrypoint.sh"]
    assert "/healthz" in config["Healthcheck"]["Test"][-1]
    assert config["Labels"]["org.opencontainers.image.title"] == "hybrid-vit-cascade"
    assert {"NVIDIA_DRIVER_CAPABILITIES=compute,utility", "NVIDIA_DISABLE_REQUIRE=1"} <= set(config["Env"])
    assert json.loads(docker("inspect", "--format", "{{json .Architecture}}", image)) == "amd64"


def test_arguments_choose_a_command(image: str) -> None:
    """A command of the application with its own exit code, a shell, and a word that is neither."""
    code, output = run(image, "status")
    assert (code, "no run has started here" in output) == (69, True), output
    assert run(image, "bash", "-c", "echo $0 $PWD && exit 3") == (3, f"bash {CODE}\n")
    code, output = run(image, "sing")
    assert (code, "invalid choice: 'sing'" in output) == (2, True), output


def test_a_shell_finds_the_application_from_anywhere(image: str) -> None:
    """In any folder, on a root that cannot be written."""
    command = ["--read-only", "--entrypoint", "bash", image, "-c", "cd / && python -m app --help"]
    assert "usage: python -m app" in docker("run", "--rm", *command)


def test_the_code_is_compiled(image: str) -> None:
    """Every module is there compiled, so that a start writes nothing and compiles nothing."""
    listing = f"cd {CODE} && find app -name '*.py' | wc -l && find app -name '*.pyc' | wc -l"
    _, output = run(image, "bash", "-c", listing)
    modules, compiled = map(int, output.split())
    assert modules == compiled > 40
