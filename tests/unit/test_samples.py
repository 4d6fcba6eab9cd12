"""Claims about the loading processes, as the trainer's own children in real process groups."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

TRAINER = """
import os, signal, sys, threading, time
import torch
from app.train import samples

class Cases(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return {"hu": torch.full((1, 2, 2, 2), index, dtype=torch.int16), "xrays": torch.zeros(2, 2, 2)}

def workers():
    return [int(pid) for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split()]

def batches():
    return samples.batches(Cases(), [[index] for index in range(64)], torch.device("cpu"), (-1000.0, 1500.0), 2)

heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: heard.append(number))
exec(sys.argv[1])
"""


@pytest.fixture
def trainer() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Processes that load, each with its own group."""
    made: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        made.append(process)
        return process

    yield begin
    for process in made:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.communicate()


def words(process: subprocess.Popen[str]) -> list[str]:
    """The next line."""
    assert process.stdout is not None
    return process.stdout.readline().split()


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


LOADING = """
items = batches()
next(items)
print(*workers(), flush=True)
{wait}
print(heard[0], 1 + sum(1 for _ in items), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_leaves_the_workers_at_work(
    trainer: Callable[[str], subprocess.Popen[str]], number: signal.Signals
) -> None:
    """The trainer hears of it, and each batch of the epoch still arrives."""
    process = trainer(LOADING.replace("{wait}", "while not heard: time.sleep(0.01)"))
    assert len(words(process)) == 2
    os.killpg(process.pid, number)
    assert words(process) == [str(int(number)), "64"]
    assert process.wait(20) == 0


def test_there_is_no_moment_in_which_a_signal_ends_a_worker(trainer: Callable[[str], subprocess.Popen[str]]) -> None:
    """The whole group is signalled all the time while workers are forked: every one of them loads to the end."""
    process = trainer(
        """
print("ready", flush=True)
for _ in range(15):
    assert sum(1 for _ in batches()) == 64
print("loaded", len(heard) > 15, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("end", flush=True)
time.sleep(0.2)
"""
    )
    assert words(process) == ["ready"]
    signals = 0
    while process.poll() is None and signals < 1500:
        os.killpg(process.pid, signal.SIGTERM)
        signals += 1
        time.sleep(0.002)
    output, errors = process.communicate(timeout=60)
    assert output.split()[:2] == ["loaded", "True"], errors


def test_the_mask_is_put_back(trainer: Callable[[str], subprocess.Popen[str]]) -> None:
    """Blocked in the workers, and in the trainer only while it forks them."""
    process = trainer(
        """
items = batches()
next(items)
masks = [int(line.split()[1], 16) for pid in workers() for line in open(f"/proc/{pid}/status") if "SigBlk" in line]
want = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
print(len(masks), all(mask & want == want for mask in masks), len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
"""
    )
    assert words(process) == ["2", "True", "0"]


def test_the_workers_of_a_killed_trainer_are_gone_at_once(trainer: Callable[[str], subprocess.Popen[str]]) -> None:
    """torch's own look at the parent comes after 5 s; nobody waits for that."""
    process = trainer(LOADING.replace("{wait}", "time.sleep(60)"))
    pids = [int(pid) for pid in words(process)]
    assert [alive(pid) for pid in pids] == [True, True]
    process.kill()
    start = time.monotonic()
    while any(map(alive, pids)):
        assert time.monotonic() - start < 3
        time.sleep(0.01)


@pytest.mark.parametrize("leave", ["items.close()", "for _ in items: pass", "del items"])
def test_the_workers_of_an_epoch_end_with_it(trainer: Callable[[str], subprocess.Popen[str]], leave: str) -> None:
    """At its end and before it, without waiting for a time limit."""
    process = trainer(
        f"""
items = batches()
next(items)
start = time.monotonic()
{leave}
print(time.monotonic() - start, len(workers()))
"""
    )
    seconds, left = words(process)
    assert float(seconds) < 3
    assert left == "0"
    assert process.wait(20) == 0


def test_a_trainer_that_crashes_between_two_batches_ends(trainer: Callable[[str], subprocess.Popen[str]]) -> None:
    """Its traceback keeps the workers' iterator, and they do not hear the SIGTERM that multiprocessing sends."""
    process = trainer("items = batches()\nnext(items)\nprint(*workers(), flush=True)\nraise RuntimeError('crash')")
    pids = [int(pid) for pid in words(process)]
    assert process.wait(20) == 1
    assert process.stderr is not None
    assert process.stderr.read().rstrip().endswith("RuntimeError: crash")
    assert not any(map(alive, pids))
