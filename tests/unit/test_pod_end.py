"""Claims about what is looked at before a pod is stopped, and what is said of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from app.config_pod import PodConfig
from app.env import Environment
from app.ops import pod_end
from app.ops.pod_end import end_pod, final_check
from app.workspace import Workspace
from tests.runpod_server import KEY, POD, runpod


class AtOnce:
    """A wish to stop that comes with the first, or with a later, sleep."""

    def __init__(self, sleeps: int) -> None:
        self.left = sleeps

    def __call__(self) -> bool:
        return self.left <= 0

    def wait(self, seconds: float) -> None:
        self.left -= 1


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """One with a run that was refused and has no checkpoints."""
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    workspace = Workspace(tmp_path)
    workspace.run_dir("short").ensure()
    workspace.run_dir("short").reason.write_text("exit code 69\nno GPU\n")
    return workspace


def test_a_run_that_never_began_has_nothing_to_verify(tmp_path: Path) -> None:
    """A config that cannot be read, on a new volume."""
    found = final_check(Workspace(tmp_path / "nothing").run_dir(None), None, lambda: False)
    assert found.passed
    assert found.text == "there is no run yet whose checkpoints could be verified"


def test_what_is_found_stands_in_reason_once(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """By a real `checkpoints --json`; what a second look cannot find out replaces it, loudly."""
    run_dir = workspace.run_dir("short")
    caplog.set_level(logging.INFO)
    assert final_check(run_dir, "short", lambda: False).passed
    assert run_dir.reason.read_text() == ("exit code 69\nno GPU\nbefore the stop: there are no checkpoints to verify\n")
    assert "the volume is flushed" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pod_end, "VERIFY_WITHIN_S", 0.0)
        found = final_check(run_dir, "short", lambda: False)
    assert not found.passed
    assert run_dir.reason.read_text() == f"exit code 69\nno GPU\nbefore the stop: {found.text}\n"
    assert found.text.startswith("THE CHECKPOINTS COULD NOT BE VERIFIED: ")
    assert found.text.endswith("did not end within 0 s")
    assert caplog.records[-1].levelname == "ERROR"


def test_a_volume_that_cannot_be_flushed_is_said_and_keeps_nobody(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hang for ever."""
    monkeypatch.setattr(pod_end, "FLUSH_WITHIN_S", -1.0)
    monkeypatch.setattr(pod_end, "POLL_S", 0.0)
    monkeypatch.setattr(pod_end, "VERIFY_WITHIN_S", 0.0)
    found = final_check(workspace.run_dir("short"), "short", lambda: False)
    assert "THE VOLUME COULD NOT BE FLUSHED: sync did not end within -1 s" in found.text


def test_a_pod_that_goes_down_meanwhile_is_no_alarm(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is known then, and nothing is said."""
    told: list[str] = []
    run_dir = workspace.run_dir("short")
    env = Environment.read({"RUNPOD_POD_ID": POD, "RUNPOD_API_KEY": KEY})
    end_pod(PodConfig(), env, run_dir, "short", 69, AtOnce(0), lambda event, _: told.append(event))
    assert told == []
    assert "COULD NOT BE VERIFIED" not in caplog.text
    assert run_dir.reason.read_text() == "exit code 69\nno GPU\n"


@pytest.mark.parametrize(("code", "events"), [(0, ["stopping"]), (69, ["stopping"]), (143, [])])
def test_who_was_asked_to_stop_is_not_announced_twice(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, code: int, events: list[str]
) -> None:
    """The end of a run announces the stop of its pod, with what was found."""
    told: list[str] = []
    messages: list[str] = []
    run_dir = Workspace(workspace.root / "nothing").run_dir(None)

    def send(event: str, message: str) -> None:
        told.append(event)
        messages.append(message)

    with runpod() as account:
        monkeypatch.setattr("app.ops.pod.API", account.url)
        env = Environment.read({"RUNPOD_POD_ID": POD, "RUNPOD_API_KEY": KEY})
        end_pod(PodConfig(), env, run_dir, None, code, AtOnce(2), send)
        assert account.status == "EXITED"
    assert told == events
    assert all("no run yet" in text and text.endswith("this pod is stopped in 30 minutes") for text in messages)
