"""Claims about the launcher without training: which exit code it ends with, how machines meet; with real processes."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import WorkerSpec

from app import launch, meeting
from app.env import ClusterNode
from app.errors import MachineError, Stopped
from app.launch import Agent
from app.meeting import Meeting, interface_to
from tests.no_hurry import NoHurry

PROCESS = "import os, signal, sys, time; rank = int(os.environ['RANK']); folder = sys.argv[1]\n"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


class Asked(NoHurry):
    """Whether to stop, as a test says."""

    def __init__(self, asked: bool = False) -> None:
        self.asked = asked

    def __call__(self) -> bool:
        return self.asked

    def at_once(self, work: Callable[[], None]) -> None:
        """Nobody signals."""


def ended(folder: Path, body: str, stop: Asked) -> int:
    """The exit code of a launcher whose two processes run `body`."""
    place = Meeting(None, stop)
    spec = WorkerSpec("train", 2, place, entrypoint=sys.executable, max_restarts=0, monitor_interval=0.02)
    agent = Agent(spec, place, [sys.executable, "-c", PROCESS + body, str(folder)], None, stop)  # type: ignore[arg-type]
    agent.run()
    return agent.exit_code()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(78)", 78),
        ("time.sleep(rank * 0.5); sys.exit(143)", 143),
        (f"{KILL} if rank == 1 else time.sleep(60)", 137),
        (f"time.sleep(rank * 0.3); {KILL} if rank == 1 else sys.exit(1)", 137),
        (f"{KILL} if rank == 0 else sys.exit(1)", 137),
        ("time.sleep(60) if rank else sys.exit(1)", 1),
    ],
)
def test_the_launcher_ends_with_the_first_failing_process_s_own_code(tmp_path: Path, body: str, code: int) -> None:
    """And with the signal that killed one, where the others only found it gone."""
    assert ended(tmp_path, body, Asked()) == code


def test_processes_that_leave_for_the_same_reason_have_the_time_to(tmp_path: Path) -> None:
    """The first one writes why after the second has gone; a SIGTERM would have cut that short."""
    body = (
        "time.sleep(0 if rank else launch); open(folder + '/REASON', 'w').write('x') if rank == 0 else 0; sys.exit(70)"
    )
    assert ended(tmp_path, body.replace("launch", str(launch.GONE_S + 1)), Asked()) == 70
    assert (tmp_path / "REASON").exists()


def test_a_process_that_does_not_leave_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is deaf to SIGTERM."""
    monkeypatch.setattr(launch, "LEAVE_S", 0.5)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60) if rank else (time.sleep(1), sys.exit(1))"
    assert ended(tmp_path, body, Asked()) == 1
    assert "did not leave in time and is killed" in caplog.text


def test_nothing_starts_after_a_signal(tmp_path: Path) -> None:
    """It came while the machines met, or before."""
    with pytest.raises(Stopped):
        ended(tmp_path, "open(folder + '/x', 'w')", Asked(True))
    assert not list(tmp_path.iterdir())


def test_a_machine_by_itself_listens_on_the_loopback_alone() -> None:
    """Nobody else can meet it."""
    info = Meeting(None, lambda: False).next_rendezvous()
    place = info.bootstrap_store_info
    assert (info.rank, info.world_size, place.master_addr) == (0, 1, "127.0.0.1")
    socket.create_connection(("127.0.0.1", place.master_port), 2).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", place.master_port), 2)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Meeting, Meeting, ClusterNode]:
    """Two machines that have met, and the place of the second."""
    monkeypatch.setattr(meeting, "POLL_S", 0.02)
    port = free_port()
    first, second = (Meeting(ClusterNode(rank, 2, "127.0.0.1", port), lambda: False) for rank in range(2))
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(second=second.next_rendezvous()))
    thread.start()
    info = first.next_rendezvous()
    thread.join(30)
    assert (info.rank, found["second"].rank, info.world_size, found["second"].world_size) == (0, 1, 2, 2)
    return first, second, second.node


def test_the_machine_that_ends_first_says_with_what(pair: tuple[Meeting, Meeting, ClusterNode]) -> None:
    """All of them hear of it, and a later code changes nothing."""
    first, second, _ = pair
    assert (first.over(), second.over()) == (None, None)
    assert second.announce(-9) == -9
    assert first.over() == -9
    assert first.announce(1) == -9
    second.leave(0)
    begin = time.monotonic()
    first.leave(5)
    assert time.monotonic() - begin < 5


def test_the_first_machine_stays_until_the_others_are_done(pair: tuple[Meeting, Meeting, ClusterNode]) -> None:
    """Its store is theirs; the other one leaves without an answer."""
    first, second, _ = pair
    staying = threading.Thread(target=first.leave, args=(30.0,))
    staying.start()
    staying.join(0.3)
    assert staying.is_alive()
    second.leave(30.0)
    staying.join(10)
    assert not staying.is_alive()


def test_a_new_launcher_on_a_machine_ends_the_group_of_the_old_one(
    pair: tuple[Meeting, Meeting, ClusterNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pod came back before anybody had noticed; it waits for the next group."""
    first, _, place = pair
    rounds = iter([False] * 20)
    with pytest.raises(Stopped):
        Meeting(place, lambda: next(rounds, True)).next_rendezvous()
    assert first.over() == 1


def test_a_machine_that_is_silent_is_gone(
    pair: tuple[Meeting, Meeting, ClusterNode], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The network may not say so."""
    first, second, _ = pair
    monkeypatch.setattr(meeting, "BEAT_S", 0.0)
    monkeypatch.setattr(meeting, "SILENT_S", 0.3)
    for _ in range(6):
        assert second.over() is None
        assert first.over() is None
        time.sleep(0.1)
    time.sleep(0.4)
    assert first.over() == 1
    assert "machine 1 of the run has been silent" in caplog.text


def test_a_machine_that_is_alone_gives_up_and_says_whom_it_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """69, on the first and on another one; each minute the log says that it waits."""
    monkeypatch.setattr(meeting, "POLL_S", 0.02)
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.1)
    monkeypatch.setattr(meeting, "NOTICE_S", 0.03)
    port = free_port()
    for rank, whom in ((0, "1 other machines"), (1, f"the first machine at 127.0.0.1:{port}")):
        with (
            caplog.at_level(logging.INFO),
            pytest.raises(MachineError, match=f"for {whom} .NUM_NODES is 2.. Start the same command on every machine"),
        ):
            Meeting(ClusterNode(rank, 2, "127.0.0.1", port), lambda: False).next_rendezvous()
        assert f"waiting for {whom}" in caplog.text


def test_a_place_that_cannot_be_listened_on_is_an_error() -> None:
    """A taken port, and a name that is none."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(MachineError, match=rf"127.0.0.1:{port} \(MASTER_ADDR, MASTER_PORT\) cannot be listened on"):
            Meeting(ClusterNode(0, 2, "127.0.0.1", port), lambda: False).next_rendezvous()
    with pytest.raises(MachineError, match=r"MASTER_ADDR 10\.\.65: no such address"):
        Meeting(ClusterNode(0, 2, "10..65", 1), lambda: False).next_rendezvous()


def test_the_interface_is_the_one_that_leads_to_the_address() -> None:
    """The loopback for a machine by itself."""
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("not an address") is None


def test_a_process_is_asked_to_stop_when_its_parent_is_gone() -> None:
    """Also where that was before it could be noticed."""
    child = (
        "import os, signal, sys, time; from app.ops.signals import stop_with; "
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), os._exit(0))); "
        "stop_with(int(sys.argv[1]) or os.getppid()); print('ready', flush=True); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", child, "1"], capture_output=True, timeout=30).stdout == b"asked\n"
    parent = (
        f"import os, signal, subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}, '0']); "
        "sys.stdin.read(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()
    assert process.stdout.readline() == b"asked\n"
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
