"""Claims about what a container prepares for shells by SSH, and about the scripts that a person types at a desk."""

import os
import shutil
import subprocess

import pytest

from app.env import child_environment, shell_environment
from app.ops.runpod import read_template
from app.ops.startup import SSHD, runtime_folder, sshd_command, write_shell_file
from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = f"registry.example/ct@sha256:{'ab' * 32}"


def test_a_shell_by_ssh_gets_the_container_s_variables(tmp_path, monkeypatch):
    """Through a real shell, whatever characters are in them; readable by nobody else; others stay where they are."""
    strange = 'it\'s "$HOME" `id`\nsecond line'
    monkeypatch.setenv("WORKSPACE", strange)
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    monkeypatch.setenv("SOMETHING_ELSE", "x")
    old = tmp_path / "hybrid_vit_cascade.env"
    old.write_text("of the last start")
    old.chmod(0o644)
    path = write_shell_file(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    script = '. "$1"; printf "%s|%s|%s" "$WORKSPACE" "$WANDB_API_KEY" "$SOMETHING_ELSE"'
    shell = subprocess.run(["sh", "-c", script, "sh", path], env={}, capture_output=True, text=True, check=True)
    assert shell.stdout == f"{strange}|0123|"


def test_unset_and_empty_variables_are_left_out():
    """A shell must not take an empty variable for a setting."""
    environ = {"WORKSPACE": "/workspace", "CONFIG": " ", "PATH": "/bin", "AWS_SECRET": "x"}
    assert shell_environment(environ) == {"WORKSPACE": "/workspace", "PATH": "/bin"}


def test_a_child_process_gets_our_defaults(monkeypatch):
    """supervisord refuses to start while a variable that its file names is unset."""
    monkeypatch.delenv("PORT", raising=False)
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    env = child_environment({"TRAIN_ARGS": "--x"})
    assert (env["PORT"], env["LOG_LEVEL"], env["TRAIN_ARGS"]) == ("6006", "DEBUG", "--x")


def test_a_folder_that_cannot_be_written_is_replaced_by_a_private_one(tmp_path):
    """Secrets lie off the volume in any case."""
    assert runtime_folder(tmp_path) == tmp_path
    other = runtime_folder(tmp_path / "missing")
    assert other.stat().st_mode & 0o777 == 0o700
    other.rmdir()


def test_without_an_ssh_server_the_log_says_so(tmp_path, monkeypatch, caplog):
    """PUBLIC_KEY is set and there is no sshd: no reason to end."""
    monkeypatch.setattr("app.ops.startup.SSHD", str(tmp_path / "sshd"))
    assert sshd_command("ssh-ed25519 AAAA me", tmp_path) is None
    assert "PUBLIC_KEY is set, but there is no" in caplog.text
    assert SSHD == "/usr/sbin/sshd"


@pytest.mark.parametrize("script", ["runpod-template", "runpod-watch"])
def test_the_scripts_of_a_desk_say_what_they_need(script):
    """The real scripts, without a key."""
    env = {name: value for name, value in os.environ.items() if name != "RUNPOD_API_KEY"}
    arguments = ["abc", "--max-usd-per-hour", "0.5"] if script == "runpod-watch" else []
    command = [ROOT / "scripts" / script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 69
    assert "RUNPOD_API_KEY is not set" in done.stderr


def test_push_builds_for_amd64_and_pins_what_the_registry_has(tmp_path):
    """The real script; docker is one that writes down what it is asked."""
    for name in ("scripts", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("app", ".venv", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    docker = tools / "docker"
    docker.write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/asked"\n[ "$1" != inspect ] || echo "{DIGEST}"\n')
    docker.chmod(0o755)
    git = tools / "git"
    git.write_text(f"#!/bin/sh\necho {COMMIT}\n")
    git.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tmp_path / "scripts/push", "registry.example/ct:1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == [
        f"build --platform linux/amd64 --build-arg REVISION={COMMIT} --tag registry.example/ct:1 .",
        "push registry.example/ct:1",
    ]
    assert read_template(tmp_path / "docker/runpod-template.json")["image"] == DIGEST
