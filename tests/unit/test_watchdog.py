"""Claims about signs of life: what counts as silence, and what is done about it, with small real processes."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.env import Environment
from app.log import also_in_file
from app.ops import watchdog
from app.ops.watchdog import BEAT, BEAT_EVERY_S, Beat, Silence, Watchdog, process_state
from tests.conftest import ROOT

CHILD = """
import argparse, os, signal, sys, time
from app.ops.watchdog import Beat
parser = argparse.ArgumentParser()
parser.add_argument("--beat-fd", type=int)
stop = Beat(lambda: False, parser.parse_args().beat_fd)
"""
"""A trainer as far as its watchdog can tell."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading end, which does not wait, and writing end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    faulthandler.unregister(signal.SIGUSR1)
    for end in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(end)


def watched(body: str, limit_s: float, stop: Callable[[], bool] = lambda: False) -> tuple[int, bool, float]:
    """Exit code, whether it hung, and after how many seconds, of a child that runs `body`."""
    with Watchdog(limit_s, stop, contextlib.nullcontext) as dog:
        begin = time.monotonic()
        child = dog.start([sys.executable, "-c", CHILD + body], {**os.environ, "PYTHONPATH": str(ROOT)})
        code, hung = dog.wait(child)
    return code, hung, time.monotonic() - begin


def test_silence_is_what_somebody_listened_to() -> None:
    """It grows while one listens, ends with a sign of life, and is not there for one who was away."""
    silence = Silence(100.0)
    assert [silence.seconds(False, 100.0 + tenth / 10) for tenth in (1, 2, 11)] == pytest.approx([0.1, 0.2, 1.1])
    assert silence.seconds(True, 101.2) == 0
    assert silence.seconds(False, 102.2) == pytest.approx(1.0)
    assert silence.seconds(False, 1000.0) == 0
    assert silence.seconds(False, 1001.5) == pytest.approx(1.5)


def test_a_beat_is_written_at_most_twice_a_second_and_asks_the_same(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once; asking often costs nothing and answers what the real question answers."""
    reader, writer = pipe
    now, asked = [50.0], [False]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    beat = Beat(lambda: asked[0], writer)
    assert [beat() for _ in range(5)] == [False] * 5
    assert os.read(reader, 100) == BEAT
    now[0] += BEAT_EVERY_S
    asked[0] = True
    assert beat()
    assert os.read(reader, 100) == BEAT


def test_nobody_listening_changes_nothing(pipe: tuple[int, int]) -> None:
    """A full pipe, and one whose reader is gone."""
    reader, writer = pipe
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, BEAT * 4096)
    beat = Beat(lambda: False, writer)
    assert not beat()
    os.close(reader)
    beat._last = 0.0
    assert not beat()


def test_a_process_that_works_is_left_alone() -> None:
    """For longer than the limit; its exit code is its own."""
    code, hung, seconds = watched("for _ in range(25): stop(); time.sleep(0.1)\nsys.exit(7)", limit_s=1.5)
    assert (code, hung) == (7, False)
    assert seconds > 2.5


def test_a_hang_is_ended_with_its_stacks_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never asks again and does not hear SIGTERM: killed, with the line on which it stood."""
    monkeypatch.setattr(watchdog, "SAVING_TAKES_S", 0.5)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nstop()\ndef stuck():\n    time.sleep(100)\nstuck()"
    code, hung, seconds = watched(body, limit_s=1.5)
    assert (code, hung) == (-signal.SIGKILL, True)
    assert 1.5 < seconds < 10
    assert "the trainer hangs: no sign of life for" in caplog.text
    assert "it sleeps. It is ended and started again from its last checkpoint" in caplog.text
    assert "most recent call first" in caplog.text
    assert "in stuck" in caplog.text


def test_a_stopped_process_says_where_it_was_and_may_save(caplog: pytest.LogCaptureFixture) -> None:
    """SIGSTOP: its stacks when it is continued, then its own answer to SIGTERM."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nstop()\n"
        "def here():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(100)\nhere()"
    )
    code, hung, _ = watched(body, limit_s=1.5)
    assert (code, hung) == (143, True)
    assert "it is stopped (SIGSTOP)" in caplog.text
    assert "in here" in caplog.text


def test_a_hang_before_the_first_sign_of_life_is_one_too(caplog: pytest.LogCaptureFixture) -> None:
    """No handler is in place yet, so there are no stacks; it ends all the same."""
    with Watchdog(1.0, lambda: False, contextlib.nullcontext) as dog:
        code, hung = dog.wait(dog.start(["sleep", "100", ";"], dict(os.environ)))
        assert not hung
        assert code > 0
        child = dog.start(["sh", "-c", "sleep 100"], dict(os.environ))
        assert dog.wait(child) == (-signal.SIGUSR1, True)
    assert "(it does not say)" in caplog.text


def test_no_worker_is_left(tmp_path: Path) -> None:
    """A process that the trainer forked would hold the run lock and whatever else it inherited."""
    pid = tmp_path / "pid"
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "if os.fork() == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"    open({str(pid)!r}, 'w').write(str(os.getpid()))\n    time.sleep(100)\n"
        "time.sleep(100)"
    )
    code, hung, _ = watched(body, limit_s=1.5)
    assert (code, hung) == (143, True)
    worker = int(pid.read_text())
    deadline = time.monotonic() + 5
    while process_state(worker) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_state(worker) in ("", "Z")


def test_once_somebody_wants_to_stop_nothing_is_a_hang() -> None:
    """Whoever asked has a time limit of his own."""
    code, hung, seconds = watched("time.sleep(1.5)\nsys.exit(5)", limit_s=0.5, stop=lambda: True)
    assert (code, hung) == (5, False)
    assert seconds >= 1.5


def test_a_watchdog_that_was_stopped_itself_concludes_nothing() -> None:
    """The whole container was frozen: counting begins anew, and the child goes on."""
    supervisor = f"""
import contextlib, os, sys
from app.ops.watchdog import Watchdog
with Watchdog(2.5, lambda: False, contextlib.nullcontext) as watchdog:
    child = watchdog.start([sys.executable, "-c", {CHILD!r} + "stop(); time.sleep(4.7); sys.exit(9)"], dict(os.environ))
    print(child.pid, flush=True)
    print(*watchdog.wait(child))
"""
    process = subprocess.Popen([sys.executable, "-c", supervisor], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    time.sleep(0.7)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=30)
    assert output.split() == ["9", "False"]
    assert process_state(child) == ""


def ended_by_request(on_sigterm: str, ready: Path) -> tuple[int, bool]:
    """Exit code, and whether it hung, of a child that is told to end once it has its handler."""
    body = (
        f"from pathlib import Path\nsignal.signal(signal.SIGTERM, {on_sigterm})\nPath({str(ready)!r}).touch()\n"
        "while True: stop(); time.sleep(0.01)"
    )
    with Watchdog(60.0, lambda: False, contextlib.nullcontext) as dog:
        child = dog.start([sys.executable, "-c", CHILD + body], {**os.environ, "PYTHONPATH": str(ROOT)})
        return dog.wait(child, ready.exists)


def test_a_trainer_that_is_told_to_end_saves_and_ends(tmp_path: Path) -> None:
    """SIGTERM once, and its own exit code."""
    assert ended_by_request("lambda *_: os._exit(143)", tmp_path / "ready") == (143, False)


def test_a_trainer_that_does_not_end_when_told_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs money, and its silence is not waited for."""
    monkeypatch.setattr(watchdog, "SAVING_TAKES_S", 1.0)
    assert ended_by_request("signal.SIG_IGN", tmp_path / "ready") == (-signal.SIGKILL, False)
    assert "the trainer did not end within 1 s of SIGTERM: it is killed" in caplog.text


def test_lines_reach_the_file_within_the_block_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without secrets, after what stands there; a file that cannot be written keeps nobody from speaking."""
    (tmp_path / "train.log").write_text("the line before\n")
    env = Environment.read({"WANDB_API_KEY": "0123456789"})
    log = logging.getLogger("app.x")
    with also_in_file(tmp_path, env):
        log.error("inside, key 0123456789")
    log.error("outside")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0] == "the line before"
    assert lines[1].endswith("ERROR app.x: inside, key [hidden]")
    assert len(lines) == 2
    with also_in_file(tmp_path / "train.log", env):
        log.error("nowhere to write")
    assert "nowhere to write" in caplog.text
