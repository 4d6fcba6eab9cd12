"""Claims about the rehearsal: what it calls different, and when it kills."""

from __future__ import annotations

import dataclasses
import statistics
import struct
from pathlib import Path

import pytest
import torch

from app.chaos_compare import Reference, different_points, read_state
from app.chaos_trainer import METHODS, PATIENCE, STARTUP_EVERY, Moments, Trainer, shortest_interval_s
from app.chaos_verdict import KillRecord, Verdict
from app.errors import Stopped
from app.ops.writers import TensorBoardLog
from app.workspace import RunDir

STARTUP_S, LEFT_S, SHORTEST_S = 4.0, 100.0, 1.5
WEIGHTS = "model_state_dict.weight"


def payload():
    """A checkpoint in small."""
    return {
        "model_state_dict": {"weight": torch.arange(6.0).reshape(2, 3)},
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "scaler_state_dict": {"scale": 1.0},
        "epoch": 1,
        "val_loss": 0.25,
        "config": {"seed": 0},
        "resume": {"ema_state_dict": {"weight": torch.zeros(2, 3)}, "step": 8, "epoch_seconds": 1.5},
    }


def make_run(folder: Path, losses=(0.5, 0.25), steps=(1, 2), **changed) -> RunDir:
    """A run folder with a final, a rolling checkpoint, and three curves."""
    run_dir = RunDir(folder)
    run_dir.ensure()
    torch.save({**payload(), **changed}, run_dir.checkpoint("stage_8", "final"))
    torch.save({"anything": len(steps)}, run_dir.checkpoint("stage_8", "last"))
    log = TensorBoardLog(run_dir.tensorboard)
    log.text("config", "the same at each start", 0)
    for step, loss in zip(steps, losses, strict=True):
        log.scalars({"stage_8/val_loss": loss, "stage_8/epoch_time": torch.rand(()).item()}, step)
    log.close()
    return run_dir


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """The undisturbed run."""
    return Reference(make_run(tmp_path / "reference"))


def test_equal_runs_are_equal(tmp_path, reference):
    """Rolling checkpoints, the config, seconds and the time of an epoch do not count."""
    resume = {**payload()["resume"], "epoch_seconds": 9.0}
    victim = make_run(tmp_path / "victim", resume=resume, config={"seed": 1})
    assert reference.different_checkpoints(victim) == []
    assert reference.different_curves(victim) == []
    assert list(reference.hashes) == ["stage_8_final.pt"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("model_state_dict", "weight"), WEIGHTS),
        (("optimizer_state_dict", "state", 0, "exp_avg"), "optimizer_state_dict.state.0.exp_avg"),
        (("resume", "ema_state_dict", "weight"), "resume.ema_state_dict.weight"),
    ],
)
def test_a_flipped_bit_is_found_and_named(tmp_path, reference, path, name):
    """The lowest bit of one number, in the weights, the optimizer and the EMA."""
    changed = payload()
    tensor = changed
    for key in path:
        tensor = tensor[key]
    tensor.view(torch.int32).view(-1)[0] ^= 1
    victim = make_run(tmp_path / "victim", **changed)
    expected = f"stage_8_final.pt: 1 of 3 tensors differ, such as {name}"
    assert reference.different_checkpoints(victim) == [expected]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"val_loss": 0.5}, "val_loss is 0.5, in the reference 0.25"),
        ({"epoch": 2}, "epoch is 2, in the reference 1"),
        ({"scaler_state_dict": {"scale": 2.0}}, "scaler_state_dict.scale is 2.0, in the reference 1.0"),
        ({"resume": {**payload()["resume"], "step": 9}}, "resume.step is 9, in the reference 8"),
    ],
)
def test_a_counter_or_a_loss_that_differs_is_named(tmp_path, reference, changed, text):
    """With both values."""
    victim = make_run(tmp_path / "victim", **changed)
    assert reference.different_checkpoints(victim) == [f"stage_8_final.pt: {text}"]


def test_missing_added_and_unreadable_files_are_named(tmp_path, reference):
    """A file less, a file more, a file that is none."""
    victim = make_run(tmp_path / "victim")
    final, best = victim.checkpoint("stage_8", "final"), victim.checkpoint("stage_8", "best")
    final.rename(best)
    found = reference.different_checkpoints(victim)
    assert found == ["stage_8_best.pt is not in the reference", "stage_8_final.pt is missing"]
    best.unlink()
    final.write_bytes(b"torn")
    (only,) = reference.different_checkpoints(victim)
    assert only.startswith("stage_8_final.pt cannot be read: ")


def test_the_hash_does_not_depend_on_the_file(tmp_path):
    """The same state in two files, one with other seconds and another config."""
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save(payload(), one)
    torch.save({**payload(), "config": {"seed": 5}}, other)
    assert read_state(one).sha256 == read_state(other).sha256


@pytest.mark.parametrize(
    ("steps", "losses", "text"),
    [
        ((1,), (0.5,), "stage_8/val_loss: step 2 missing"),
        ((1, 2, 3), (0.5, 0.25, 0.1), "stage_8/val_loss: step 3 not in the reference"),
        ((1, 2, 2), (0.5, 0.25, 0.25), "stage_8/val_loss: step 2 more than once"),
        ((2, 1), (0.25, 0.5), "stage_8/val_loss: its steps are not in ascending order"),
        (
            (1, 2),
            (0.5, 0.125),
            "stage_8/val_loss: 1 of 2 values differ, the first at step 2: 0.125, in the reference 0.25",
        ),
    ],
)
def test_a_seam_in_a_curve_is_named(tmp_path, reference, steps, losses, text):
    """A gap, a point too many, a step twice, a step back, another value."""
    victim = make_run(tmp_path / "victim", losses=losses, steps=steps)
    assert text in reference.different_curves(victim)


def test_a_missing_and_an_added_tag_are_named():
    """A curve less, a curve more."""
    points = [(1, struct.pack("<f", 0.5))]
    assert different_points("stage_8/val_loss", None, points) == "is missing"
    assert different_points("stage_8/val_loss", points, None) == "is not in the reference"


@pytest.mark.parametrize(
    "tag", ["ops/lost_steps", "perf/step_time_s", "gpu/0/power_w", "host/cpu_percent", "stage_8/epoch_time"]
)
def test_what_the_clock_says_may_differ_but_not_stand_twice(tag):
    """Other values and other steps are no seam; a step that stands twice is one."""
    assert different_points(tag, [(3, b"a"), (7, b"b")], [(3, b"c")]) is None
    assert different_points(tag, [(3, b"a")], None) is None
    assert different_points(tag, [(3, b"a"), (3, b"b")], [(3, b"c")]) == "step 3 more than once"


def test_kills_spread_over_the_training_and_the_start():
    """Never later than twice the interval; about one in six before the trainer trains; the rest fill the range."""
    moments = Moments(0, "mixed", SHORTEST_S)
    drawn = [moments.seconds(STARTUP_S, LEFT_S, 9, 0) for _ in range(600)]
    interval = LEFT_S / 10
    assert all(0 <= seconds <= STARTUP_S + 2 * interval for seconds in drawn)
    assert sum(seconds < STARTUP_S for seconds in drawn) == 600 // STARTUP_EVERY
    training = [seconds - STARTUP_S for seconds in drawn if seconds >= STARTUP_S]
    assert statistics.mean(training) == pytest.approx(interval, rel=0.1)
    assert min(training) < 0.1 * interval
    assert max(training) > 1.9 * interval
    assert {moments.method() for _ in range(50)} == set(METHODS["mixed"])


def test_the_same_seed_kills_at_the_same_moments():
    """And another one does not."""
    drawn = [[Moments(seed, "kill", SHORTEST_S).seconds(STARTUP_S, LEFT_S, 9, 0)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("seed", range(5))
def test_all_kills_fit_into_a_run_and_the_last_ones_hit_its_end(seed):
    """A run that keeps all that it does is hit in each of its quarters."""
    moments, done, hits = Moments(seed, "kill", SHORTEST_S), 0.0, []
    for number in range(40):
        done += max(0.0, moments.seconds(STARTUP_S, LEFT_S - done, 40 - number, 0) - STARTUP_S)
        hits.append(done)
    assert {int(4 * done / LEFT_S) for done in hits if done < LEFT_S} == {0, 1, 2, 3}


def test_a_run_that_stands_still_gets_more_time():
    """Whatever a trainer needs between two saves, it gets: the time doubles and never hits the start again."""
    moments = Moments(0, "kill", SHORTEST_S)
    times = [moments.seconds(STARTUP_S, 0.0, 1, stalled) for stalled in range(PATIENCE, PATIENCE + 12)]
    assert all(time > STARTUP_S + SHORTEST_S for time in times)
    assert times[-1] > 1000 * SHORTEST_S


def test_a_run_that_went_by_without_a_kill_hurries_the_next():
    """The time halves, so that a wrong estimate of the run's length cannot go on for ever."""
    moments = Moments(0, "kill", SHORTEST_S)
    for _ in range(20):
        moments.hurry()
    assert max(moments.seconds(0.0, 1e3, 1, 0) for _ in range(50)) < 0.01


def test_kills_of_a_run_leave_time_to_save():
    """As many as there are, but not more than two saves apart; at least one."""
    moments = Moments(0, "kill", shortest_interval_s(20.0))
    assert moments.kills_in(900.0, 10) == 10
    assert moments.kills_in(900.0, 200) == 22
    assert moments.kills_in(5.0, 200) == 1


def test_a_rehearsal_that_is_stopped_kills_its_trainer(tmp_path):
    """No trainer is left behind, and the stop is an error with its own exit code."""
    asked = iter([False, True])
    with pytest.raises(Stopped):
        Trainer(["--help"], tmp_path / "victim", lambda: next(asked)).run()


def verdict(**changed) -> Verdict:
    """Of two kills that went well."""
    kills = [
        KillRecord(1, "SIGKILL", 7.2, 0.1, -9, "stage_32", 41, "stage_32", 38, 3),
        KillRecord(2, "SIGTERM", 2.0, 0.4, 143, "stage_8", 12, "stage_16", 0, 0),
    ]
    fields = {"rounds": 1, "victims_s": 120.0, "kills": kills, "checkpoints": 13, "curves": 50}
    return Verdict("tiny.yaml", "mixed", 0, 2, {"stage_8_final.pt": "ab" * 32}, 100.0, **{**fields, **changed})


def test_a_good_verdict():
    """What a person reads."""
    table = verdict().table()
    assert "PASS: 2 kills, 1 run resumed to the end" in table
    assert "3  1.50 per kill, at most 3; 0 after SIGTERM" in table
    assert "20.0 s  10.0 s per kill; undisturbed, a run takes 100.0 s" in table
    assert "abababababab" in table
    kill, term = verdict().kills
    assert kill.line(10) == ("kill 1 of 10: SIGKILL after 7.2 s in stage_32 step 41; resumed at step 38, 3 steps lost")
    assert term.line(10) == (
        "kill 2 of 10: SIGTERM after 2.0 s in stage_8 step 12 (exit code 143 in 0.4 s); "
        "resumed at stage_16 step 0, 0 steps lost"
    )


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"reference_s": None}, "-  not known with --reference"),
        ({"victims_s": 60.0}, "-  not known: this machine was slower for the undisturbed run, 100.0 s"),
    ],
)
def test_a_time_that_cannot_be_known_is_not_printed(changed, text):
    """Without a timed reference, and where another load on the machine makes kills look like a gain."""
    found = dataclasses.replace(verdict(), **changed)
    assert text in found.table()
    assert found.passed


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"kills": []}, "given up after 0 kills of 2"),
        ({"unresumable": ["victim-1: a start ended by itself with exit code 74"]}, "1 start did not go on"),
        ({"different_checkpoints": ["victim-1: stage_8_final.pt is missing"]}, "1 checkpoint not equal"),
        ({"different_curves": ["a", "b"]}, "2 curves not equal"),
        (
            {
                "kills": [
                    KillRecord(number, "SIGTERM", 1.0, 0.4, 143, "stage_8", 5, "stage_8", 4, 1) for number in (1, 2)
                ]
            },
            "2 kills lost steps after exit code 143",
        ),
    ],
)
def test_each_finding_makes_it_fail(changed, problem):
    """And stands in the verdict's line."""
    failed = verdict(**changed)
    assert not failed.passed
    assert failed.summary() == f"FAIL: {problem}"
    assert failed.table().endswith(failed.summary())


def test_another_exit_code_after_sigterm_is_counted_and_borne():
    """As long as the run goes on."""
    kill = KillRecord(1, "SIGTERM", 1.0, 0.0, -15, None, 0, "stage_8", 0)
    found = verdict(kills=[kill, kill])
    assert found.passed
    assert found.other_codes == {"-15": 2}
    assert "2  2 x -15" in found.table()
