"""Claims about the money guard: where the price comes from, when a budget is used up, when a GPU idles."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.env import Environment
from app.errors import MachineError
from app.ops import money_guard
from app.ops.ledger import Ledger
from app.ops.ledger_history import Place
from app.ops.money_guard import IdleGpus, MoneyGuard, price_per_hour
from app.ops.nvml import Gpus
from app.ops.status import RunStatus
from app.workspace import RunDir
from tests.conftest import tiny_config
from tests.nvml_library import Card, Library, install
from tests.runpod_server import KEY, POD, RunPod, runpod

HOUR = 3600.0
ON_POD = {"RUNPOD_POD_ID": POD, "RUNPOD_API_KEY": KEY}


@pytest.fixture
def account() -> Iterator[RunPod]:
    """A RunPod account with a running pod for 0.44 USD per hour."""
    with runpod() as state:
        yield state


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with one attempt of an hour on a pod for 0.5 USD per hour."""
    folder = RunDir(tmp_path / "run")
    folder.ensure()
    began = time.time() - HOUR
    ledger = Ledger(folder, lambda: None, lambda _: 1, began=began, pod=POD, usd_per_hour=0.5)
    with ledger:
        ledger.start(Place("cpu", "stage_8", 0, 0, 0, 0.0), 0, None, None)
    return folder


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def guard(
    run_dir: RunDir, clock: Clock, *keys: str, usd_per_hour: float | None = 0.5, on_pod: bool = True
) -> MoneyGuard:
    """With some keys of `pod` set."""
    return MoneyGuard(tiny_config(*(f"pod.{key}" for key in keys)), run_dir, usd_per_hour, on_pod, clock)


def never() -> bool:
    """Nobody asks to stop."""
    return False


def test_the_variable_comes_before_the_api(account: RunPod) -> None:
    """And whoever sets it is not asked for a key. The machines of a cluster are alike."""
    assert price_per_hour(Environment.read({**ON_POD, "POD_COST_PER_HOUR": "1.25"}), never, account.url) == 1.25
    assert price_per_hour(Environment.read({"POD_COST_PER_HOUR": "1.25"}), never, machines=2) == 2.5
    assert account.requests == []


def test_on_a_pod_the_api_is_asked_once(account: RunPod, caplog: pytest.LogCaptureFixture) -> None:
    """A price of all its GPUs, per hour."""
    caplog.set_level(logging.INFO)
    assert price_per_hour(Environment.read(ON_POD), never, account.url) == 0.44
    assert account.paths() == ["/graphql"]
    assert "this pod costs 0.44 USD per hour" in caplog.text


def test_at_a_desk_nobody_is_asked(account: RunPod, caplog: pytest.LogCaptureFixture) -> None:
    """A key for the scripts may be there."""
    assert price_per_hour(Environment.read({"RUNPOD_API_KEY": KEY}), never, account.url) is None
    assert (account.requests, caplog.text) == ([], "")


def test_an_unknown_price_is_said_and_no_error(account: RunPod, caplog: pytest.LogCaptureFixture) -> None:
    """No key; an answer without a price; a refusal."""
    unknown = "the price of this pod is not known"
    assert price_per_hour(Environment.read({"RUNPOD_POD_ID": POD}), never, account.url) is None
    account.usd_per_hour = None
    assert price_per_hour(Environment.read(ON_POD), never, account.url) is None
    account.faults["/graphql"] = [403]
    assert price_per_hour(Environment.read(ON_POD), never, account.url) is None
    assert caplog.text.count(unknown) == 3
    for why in ("RUNPOD_API_KEY is not set", "does not say it", "403 Forbidden"):
        assert why in caplog.text
    assert KEY not in caplog.text


def test_an_api_that_does_not_answer_is_waited_for_no_longer_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts and says nothing; a stop cuts it short, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert price_per_hour(Environment.read(ON_POD), lambda: True, base) is None
        monkeypatch.setattr(money_guard, "PRICE_WITHIN_S", 0.2)
        assert price_per_hour(Environment.read(ON_POD), never, base) is None
    assert "no answer within 0 s" in caplog.text


def test_hours_are_counted_over_all_attempts(run_dir: RunDir) -> None:
    """One is on record; half an hour more is left, and then the trainer must end."""
    clock = Clock()
    limited = guard(run_dir, clock, "max_hours=1.5")
    limited.check()
    with limited:
        clock.now = 0.49 * HOUR
        assert not limited.over()
        assert limited.problem is None
        clock.now = 0.51 * HOUR
        assert limited.over()
    assert limited.problem is not None
    assert limited.problem.startswith(
        "training was ended: pod.max_hours (1.5) is used up: all attempts at this run together took 1 h 3"
    )
    assert limited.problem.endswith("To go on, raise pod.max_hours and start again")


def test_costs_are_counted_over_all_attempts(run_dir: RunDir) -> None:
    """0.50 USD are on record; this machine costs two USD per hour."""
    clock = Clock()
    limited = guard(run_dir, clock, "max_cost_usd=1.5", usd_per_hour=2.0)
    limited.check()
    clock.now = 0.49 * HOUR
    assert not limited.over()
    clock.now = 0.51 * HOUR
    assert limited.over()
    assert limited.problem is not None
    assert "pod.max_cost_usd (1.5) is used up: all attempts at this run together cost 1.52 USD" in limited.problem
    assert "raise pod.max_cost_usd" in limited.problem


@pytest.mark.parametrize("key", ["max_hours", "max_cost_usd"])
def test_a_start_with_the_budget_used_up_is_refused(run_dir: RunDir, key: str) -> None:
    """Exit code 69, with the key to raise; a higher one lets it train."""
    with pytest.raises(MachineError, match=rf"not started: pod.{key} \(0.25\) is used up.*To go on, raise pod.{key}"):
        guard(run_dir, Clock(), f"{key}=0.25").check()
    guard(run_dir, Clock(), f"{key}=2").check()


def test_without_budgets_nothing_is_refused(run_dir: RunDir) -> None:
    """The default: not even by a ledger that cannot be read."""
    clock = Clock()
    free = guard(run_dir, clock, usd_per_hour=None)
    run_dir.ledger.unlink()
    run_dir.ledger.mkdir()
    with pytest.raises(MachineError, match=r"ledger.jsonl: cannot be read: Is a directory"):
        guard(run_dir, clock, "max_hours=9").check()
    free.check()
    clock.now = 1e9
    with free:
        assert not free.over()


def test_a_cost_limit_without_a_price_is_refused_on_a_pod_and_said_elsewhere(
    run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit that nobody keeps is worse than none; a desk costs nothing."""
    with pytest.raises(
        MachineError, match=r"max_cost_usd \(5\) cannot be kept.*POD_COST_PER_HOUR.*or use pod.max_hours"
    ):
        guard(run_dir, Clock(), "max_cost_usd=5", usd_per_hour=None).check()
    at_a_desk = guard(run_dir, Clock(), "max_cost_usd=5", usd_per_hour=None, on_pod=False)
    at_a_desk.check()
    at_a_desk.check()
    assert caplog.text.count("so training goes on without it") == 1


def test_a_gpu_idles_from_its_first_reading_at_zero_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two that works is enough, and so is a run that does not train at the moment."""
    cards = Card("GPU-1", gpu_percent=0), Card("GPU-2", gpu_percent=0)
    install(monkeypatch, Library(*cards))
    clock, trains = Clock(), True
    idle = IdleGpus(Gpus(None, expected=True), lambda: trains, 5.0, clock)

    def seconds_at(now: float) -> float:
        clock.now = now
        idle.read()
        return idle.seconds

    assert [seconds_at(now) for now in (0.0, 5.0, 60.0)] == [0.0, 5.0, 60.0]
    cards[1].gpu_percent = 1
    assert seconds_at(65.0) == 0.0
    cards[1].gpu_percent = 0
    assert [seconds_at(now) for now in (70.0, 75.0)] == [0.0, 5.0]
    trains = False
    assert seconds_at(80.0) == 0.0


def test_a_gpu_that_does_not_answer_is_not_known_to_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a machine without one."""
    card = Card("GPU-1", gpu_percent=0)
    install(monkeypatch, Library(card))
    clock = Clock()
    idle = IdleGpus(Gpus(None, expected=True), lambda: True, 5.0, clock)
    idle.read()
    card.every = 15
    clock.now = 500.0
    idle.read()
    assert idle.seconds == 0.0
    install(monkeypatch, None)
    idle = IdleGpus(Gpus(None, expected=False), lambda: True, 5.0, clock)
    idle.read()
    clock.now = 900.0
    idle.read()
    assert idle.seconds == 0.0


def test_an_idle_gpu_ends_a_run_that_trains(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one whose status is an earlier attempt's, nor one that prepares data; with the real thread."""
    install(monkeypatch, Library(Card("GPU-1", gpu_percent=0)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status = RunStatus(run_dir)
    status(state="training")
    earlier = json.loads(run_dir.status.read_text())
    limited = guard(run_dir, Clock(), "max_idle_gpu_minutes=0.002")
    limited.check()

    def goes_on(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not limited.over():
            time.sleep(0.01)
        return not limited.over()

    with limited:
        assert earlier["time"] < time.time()
        assert goes_on(0.4)
        status(state="preparing data")
        assert goes_on(0.4)
        status(state="training")
        assert not goes_on(30.0)
    assert limited.problem is not None
    assert "all GPUs were at 0 %" in limited.problem
    assert "raise pod.max_idle_gpu_minutes" in limited.problem
