"""Two machines that train one run, as processes of this one: the curves of one, and only the first machine writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.ops.crash_budget import read_lines
from tests.runs import (
    RUN,
    SHORT,
    assert_same_curves,
    has_step,
    manifest,
    start,
    train,
    wait_until,
)
from tests.supervised import Container, below, processes

ADDRESSES = ("127.0.0.1", "127.0.0.2")
GONE_WITHIN_S = 4.0
LIMIT_S = 180.0

Places = list[dict[str, str]]
Start = Callable[..., Container]


@pytest.fixture
def places() -> Places:
    """What RunPod sets on each of two machines with a GPU each; the first one's port is free."""
    with socket.socket() as free:
        free.bind((ADDRESSES[0], 0))
        port = str(free.getsockname()[1])
    shared = {"NUM_NODES": "2", "NUM_TRAINERS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0]}
    shared |= {"PRIMARY_ADDR": ADDRESSES[0], "MASTER_PORT": port, "PRIMARY_PORT": port}
    return [{**shared, "NODE_RANK": str(rank), "NODE_ADDR": address} for rank, address in enumerate(ADDRESSES)]


@pytest.fixture
def supervised(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts machine `rank`'s trainer under supervision, or its container; both on one volume."""
    made = []

    def begin(rank: int, *arguments: str, **options: Any) -> Container:
        for name, value in places[rank].items():
            monkeypatch.setenv(name, value)
        folder = tmp_path / str(rank)
        if not folder.exists():
            folder.mkdir()
            (tmp_path / "volume").mkdir(exist_ok=True)
            (folder / "workspace").symlink_to(tmp_path / "volume")
        made.append(Container(folder, *arguments, **{"command": "supervise-trainer", **options}))
        return made[-1]

    yield begin
    for container in made:
        container.close()


def both_end(nodes: list[subprocess.Popen[str]], limit_s: float = LIMIT_S) -> list[str]:
    """Their outputs."""
    return [node.communicate(timeout=limit_s)[0] for node in nodes]


def test_the_second_machine_only_reads_the_cache_and_the_curves_are_those_of_one(
    tmp_path: Path, places: Places, alone: Path
) -> None:
    """The same command on both; of the volume the second one sees the cache alone, and leaves nothing beside it."""
    volumes = [tmp_path / "first", tmp_path / "second"]
    volumes[1].mkdir()
    (volumes[1] / "cache").symlink_to(volumes[0] / "cache")
    nodes = [start(volume, *SHORT, env=place) for volume, place in zip(volumes, places, strict=True)]
    first, second = both_end(nodes)
    assert [node.returncode for node in nodes] == [0, 0], first + second
    assert list(volumes[1].iterdir()) == [volumes[1] / "cache"]
    assert "processes: 1 on this machine, 2 in the run" in second
    assert "Traceback" not in first + second
    assert_same_curves(volumes[0] / RUN, alone)


def test_a_machine_that_does_not_see_the_volume_ends_both(tmp_path: Path, places: Places) -> None:
    """69 on both, with the folder that was looked for, once on each machine at most."""
    nodes = [start(tmp_path / str(rank), *SHORT, env=place) for rank, place in enumerate(places)]
    first, second = both_end(nodes)
    assert [node.returncode for node in nodes] == [69, 69], first + second
    text = f"{tmp_path / '1' / 'cache'}: 6 of 6 cases that the first machine has prepared are not here"
    assert first.count(text) == 1
    assert second.count(text) <= 1
    assert "Traceback" not in first + second
    assert not (tmp_path / "1").exists()


def test_a_signal_to_either_machine_saves_and_both_go_on(tmp_path: Path, places: Places, alone: Path) -> None:
    """SIGTERM to the second, then to the first: 143 on both within 4 s, nothing lost, no seam; on one shared volume."""
    run = tmp_path / RUN
    for signalled, stage, step in ((1, "stage_8", 1), (0, "stage_16", 1)):
        nodes = [start(tmp_path, *SHORT, env=place) for place in places]
        wait_until(has_step(run, stage, step), nodes[0])
        begin = time.monotonic()
        nodes[signalled].send_signal(signal.SIGTERM)
        first, second = both_end(nodes)
        assert time.monotonic() - begin < GONE_WITHIN_S
        assert [node.returncode for node in nodes] == [143, 143], first + second
        newest = max(manifest(run), key=lambda line: line["time"])
        assert f"step {newest['step']}; the state is saved" in first
        assert "Traceback" not in first + second
    code, output = train(tmp_path, *SHORT)
    assert code == 0, output
    assert "cost 0 steps" in output
    assert_same_curves(run, alone)


def test_lost_processes_and_machines_are_waited_for(supervised: Start, alone: Path) -> None:
    """The second machine's process is killed, then its launcher: one crash, and an interruption; no seam."""
    first, second = supervised(0, *SHORT), supervised(1, *SHORT)
    run = first.workspace / RUN
    first.until(has_step(run, "stage_8", 3), LIMIT_S)
    (worker,) = below(second.trainer())
    os.kill(worker, signal.SIGKILL)
    first.says("ended unexpectedly (SIGKILL of a process): crash 1 without progress")
    second.says("this machine's processes ended (137); started again in 1 s")
    first.until(has_step(run, "stage_16", 2), LIMIT_S)
    os.kill(second.trainer(), signal.SIGKILL)
    first.says("another machine of the run was stopped; started again, this one waits for it")
    codes = [machine.process.wait(LIMIT_S) for machine in (first, second)]
    for machine in (first, second):
        machine.close()
    assert codes == [0, 0], first.output + second.output
    ends = [line for line in read_lines(run / "attempts.jsonl") if line["event"] in ("crash", "end")]
    assert [(line["event"], line["code"]) for line in ends] == [("crash", 137), ("end", 143), ("end", 0)]
    assert "Traceback" not in first.output + second.output, first.output + second.output
    assert_same_curves(run, alone)


def test_a_budget_that_is_used_up_on_the_first_machine_ends_both(supervised: Start, tmp_path: Path) -> None:
    """It counts for both; then at a start, while the second machine waits for the first: 69 on both, state saved."""
    late = tmp_path / "late"
    clock = ("tests.on_pod", json.dumps({"api": "http://127.0.0.1:9", "late": str(late)}))
    long = ("--set", "stages.*.epochs=100000", "--set", "pod.max_hours=100")
    first, second = supervised(0, *long, program=clock), supervised(1, *long)
    run = first.workspace / RUN
    first.until(has_step(run, "stage_8", 2), LIMIT_S)
    late.touch()
    assert [machine.process.wait(LIMIT_S) for machine in (first, second)] == [69, 69]
    for machine in (first, second):
        machine.close()
    assert "pod.max_hours (100) is used up" in first.output
    assert "the state is saved" in first.output
    assert f"the first machine has ended the run, see {second.workspace / RUN / 'REASON'}" in second.output
    assert "started again in" not in first.output + second.output

    waiting = supervised(1, *long)
    waiting.trainer()
    refused = supervised(0, *long, "--set", "pod.max_hours=1e-9")
    assert [machine.process.wait(LIMIT_S) for machine in (refused, waiting)] == [69, 69]
    refused.close()
    assert "not started: pod.max_hours (1e-09) is used up" in refused.output


def test_the_second_machine_s_container_has_no_dashboard_and_writes_nothing(supervised: Start) -> None:
    """It waits for the first one, and leaves within a pod's five seconds; its volume is as empty as it was."""
    second = supervised(1, command="supervise")
    second.says("spawned: 'trainer'")
    second.until(lambda: second.pid_file.exists() and len(below(second.trainer())) == 0)
    time.sleep(1)
    assert "dashboard" not in second.output
    assert not second.healthy()
    family = below(second.process.pid)
    begin = time.monotonic()
    assert second.stop()[0] == 143
    assert time.monotonic() - begin < 5
    assert not set(family) & set(processes())
    assert list((second.workspace).iterdir()) == []
