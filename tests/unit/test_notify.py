"""Claims about notifications, against a real local server."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.env import Environment
from app.errors import AppError, ConfigError, DataError, LockError, NumericsError, Stopped
from app.ops.notify import FINISHED, STARTED, WAITING_AT_MOST, Notifier
from tests.webhook import SECRET_PATH, Webhook, webhook

KEY = "f00dfacef00dface"
PLENTY_S = 30.0


@pytest.fixture
def hook() -> Iterator[Webhook]:
    """Somebody who is told."""
    with webhook() as state:
        yield state


@pytest.fixture
def notifier(hook: Webhook) -> Iterator[Callable[..., Notifier]]:
    """Makes notifiers that try again at once."""
    made: list[Notifier] = []

    def begin(**options: Any) -> Notifier:
        url = options.pop("url", hook.url)
        env = Environment.read({"NOTIFY_URL": url, "WANDB_API_KEY": KEY, "RUNPOD_POD_ID": "pod1"})
        made.append(Notifier(env, **{"run": "tiny", "first_pause_s": 0.01, **options}))
        return made[-1]

    yield begin
    hook.answering.set()
    for each in made:
        each.close(PLENTY_S)


def test_notices_arrive_in_order_with_all_that_is_known(hook: Webhook, notifier: Callable[..., Notifier]) -> None:
    """Event, run, UTC time, pod, place and message; `text` for Slack and `content` for Discord say the same."""
    sender = notifier()
    sender.where = lambda: {"stage": "stage_8", "step": 4, "epoch": 1, "loss": 0.5}
    sender.send(STARTED, "fresh start")
    sender.send(FINISHED, "all stages are trained", stage="stage_32", step=8, epoch=2)
    sender.close(PLENTY_S)
    first, last = hook.posts
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first.pop("time"))
    text = "tiny: started. fresh start"
    assert first == {
        "event": "started",
        "run": "tiny",
        "pod": "pod1",
        "stage": "stage_8",
        "step": 4,
        "epoch": 1,
        "message": "fresh start",
        "text": text,
        "content": text,
    }
    assert (last["event"], last["stage"], last["step"], last["epoch"]) == ("finished", "stage_32", 8, 2)


@pytest.mark.parametrize("fault", [500, 503, 429, 408])
def test_what_may_pass_is_tried_again(hook: Webhook, notifier: Callable[..., Notifier], fault: int) -> None:
    """An error of the server, then success: delivered, and the next one once."""
    hook.answers = [fault]
    sender = notifier()
    sender.send(STARTED, "")
    sender.send(FINISHED, "")
    sender.close(PLENTY_S)
    assert hook.events == ["started", "started", "finished"]


def test_the_server_says_how_long_to_wait(hook: Webhook, notifier: Callable[..., Notifier]) -> None:
    """Retry-After of a 429 in place of a pause that this test would not live to see."""
    hook.answers, hook.headers = [429], {"Retry-After": "1"}
    sender = notifier(first_pause_s=3600.0)
    sender.send(STARTED, "")
    hook.until(2)
    assert hook.events == ["started", "started"]


@pytest.mark.parametrize("answer", [400, 404, 410, 302])
def test_what_would_come_again_is_given_up_at_once(
    hook: Webhook, notifier: Callable[..., Notifier], caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    """One line in the log, with the host alone; a redirect is not followed."""
    hook.answers, hook.headers = [answer], {"Location": f"{hook.url}/elsewhere"}
    sender = notifier()
    sender.send(STARTED, "")
    sender.send(FINISHED, "")
    sender.close(PLENTY_S)
    assert hook.events == ["started", "finished"]
    assert hook.paths == [SECRET_PATH, SECRET_PATH]
    assert f"notifications: 127.0.0.1 did not take 'started': answer {answer}" in caplog.text
    assert "PLANTED" not in caplog.text


def test_nobody_there_is_said_without_the_address(
    notifier: Callable[..., Notifier], caplog: pytest.LogCaptureFixture
) -> None:
    """Connection refused, four times; then the host and the reason."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        sender = notifier(url=f"http://127.0.0.1:{probe.getsockname()[1]}{SECRET_PATH}")
        sender.send(STARTED, "")
        sender.close(PLENTY_S)
    assert "127.0.0.1 did not take 'started': Connection refused" in caplog.text
    assert "PLANTED" not in caplog.text


def test_a_server_that_never_answers_is_given_up(
    hook: Webhook, notifier: Callable[..., Notifier], caplog: pytest.LogCaptureFixture
) -> None:
    """All tries run into the time limit, nothing waits for them, and the thread is still there for what follows."""
    hook.answering.clear()
    sender = notifier(timeout_s=0.1)
    sender.send(STARTED, "")
    sender.send(FINISHED, "")
    hook.until(5)
    hook.answering.set()
    sender.close(PLENTY_S)
    assert hook.events[:5] == ["started"] * 4 + ["finished"]
    assert "did not take 'started': TimeoutError" in caplog.text


def test_the_end_does_not_wait_for_an_answer(
    hook: Webhook, notifier: Callable[..., Notifier], caplog: pytest.LogCaptureFixture
) -> None:
    """`close` returns while the first post is unanswered, and says what was left."""
    hook.answering.clear()
    sender = notifier()
    sender.send(STARTED, "")
    hook.until(1)
    sender.send(FINISHED, "")
    sender.close(0.05)
    assert not hook.answering.is_set()
    assert hook.events == ["started"]
    assert "127.0.0.1 did not take in time: started, finished" in caplog.text


def test_what_is_oldest_is_dropped_where_too_many_wait(
    hook: Webhook, notifier: Callable[..., Notifier], caplog: pytest.LogCaptureFixture
) -> None:
    """While one is unanswered: the newest of the others stay, and the log says that and what was dropped."""
    hook.answering.clear()
    sender = notifier()
    sender.send(STARTED, "")
    hook.until(1)
    for number in range(WAITING_AT_MOST + 3):
        sender.send(f"event {number}", "")
    hook.answering.set()
    sender.close(PLENTY_S)
    assert hook.events == ["started", *(f"event {number}" for number in range(3, WAITING_AT_MOST + 3))]
    assert caplog.text.count("does not keep up") == 3
    assert "'event 0' is dropped" in caplog.text


def test_a_stop_is_told_once_and_first(hook: Webhook, notifier: Callable[..., Notifier]) -> None:
    """By the process that watches over the end, as soon as it hears of it; the others say nothing of it."""
    asked = threading.Event()
    sender, other = notifier(stop=asked.is_set), notifier(stop=asked.is_set, tells_end=False)
    asked.set()
    hook.until(1)
    with pytest.raises(Stopped), sender, other:
        raise Stopped("stopped in training")
    assert hook.events == ["stopping"]


def test_a_launcher_leaves_the_stop_to_its_processes_and_tells_its_own_refusal(
    hook: Webhook, notifier: Callable[..., Notifier]
) -> None:
    """It may end before they run: the machines did not meet."""
    senders = [notifier(), notifier()]
    for sender in senders:
        sender.tells_stop = False
    with pytest.raises(Stopped), senders[0]:
        raise Stopped("stopped in training")
    with pytest.raises(ConfigError), senders[1]:
        raise ConfigError("NUM_NODES is 2")
    assert hook.events == ["refused"]


def test_a_stop_that_another_process_heard_of_is_told(hook: Webhook, notifier: Callable[..., Notifier]) -> None:
    """One of several processes of a run got the signal: all leave, and the first one says so."""
    with pytest.raises(Stopped), notifier():
        raise Stopped("stopped in training")
    assert hook.events == ["stopping"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NumericsError("stage_8 step 3 is not finite"), "exit code 70: stage_8 step 3 is not finite"),
        (ConfigError("configs/x.yaml:3: sed: unknown key"), "exit code 78: configs/x.yaml:3: sed: unknown key"),
        (
            DataError("Doe_Jane.nii.gz: not a volume"),
            "exit code 65: the input data cannot be used as they are; log and REASON say which and why",
        ),
    ],
)
def test_a_refusal_is_told_with_its_reason(
    hook: Webhook, notifier: Callable[..., Notifier], error: AppError, message: str
) -> None:
    """But for data, whose files have patients' names; and not by a process that somebody watches over."""
    with pytest.raises(type(error)), notifier(tells_end=False):
        raise error
    assert hook.posts == []
    with pytest.raises(type(error)), notifier():
        raise error
    assert [(post["event"], post["message"]) for post in hook.posts] == [("refused", message)]


@pytest.mark.parametrize("error", [LockError("another process trains"), RuntimeError("a crash")])
def test_what_is_tried_again_is_no_refusal(hook: Webhook, notifier: Callable[..., Notifier], error: Exception) -> None:
    """Another process that trains the run, or a crash."""
    with pytest.raises(type(error)), notifier():
        raise error
    assert hook.posts == []


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        ("/data/Doe Jane/scan.nii: cannot be read", "[path]: cannot be read"),
        ("cannot open '/data/Doe, Jane/a:b.nii' (EACCES)", "cannot open [path] (EACCES)"),
        ('"../Doe Jane/scan.nii": gone', "[path]: gone"),
        ("see ~/Doe, or ./Doe/x", "see [path], or [path]"),
        (f"the key is {KEY}", "the key is [hidden]"),
        (
            "resuming stage_8 at 3 samples/s, from stage_8_last.pt",
            "resuming stage_8 at 3 samples/s, from stage_8_last.pt",
        ),
        ("line one\n  line two", "line one line two"),
        ("x" * 1000, "x" * 596 + " ..."),
    ],
)
def test_a_message_holds_no_path_and_no_secret(
    hook: Webhook, notifier: Callable[..., Notifier], message: str, sent: str
) -> None:
    """Paths may have patients' names in them, with blanks."""
    sender = notifier()
    sender.send(STARTED, message)
    sender.close(PLENTY_S)
    assert hook.posts[0]["message"] == sent
    assert hook.posts[0]["text"] == f"tiny: started. {sent}"


def test_without_a_url_nothing_runs() -> None:
    """No thread, and every call returns."""
    before = threading.active_count()
    with Notifier(Environment.read({})) as sender:
        assert threading.active_count() == before
        sender.send(STARTED, "")
        sender.stopping()
        sender.refused(70, "not finite")
