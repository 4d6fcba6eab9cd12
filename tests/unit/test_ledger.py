"""Claims about the ledger of a run: what each line says, what a torn one costs, and the goodput."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import AppError, DataError, LockError, NumericsError, Stopped
from app.ops.crash_budget import Attempts
from app.ops.ledger import Ledger
from app.ops.ledger_history import History, Place, kind_of, read_history
from app.ops.ledger_table import as_json, markdown, text_table, totals
from app.ops.status import RunStatus, read_status, status_json, status_text
from app.ops.step_mark import Mark
from app.workspace import RunDir

START = 1_700_000_000.0


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """The folder of a run."""
    folder = RunDir(tmp_path / "run")
    folder.ensure()
    return folder


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the ledger."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: seconds)

    at(START)
    return at


def exit_code(error: BaseException) -> int:
    """As the application's."""
    return error.exit_code if isinstance(error, AppError) else 1


def ledger(run_dir: RunDir, began: float = START, fence: Callable[[], None] = lambda: None) -> Ledger:
    """This attempt's lines."""
    return Ledger(run_dir, fence, exit_code, began=began, pod="pod1")


def place(step: int = 0, run_seconds: float = 0.0) -> Place:
    """In the first stage."""
    return Place("cpu", "stage_8", step // 4, step, step, run_seconds)


def lost() -> None:
    """A fence that says no."""
    raise LockError("the lock is lost")


def stop_after(attempt: Ledger, steps: int = 9) -> None:
    """Steps, then a signal."""
    attempt.start(place(), 0, None, None)
    attempt.stepped(steps)
    raise Stopped("stopped in training")


def killed_and_resumed(run_dir: RunDir, now: Callable[[float], None]) -> History:
    """Two attempts: 10 s of start-up, steps 1 to 9 of 2 s each, killed with 6 saved; back 30 s later, and so on."""
    first = ledger(run_dir)
    now(START + 5)
    first.start(place(), 0, None, None)
    now(START + 10)
    first.stepped(1)
    first.stepped(9)
    now(START + 60)
    second = ledger(run_dir, began=START + 56)
    return second.start(place(6, 12.0), 3, Mark(9, 18.0, START + 26), None)


def test_an_attempt_without_an_end_vanished_and_its_cost_is_counted(
    run_dir: RunDir, now: Callable[[float], None]
) -> None:
    """Lost steps as given; the seconds that they took; and the time from the last step to the next process."""
    history = killed_and_resumed(run_dir, now)
    first, second = history.attempts
    assert second.previous is not None
    assert (second.previous.kind, second.previous.code, second.previous.global_step) == ("vanished", None, 9)
    assert (second.lost_steps, second.repeated_s, second.down_s) == (3, 6.0, 30.0)
    assert (first.startup_s, second.startup_s) == (10.0, None)
    assert (second.number, second.pod, second.place.device) == (2, "pod1", "cpu")
    assert read_history(run_dir.ledger) == history


def test_goodput_is_the_share_of_the_steps_that_count(run_dir: RunDir, now: Callable[[float], None]) -> None:
    """12 s of steps stand in the state after 60 s: not 18 s, of which 6 are done again."""
    history = killed_and_resumed(run_dir, now)
    assert history.goodput(12.0, START + 60) == pytest.approx(0.2)
    assert history.goodput(12.0 + 30.0, START + 100) == pytest.approx(0.42)
    assert History().goodput(1.0, START) is None


def test_the_seconds_of_stages_that_were_taken_over_are_not_this_run_s(
    run_dir: RunDir, now: Callable[[float], None]
) -> None:
    """A run that begins with another one's finished stages begins with their seconds, too."""
    attempt = ledger(run_dir)
    history = attempt.start(place(12, 5000.0), 0, None, None)
    assert history.goodput(5010.0, START + 40) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, ("finished", 0, 9)),
        (Stopped("stopped in training"), ("stopped", 143, 9)),
        (NumericsError("not finite"), ("refused", 70, 9)),
        (ValueError("a mistake"), ("crashed", 1, 9)),
        (AppError("another process of this run is gone"), ("crashed", 1, 9)),
    ],
)
def test_an_attempt_says_how_it_ends(run_dir: RunDir, error: Exception | None, end: tuple[str, int, int]) -> None:
    """Kind, exit code and steps done; the next attempt believes it, whatever a supervisor saw."""
    with contextlib.suppress(Exception), ledger(run_dir) as attempt:
        attempt.start(place(), 0, None, None)
        attempt.stepped(9)
        if error is not None:
            raise error
    found = read_history(run_dir.ledger).attempts[0].end
    assert found is not None
    assert (found.kind, found.code, found.global_step) == end
    history = ledger(run_dir).start(place(), 0, Mark(9), (-signal.SIGKILL, False))
    assert history.attempts[1].previous == found


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ((-signal.SIGKILL, False), "killed"),
        ((-signal.SIGKILL, True), "hung"),
        ((1, False), "crashed"),
        (None, "vanished"),
    ],
)
def test_what_a_supervisor_saw_is_believed_where_the_attempt_says_nothing(
    run_dir: RunDir, seen: tuple[int, bool] | None, kind: str
) -> None:
    """A signal, a hang that the watchdog ended, a crash; and nothing at all."""
    ledger(run_dir).start(place(), 0, None, None)
    previous = ledger(run_dir).start(place(), 0, Mark(3), seen).attempts[1].previous
    assert previous is not None
    assert (previous.kind, previous.code) == (kind, None if seen is None else seen[0])


def test_one_that_hung_and_came_to_itself_at_the_end_hung(run_dir: RunDir) -> None:
    """The watchdog's SIGTERM woke it up, so it said that it was stopped: the hang counts."""
    with pytest.raises(Stopped), ledger(run_dir) as attempt:
        stop_after(attempt)
    history = ledger(run_dir).start(place(), 0, Mark(9), (143, True))
    assert [end and end.kind for end in map(history.end_of, (0, 1))] == ["hung", None]
    assert history.attempts[0].end is not None
    assert history.attempts[0].end.kind == "stopped"


def test_the_supervisor_s_word_is_on_the_trainer_that_trained_last(run_dir: RunDir) -> None:
    """Not on one that was turned away by the lock meanwhile, nor on one before it."""
    attempts = Attempts(run_dir)
    assert attempts.seen_end() is None
    attempts.trains("stage_8", 0, 0, 0)
    attempts.ended(75, crashed=False)
    assert attempts.seen_end() is None
    attempts.ended(-9, crashed=True, hung=True)
    attempts.started(2)
    attempts.ended(1, crashed=True)
    assert attempts.seen_end() == (-9, True)
    attempts.trains("stage_8", 0, 0, 0)
    assert attempts.seen_end() is None


def test_who_is_turned_away_before_the_resume_point_is_on_record(run_dir: RunDir) -> None:
    """Bad data: an end without an attempt, which is not the end of the one before."""
    ledger(run_dir).start(place(), 0, None, None)
    with pytest.raises(DataError), ledger(run_dir):
        raise DataError("no CT")
    history = ledger(run_dir).start(place(), 0, Mark(2), None)
    assert [(end.kind, end.code) for end in history.turned_away] == [("refused", 65)]
    assert [attempt.number for attempt in history.attempts] == [1, 2]
    assert history.attempts[1].previous is not None
    assert history.attempts[1].previous.kind == "vanished"


def test_a_torn_line_costs_itself_and_the_file_is_never_rewritten(
    run_dir: RunDir, now: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Cut in the middle: said in the log, in the status and in the JSON; what stands there stays to the byte."""
    ledger(run_dir).start(place(), 0, None, None)
    run_dir.ledger.write_bytes(run_dir.ledger.read_bytes() + b'{"event": "end", "att')
    before = run_dir.ledger.read_bytes()
    history = ledger(run_dir).start(place(), 0, Mark(2), None)
    assert run_dir.ledger.read_bytes().startswith(before + b'\n{"event": "start"')
    assert "torn lines were passed over: 1" in caplog.text
    assert (len(history.attempts), history.torn) == (2, 1)
    assert read_history(run_dir.ledger) == history
    assert "1 torn line in the ledger" in totals(history)
    assert as_json(history, None)["torn_lines"] == 1


def test_a_full_volume_costs_the_lines_and_nothing_else(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """Every write fails with ENOSPC: said once, and the attempt goes on."""
    run_dir.ledger.symlink_to("/dev/full")
    with contextlib.suppress(NumericsError), ledger(run_dir) as attempt:
        attempt.stepped(1)
        raise NumericsError("not finite")
    assert caplog.text.count("ledger.jsonl cannot be written (No space left on device)") == 1


def test_a_ledger_that_cannot_be_read_stops_nothing(run_dir: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    """Said once; there is no history to show."""
    run_dir.ledger.mkdir()
    with ledger(run_dir) as attempt:
        history = attempt.start(place(), 0, None, None)
        attempt.stepped(1)
    assert history == History()
    assert caplog.text.count("ledger.jsonl cannot be") == 1


def test_a_process_that_lost_its_lease_writes_nothing(run_dir: RunDir) -> None:
    """Neither a step, which ends it, nor its end; whoever has the run now may be writing."""
    ledger(run_dir).start(place(), 0, None, None)
    before = run_dir.ledger.read_bytes()
    with pytest.raises(LockError):
        ledger(run_dir, fence=lost).start(place(), 0, None, None)
    with pytest.raises(LockError), ledger(run_dir, fence=lost) as attempt:
        attempt.stepped(1)
    with pytest.raises(NumericsError), ledger(run_dir, fence=lost):
        raise NumericsError("not finite")
    assert run_dir.ledger.read_bytes() == before


def test_every_exit_code_has_a_kind() -> None:
    """Those of the application's errors, of signals, and of nobody."""
    codes = {0: "finished", 143: "stopped", 1: "crashed", -11: "killed"}
    assert {code: kind_of(code) for code in codes} == codes
    assert {kind_of(code) for code in (65, 69, 70, 71, 74, 75, 78)} == {"refused"}


def test_the_tables_show_every_attempt(run_dir: RunDir, now: Callable[[float], None]) -> None:
    """Markdown for TensorBoard, columns for a terminal; totals in words."""
    history = killed_and_resumed(run_dir, now)
    text = markdown(history, 0.2)
    assert "1 interruption (1 vanished): 3 steps (6 s) done again, 30 s down; goodput 20.0 % of the time since" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table] == [11] * 4
    first, second = table[2:]
    assert first == "| 1 | 2023-11-14 22:13:20 | cpu | stage_8 step 0 | vanished | 9 | 0 | 0 s | 0 s | 10 s |"
    assert second == "| 2 | 2023-11-14 22:14:16 | cpu | stage_8 step 6 |  |  | 3 | 6 s | 30 s |  |"
    assert text_table(history).splitlines()[1].split() == first.replace("|", "").split()
    for _ in range(30):
        history = ledger(run_dir, began=START + 60).start(place(6, 12.0), 0, Mark(6), None)
    assert "12 earlier attempts are not shown." in markdown(history, None)
    assert len(text_table(history).splitlines()) == 2 + 1 + 20


def test_the_status_shows_ledger_and_goodput(run_dir: RunDir, now: Callable[[float], None]) -> None:
    """In the text for people and in the JSON; a run without a ledger shows none."""
    status = RunStatus(run_dir)
    status(state="training", run_seconds=12.0)
    assert "goodput" not in status_text(run_dir, read_status(run_dir))
    killed_and_resumed(run_dir, now)
    status(state="training")
    fields = read_status(run_dir)
    text = status_text(run_dir, fields)
    assert "\ngoodput   20.0 % of the time since 2023-11-14 22:13:20 UTC\n" in text
    assert text.endswith(text_table(read_history(run_dir.ledger)))
    found = json.loads(status_json(run_dir, fields))
    assert found["state"] == "training"
    assert found["ledger"]["goodput"] == pytest.approx(0.2)
    assert [attempt["lost_steps"] for attempt in found["ledger"]["attempts"]] == [0, 3]
    assert found["ledger"]["attempts"][0]["end"]["kind"] == "vanished"
