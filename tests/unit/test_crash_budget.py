"""Claims about the crash budget and about refusals that stand."""

import json

import pytest

from app.errors import CheckpointError, ConfigError, CrashBudgetError, DataError, NumericsError
from app.ops.crash_budget import BUDGET, Attempts, progress
from app.ops.refusal import finished, forget_config_refusal, leave_reason, let_stand, refusal_key, standing_refusal
from app.workspace import RunDir
from tests.conftest import ROOT, tiny_config

SEGV = -11
WORKSPACE = ROOT / "app/workspace.py"


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run."""
    folder = RunDir(tmp_path / "run")
    folder.ensure()
    return folder


def commit(run_dir, stage, epochs, step, kind="last", size=3):
    """A checkpoint as the manifest knows it."""
    path = run_dir.checkpoint(stage, kind)
    path.write_bytes(b"x" * size)
    line = {"file": path.name, "stage": stage, "kind": kind, "epochs": epochs, "step": step, "sha256": "0"}
    with run_dir.manifest.open("a") as file:
        file.write(json.dumps({**line, "state": "pending"}) + "\n")
        file.write(json.dumps({**line, "state": "committed", "bytes": size}) + "\n")


def crash(run_dir, code=SEGV):
    """One attempt that crashes; another process counts it each time, as after a restart of the container."""
    Attempts(run_dir).started(1)
    Attempts(run_dir).ended(code, crashed=True)


def test_progress_is_the_furthest_checkpoint(run_dir):
    """Later stages, then epochs, then steps; what was only announced does not count."""
    assert progress(run_dir) == (0, 0, 0)
    commit(run_dir, "stage_64", 3, 30)
    commit(run_dir, "stage_128", 0, 5)
    commit(run_dir, "stage_64", 9, 90)
    assert progress(run_dir) == (128, 0, 5)
    with run_dir.manifest.open("a") as file:
        file.write(json.dumps({"stage": "stage_128", "epochs": 7, "step": 70, "state": "pending"}) + "\n{torn")
    assert progress(run_dir) == (128, 0, 5)


def test_the_budget_is_used_up_by_crashes_without_progress(run_dir):
    """The crash after the last restart that the budget allows."""
    commit(run_dir, "stage_64", 1, 10)
    for number in range(1, BUDGET + 1):
        crash(run_dir)
        assert len(Attempts(run_dir).crashes()) == number
        assert not Attempts(run_dir).exhausted()
    crash(run_dir, code=1)
    assert Attempts(run_dir).exhausted()
    assert Attempts(run_dir).crashes() == [SEGV] * BUDGET + [1]


def test_progress_refills_the_budget(run_dir):
    """One step further is enough; the crash at the new place is the first one there."""
    for step in range(1, 3 * BUDGET):
        commit(run_dir, "stage_64", 0, step)
        crash(run_dir)
        assert len(Attempts(run_dir).crashes()) == 1
    commit(run_dir, "stage_64", 0, 3 * BUDGET)
    assert Attempts(run_dir).crashes() == []


def test_ends_that_nobody_saw_are_interruptions(run_dir):
    """A killed pod takes its witness with it: starts without ends never use the budget up."""
    for _ in range(10 * BUDGET):
        Attempts(run_dir).started(1)
    assert Attempts(run_dir).crashes() == []
    crash(run_dir)
    Attempts(run_dir).started(1)
    assert Attempts(run_dir).crashes() == [SEGV]


def test_ends_by_signal_and_refusals_are_no_crashes(run_dir):
    """143 between crashes neither counts nor refills."""
    for code in (143, 65, 0):
        crash(run_dir)
        Attempts(run_dir).ended(code, crashed=False)
    assert len(Attempts(run_dir).crashes()) == 3


def test_a_torn_line_loses_only_itself(run_dir):
    """The ledger was being written when the pod was killed."""
    crash(run_dir)
    with run_dir.attempts.open("a") as file:
        file.write('{"event": "crash", "co')
    crash(run_dir)
    assert len(Attempts(run_dir).crashes()) == 2


def test_forgiven_crashes_do_not_count(run_dir):
    """After a change by the user the budget is whole again."""
    for _ in range(BUDGET + 1):
        crash(run_dir)
    Attempts(run_dir).forgive()
    assert not Attempts(run_dir).exhausted()


def refuse(run_dir, error, config, data):
    """The trainer leaves its reason, its supervisor lets it stand."""
    leave_reason(run_dir, error)
    let_stand(run_dir, error.exit_code, refusal_key(config, (), run_dir, data))


@pytest.mark.parametrize("error", [NumericsError("nan"), CrashBudgetError("again"), CheckpointError("other settings")])
def test_a_refusal_stands_until_something_changes(run_dir, tmp_path, error):
    """The same start is refused with the same words; other settings, checkpoints or patients are another try."""
    data = tmp_path / "data"
    data.mkdir()
    config = tiny_config()
    refuse(run_dir, error, config, data)
    found = standing_refusal(run_dir, refusal_key(config, (), run_dir, data))
    assert found is not None
    assert (found.exit_code, found.text) == (error.exit_code, f"exit code {error.exit_code}\n{error}")
    assert standing_refusal(run_dir, refusal_key(tiny_config("seed=1"), (), run_dir, data)) is None
    assert standing_refusal(run_dir, refusal_key(config, ("stage_8",), run_dir, data)) is None
    (data / "patient-1").mkdir()
    assert standing_refusal(run_dir, refusal_key(config, (), run_dir, data)) is None
    (data / "patient-1").rmdir()
    (data / "link to nothing").symlink_to("nowhere")
    assert standing_refusal(run_dir, refusal_key(config, (), run_dir, data)) is None
    (data / "link to nothing").unlink()
    commit(run_dir, "stage_8", 1, 4)
    assert standing_refusal(run_dir, refusal_key(config, (), run_dir, data)) is None


def test_a_deleted_reason_is_another_try(run_dir, tmp_path):
    """What the message tells the user to do."""
    refuse(run_dir, NumericsError("nan"), tiny_config(), tmp_path)
    run_dir.reason.unlink()
    assert standing_refusal(run_dir, refusal_key(tiny_config(), (), run_dir, tmp_path)) is None


@pytest.mark.parametrize("error", [DataError("no CT"), ConfigError("unknown key")])
def test_data_and_configuration_are_looked_at_again(run_dir, tmp_path, error):
    """Also where an earlier refusal stood in the same words."""
    refuse(run_dir, NumericsError("nan"), tiny_config(), tmp_path)
    refuse(run_dir, error, tiny_config(), tmp_path)
    assert standing_refusal(run_dir, refusal_key(tiny_config(), (), run_dir, tmp_path)) is None


def test_the_reason_of_an_unreadable_config_goes_when_it_can_be_read(run_dir):
    """It lay with the run without a name; other reasons stay."""
    leave_reason(run_dir, DataError("no CT"))
    forget_config_refusal(run_dir)
    assert run_dir.reason.exists()
    leave_reason(run_dir, ConfigError("unknown key"))
    forget_config_refusal(run_dir)
    assert not run_dir.reason.exists()


def finish(run_dir, config):
    """What a finished run leaves behind, as far as it is looked at."""
    from app.config_file import resolved_yaml

    for stage in config.stages:
        commit(run_dir, stage.name, stage.epochs, 1, kind="final")
    run_dir.config.write_text(resolved_yaml(config))
    run_dir.done.write_text("all stages are finished\n")


def test_done_holds_for_what_was_asked_for(run_dir):
    """The same config, also with other operational settings."""
    config = tiny_config()
    assert not finished(config, run_dir)
    finish(run_dir, config)
    assert finished(config, run_dir)
    assert finished(tiny_config("logging.log_every_n_steps=7"), run_dir)


@pytest.mark.parametrize("change", ["stages.stage_32.epochs=9", "seed=1"])
def test_done_does_not_hold_for_more(run_dir, change):
    """More epochs, or other settings: the trainer looks at it."""
    finish(run_dir, tiny_config())
    assert not finished(tiny_config(change), run_dir)


def test_done_does_not_hold_without_its_checkpoints(run_dir):
    """A final checkpoint is gone or cut short."""
    finish(run_dir, tiny_config())
    run_dir.checkpoint("stage_16", "final").write_bytes(b"x")
    assert not finished(tiny_config(), run_dir)
    run_dir.checkpoint("stage_16", "final").unlink()
    assert not finished(tiny_config(), run_dir)


def fail(run_dir, place="ValueError at app/x.py:1", step=7, code=1):
    """One attempt that ends by an error."""
    attempts = Attempts(run_dir)
    attempts.started(1)
    attempts._append({"event": "error", "error": place, "global_step": step})
    attempts.ended(code, crashed=True)


def test_an_error_is_known_by_its_kind_and_the_innermost_line_of_the_application(run_dir):
    """What it says, which may hold names and paths, is not written down."""
    try:
        commit(run_dir, "patient Miller", 1, 1)
    except ValueError as error:
        Attempts(run_dir).failed(error, 5)
    try:
        json.loads("{")
    except ValueError as error:
        Attempts(run_dir).failed(error, None)
    first, second = (json.loads(line) for line in run_dir.attempts.read_text().split("\n") if line)
    line = next(n for n, text in enumerate(WORKSPACE.read_text().splitlines(), 1) if "not the name of a check" in text)
    assert (first["error"], first["global_step"]) == (f"ValueError at app/workspace.py:{line}", 5)
    assert (second["error"], second["global_step"]) == ("JSONDecodeError at an unknown place", 0)
    assert "Miller" not in run_dir.attempts.read_text()


def test_the_same_error_at_the_same_step_asks_for_the_state_before_once(run_dir):
    """Twice, then the older state, then it is final; another try by the user begins anew."""
    assert Attempts(run_dir).repetition() is None
    fail(run_dir)
    assert not Attempts(run_dir).repetition().wants_fall_back
    fail(run_dir)
    assert Attempts(run_dir).repetition().wants_fall_back
    # Killed before it could fall back: the next one does.
    Attempts(run_dir).started(1)
    assert Attempts(run_dir).repetition().wants_fall_back
    Attempts(run_dir).fell_back("stage_64_last_previous.pt")
    assert not Attempts(run_dir).repetition().wants_fall_back
    assert not Attempts(run_dir).exhausted()
    fail(run_dir, step=6)
    found = Attempts(run_dir).repetition()
    assert (found.times, found.older_state, found.final) == (3, "stage_64_last_previous.pt", True)
    assert Attempts(run_dir).exhausted()
    Attempts(run_dir).forgive()
    assert Attempts(run_dir).repetition() is None
    assert not Attempts(run_dir).exhausted()


@pytest.mark.parametrize("other", [{"place": "ValueError at app/x.py:2"}, {"step": 8}, {"step": 6}])
def test_another_error_or_another_step_is_no_repetition(run_dir, other):
    """Each is the first of its kind."""
    fail(run_dir)
    fail(run_dir, **other)
    assert Attempts(run_dir).repetition().times == 1
    assert not Attempts(run_dir).repetition().wants_fall_back


def test_another_error_from_the_older_state_is_not_final(run_dir):
    """It has its own two tries, and the older state before that one; the budget of all crashes bounds it."""
    for place in ("A at app/x.py:1", "B at app/x.py:2", "C at app/x.py:3"):
        fail(run_dir, place)
        fail(run_dir, place)
        assert Attempts(run_dir).repetition().wants_fall_back
        assert Attempts(run_dir).exhausted() is (place[0] == "C")
        Attempts(run_dir).fell_back("stage_64_last_previous.pt")


def test_an_error_that_is_passed_after_falling_back_is_a_new_one(run_dir):
    """The same line of the program at a later step has its own two tries."""
    fail(run_dir)
    fail(run_dir)
    Attempts(run_dir).fell_back("stage_64_last_previous.pt")
    fail(run_dir, step=8)
    found = Attempts(run_dir).repetition()
    assert (found.times, found.fell_back, found.final) == (1, False, False)


def test_crashes_by_a_signal_are_no_errors(run_dir):
    """They say nothing about the step, even where an earlier trainer left an error without being seen to end."""
    fail(run_dir)
    crash(run_dir)
    assert Attempts(run_dir).repetition().times == 1
    Attempts(run_dir)._append({"event": "error", "error": "ValueError at app/x.py:1", "global_step": 7})
    crash(run_dir)
    assert Attempts(run_dir).repetition().times == 1
    fail(run_dir)
    assert Attempts(run_dir).repetition().times == 2


def test_a_hang_is_a_crash_whatever_the_exit_code(run_dir):
    """A trainer that could save its state when it was ended left with 143."""
    for _ in range(BUDGET + 1):
        Attempts(run_dir).started(1)
        Attempts(run_dir).ended(143, crashed=True, hung=True)
    assert Attempts(run_dir).crashes() == [None] * (BUDGET + 1)
    assert Attempts(run_dir).exhausted()
