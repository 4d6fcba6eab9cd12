"""Claims about the verbs that a person types, with the real scripts."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_up_says_that_the_port_is_taken(tmp_path):
    """Before anything is installed or started."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        env = {**os.environ, "PORT": str(port), "WORKSPACE": str(tmp_path)}
        done = subprocess.run([ROOT / "scripts/up"], env=env, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 69
    assert done.stderr == (
        f"error: port {port} is taken on this machine: stop what listens there, or choose another: PORT=6007 "
        "scripts/up\n"
    )


def test_a_verb_says_which_python_it_needs(tmp_path):
    """In a clone without .venv, on a machine whose only Python is too old."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "env"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.10\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts/lint"], env={"PATH": str(tools)}, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 69
    assert done.stderr == (
        "error: Python 3.11, 3.12 or 3.13 is needed and none is on PATH (python3 is: Python 3.8.10). Install one, for "
        "example: apt-get install python3.11 python3.11-venv\n"
    )


def test_tensorboard_outlives_a_refused_trainer_and_ctrl_c_ends_both(tmp_path):
    """A wrong override: its message and the notice reach the terminal, TensorBoard serves, nothing is left behind."""
    port = free_port()
    env = {**os.environ, "PORT": str(port), "WORKSPACE": str(tmp_path)}
    command = [ROOT / "scripts/up", "configs/demo.yaml", "--set", "run_name=a b"]
    log = tmp_path / "terminal.txt"
    with log.open("wb") as terminal:
        up = subprocess.Popen(command, env=env, stdout=terminal, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: "TensorBoard stays on" in log.read_text(), up)
        wait_for(lambda: serves(port), up)
    finally:
        os.killpg(up.pid, signal.SIGINT)
        up.wait(30)
    text = log.read_text()
    assert "--set run_name=a b: run_name: expected text matching" in text
    assert "exited: trainer (exit status 78; expected)" in text
    assert text.count("spawned: 'trainer'") == 1
    assert f"TensorBoard stays on http://localhost:{port}." in text
    assert not serves(port)


def serves(port):
    """Whether TensorBoard answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def wait_for(condition, process, limit_s=60):
    """Polls until the condition holds; fails when the process ends first or the time is up."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, "scripts/up ended on its own"
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.2)
