"""Claims about what a run costs: by hand from seconds and prices, over all attempts, at each point of the curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from app.config_file import load_config
from app.env import Environment
from app.model.denoiser import StageModel
from app.ops.costs import CostMeter, Spent, StageWork, cost_lines, spent
from app.ops.ledger_history import Attempt, End, History, Place
from app.ops.status import RunStatus, read_status, status_json, status_text
from app.tags import COST, COST_AT_END, COST_PER_EPOCH
from app.train.flops import step_tflop, training_tflop
from app.workspace import RunDir
from tests.conftest import TINY

START = 1_700_000_000.0
HOUR = 3600.0
TWO_STAGES = (StageWork(0, 40, 4, tflop=1.0), StageWork(40, 10, 5, tflop=3.0))


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def attempt(number: int, began: float, **changes: object) -> Attempt:
    """One attempt on a pod, half a minute after its process began."""
    place = Place("cpu", "stage_8", 0, 0, 0, 0.0)
    first = Attempt(number, began, began + 30, "host", "pod1", place, None, 0, 0.0, 0.0, usd_per_hour=0.5)
    return dataclasses.replace(first, **changes)  # type: ignore[arg-type]


def three_attempts() -> History:
    """An hour for 0.5 USD; half an hour down; two hours at an unknown price; a quarter of an hour for 0.5 USD."""
    return History(
        [
            attempt(1, START),
            attempt(2, START + 1.5 * HOUR, down_s=0.5 * HOUR, usd_per_hour=None),
            attempt(3, START + 3.5 * HOUR, usd_per_hour=2.0),
        ]
    )


def test_what_all_attempts_cost_is_the_sum_of_their_hours_times_their_prices() -> None:
    """Down time costs nothing; an unknown price on a pod counts at the one that is given, and else at nothing."""
    history, until = three_attempts(), START + 3.75 * HOUR
    assert history.spent_s(until) == [HOUR, 2 * HOUR, 0.25 * HOUR]
    assert history.cost_usd(until) == pytest.approx(0.5 + 0 + 0.5)
    assert history.cost_usd(until, 0.1) == pytest.approx(0.5 + 0.2 + 0.5)


def test_without_any_price_there_is_no_cost() -> None:
    """At a desk an attempt costs nothing, whatever a pod costs later."""
    history = History([attempt(1, START, usd_per_hour=None, pod=None)])
    assert history.cost_usd(START + HOUR) is None
    assert history.cost_usd(START + HOUR, 4.0) == 0.0
    assert History().cost_usd(START) is None


def test_an_attempt_that_said_how_it_ended_costs_nothing_after_that() -> None:
    """Whenever one looks."""
    end = End("stopped", 143, 5, START + HOUR)
    assert History([attempt(1, START, end=end)]).spent_s(START + 99 * HOUR) == [HOUR]


def test_the_points_of_the_curves_by_hand() -> None:
    """3600 USD per hour is one a second; steps of two seconds; epochs of 4 steps; the last stage costs threefold."""
    clock = Clock()
    meter = CostMeter(3600.0, 100.0, TWO_STAGES, every_n_steps=5, clock=clock)
    clock.now = 10.0
    assert meter(1) == {COST: 110.0}
    found = {}
    for step in range(2, 41):
        clock.now += 2.0
        found[step] = meter(step)
    assert [step for step, points in found.items() if points] == [5, 10, 15, 20, 25, 30, 35, 40]
    # 8 steps later; 35 are left, and 10 steps of three times the arithmetic.
    assert found[5] == pytest.approx({COST: 118.0, COST_PER_EPOCH: 8.0, COST_AT_END: 118.0 + 70.0 + 60.0})
    # The next stage is measured by itself: its pace is known from its second step on.
    clock.now += 50.0
    assert meter(41) == {COST: pytest.approx(100 + 10 + 78 + 50)}
    for step in range(42, 46):
        clock.now += 7.0
        found[step] = meter(step)
    assert found[45] == pytest.approx({COST: 266.0, COST_PER_EPOCH: 35.0, COST_AT_END: 266.0 + 35.0})


def test_a_step_has_one_point() -> None:
    """An epoch's end tells of its last step again, after the validation."""
    meter = CostMeter(1.0, 0.0, TWO_STAGES, every_n_steps=1, clock=Clock())
    assert meter(1)
    assert meter(1) == {}


def test_an_attempt_that_resumes_in_a_later_stage_measures_that_one() -> None:
    """The stages before it are over."""
    clock = Clock()
    meter = CostMeter(3600.0, 0.0, TWO_STAGES, every_n_steps=1, clock=clock)
    meter(46)
    clock.now = 4.0
    assert meter(47) == pytest.approx({COST: 4.0, COST_PER_EPOCH: 20.0, COST_AT_END: 4.0 + 12.0})


def test_a_step_s_arithmetic_is_counted_without_a_model() -> None:
    """From shapes alone it is the same as of the real one; the generator of random numbers does not move."""
    config = load_config(TINY, [], Environment.read({}))
    before = torch.get_rng_state()
    counted = [step_tflop(config, stage) for stage in config.stages]
    assert torch.equal(before, torch.get_rng_state())
    assert counted == [stage.batch * training_tflop(StageModel(config, stage)) for stage in config.stages]
    assert counted == sorted(counted)


def run_with(tmp_path: Path, *attempts: Attempt) -> RunDir:
    """A run whose ledger has these attempts."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.ensure()
    lines = []
    for each in attempts:
        start = {key: value for key, value in dataclasses.asdict(each).items() if key not in ("end", "first_step")}
        lines.append({"event": "start", **start})
        if each.end is not None:
            lines.append({"event": "end", "attempt": each.number, **dataclasses.asdict(each.end)})
    run_dir.ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run_dir


def test_the_newest_step_is_the_last_sign_of_life(tmp_path: Path) -> None:
    """A killed attempt has no line for its end, but the mark of its steps has a time."""
    run_dir = run_with(tmp_path, attempt(1, START))
    assert spent(run_dir) == Spent(1, 30.0, pytest.approx(0.5 * 30 / HOUR))
    run_dir.step_mark.write_text(f"{9:20d}{12.0:20.3f}{START + HOUR:20.3f}\n")
    assert spent(run_dir) == Spent(1, HOUR, pytest.approx(0.5))


def test_a_ledger_of_an_older_version_has_no_prices(tmp_path: Path) -> None:
    """It is read all the same."""
    run_dir = run_with(tmp_path, attempt(1, START))
    run_dir.ledger.write_text(run_dir.ledger.read_text().replace(', "usd_per_hour": 0.5', ""))
    assert spent(run_dir) == Spent(1, 30.0, None)
    assert spent(RunDir(tmp_path), 0.5) == Spent(0, 0.0, 0.0)


def test_the_status_shows_the_cost(tmp_path: Path) -> None:
    """For people a line, for programs the figures; without a price neither line nor figure."""
    run_dir = run_with(tmp_path, attempt(1, START, end=End("stopped", 143, 5, START + 2 * HOUR)))
    status = RunStatus(run_dir)
    status.note(usd_per_hour=0.5, cost_per_epoch_usd=0.25, cost_at_end_usd=7.0)
    status(state="training", stage="stage_8")
    text = status_text(run_dir, read_status(run_dir))
    assert (
        "\ncost      1.00 USD so far, in 2 h 00 min; 0.5 USD per hour; an epoch of stage_8 costs 0.25 USD, the run "
        "7.00 USD at this pace\n"
    ) in text
    found = json.loads(status_json(run_dir, read_status(run_dir)))
    assert found["ledger"]["spent"] == {"attempts": 1, "seconds": 2 * HOUR, "usd": 1.0}
    assert found["cost_at_end_usd"] == 7.0
    status.note(usd_per_hour=None, cost_per_epoch_usd=None, cost_at_end_usd=None)
    status(state="finished")
    fields = read_status(run_dir)
    assert not [name for name in fields if "usd" in name]
    assert cost_lines(Spent(1, 5.0, None), fields) == []
