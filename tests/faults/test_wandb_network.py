"""A network that hangs: Weights & Biases waits in processes of its own, and the trainer does not know."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tests.conftest import ROOT
from tests.runs import RUN, has_step, series, start, train, wait_until
from tests.supervised import below, processes
from tests.wandb_server import SilentServer, silent_server

GONE_WITHIN_S = 4.0
SHORT = (
    *("--stages", "stage_8", "--set", "stages.stage_8.epochs=1", "--set", "stages.stage_8.samples_per_epoch=60"),
    *("--set", "checkpoint.save_every_s=60"),
)
ENDLESS = ("--set", "stages.stage_8.samples_per_epoch=100000", "--set", "checkpoint.save_every_s=1")


def sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}


def inodes_of(ports: list[int]) -> set[str]:
    """Inodes of the sockets at these local TCP ports."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) in ports} - {"0"}


def owners(server: SilentServer, pids: set[int]) -> set[int]:
    """Which of these processes hold a connection to the server."""
    inodes = inodes_of(server.client_ports)
    return {pid for pid in pids if Path(f"/proc/{pid}/fd").is_dir() and sockets(pid) & inodes}


def step_time_s(workspace: Path) -> float:
    """The median step of a run."""
    return median(value for _, value in series(workspace / RUN)["perf/step_time_s"])


def test_the_trainer_never_loads_wandb() -> None:
    """Its half starts a process and writes into a pipe; the library is imported there alone."""
    program = "import sys, app.cascade; print([name for name in sys.modules if name.split('.')[0] == 'wandb'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_beside_a_network_that_hangs_finishes_at_its_own_pace(tmp_path: Path) -> None:
    """Exit code 0 and all points in TensorBoard; a step that waited once would have waited for seconds."""
    code, output = train(tmp_path / "off", *SHORT, env={"WANDB_MODE": "disabled"})
    assert code == 0, output
    with silent_server() as server:
        process = start(tmp_path / "on", *SHORT, env=server.env, fault="hurried_at_the_end")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert server.connections
    assert "Weights & Biases did not finish within 2.0 s; the next attempt sends the rest" in output
    steps = [[step for step, _ in series(tmp_path / on / RUN)["perf/step_time_s"]] for on in ("off", "on")]
    assert steps == [list(range(1, 31))] * 2
    assert step_time_s(tmp_path / "on") < 3 * step_time_s(tmp_path / "off") + 0.05


def test_a_stop_beside_a_network_that_hangs_is_as_quick_as_ever(tmp_path: Path) -> None:
    """143 in under four seconds while connections hang; they are not the trainer's, and nobody stays behind."""
    run = tmp_path / RUN
    with silent_server() as server:
        process = start(tmp_path, *ENDLESS, env=server.env)
        wait_until(lambda: bool(server.connections) and has_step(run, "stage_8", 5)(), process)
        helpers = set(below(process.pid))
        assert owners(server, helpers)
        assert owners(server, {process.pid}) == set()
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert time.monotonic() - begin < GONE_WITHIN_S
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 143, output
        deadline = time.monotonic() + 30
        while left := helpers & set(processes()):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.05)
    assert "the state is saved" in output
