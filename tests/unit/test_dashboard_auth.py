"""Passwords, sessions and the delay of guesses, without a server."""

import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.env import Environment
from app.errors import ConfigError, MachineError
from app.ops.dashboard_auth import PasswordGate, Sessions, Verdict, is_loopback, settle_password


def environment(**variables: str) -> Environment:
    """An environment with these variables."""
    return Environment.read(variables)


PUBLIC = environment(DASHBOARD_HOST="0.0.0.0")


def test_by_default_the_dashboard_is_for_this_machine() -> None:
    """Port 6006 of loopback; a password would be asked elsewhere."""
    env = environment(DASHBOARD_HOST="{{ HOST }}", PORT="")
    assert (env.dashboard_host, env.port, env.dashboard_auth, env.dashboard_password) == (
        "127.0.0.1",
        6006,
        "password",
        None,
    )


@pytest.mark.parametrize("port", ["0", "65536", "-1", "6006/http", "6e3", "9" * 5000, "\u0661"])
def test_a_port_is_a_number(port: str) -> None:
    """Never one that TensorBoard or the system would choose."""
    with pytest.raises(ConfigError, match=r"^environment variable PORT: expected a number from 1 to 65535, found '"):
        environment(PORT=port)


@pytest.mark.parametrize("auth", ["None", "no", "off", "basic"])
def test_a_misspelt_auth_does_not_open_the_dashboard(auth: str) -> None:
    """Only `none` itself does."""
    message = f"^environment variable DASHBOARD_AUTH: expected one of password, none, found '{auth}'$"
    with pytest.raises(ConfigError, match=message):
        environment(DASHBOARD_AUTH=auth)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_loopback_address_is_reached_by_this_machine_alone(host: str) -> None:
    """IPv4, IPv6, and the name that stands for both."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "localhost.example.org", "pod", ""])
def test_every_other_address_counts_as_reachable(host: str) -> None:
    """What is not certain asks for a password."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, None),
        ({"DASHBOARD_AUTH": "none", "DASHBOARD_HOST": "0.0.0.0"}, None),
        ({"DASHBOARD_PASSWORD": "correct horse"}, "correct horse"),
        ({"DASHBOARD_PASSWORD": "correct horse", "DASHBOARD_AUTH": "none"}, "correct horse"),
        ({"DASHBOARD_PASSWORD": "{{ RUNPOD_SECRET_x }}"}, None),
    ],
)
def test_which_password_is_asked(variables: dict[str, str], asked: str | None, tmp_path: Path) -> None:
    """A set one always; none on loopback or where somebody said so; a placeholder is not a password."""
    assert settle_password(environment(**variables), tmp_path) == asked
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("password", ["", "  ", "{{ RUNPOD_SECRET_dashboard }}"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_beyond_loopback_a_password_is_generated_once(
    host: str, password: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Long and random, kept in a file of mode 600 for the next start, printed by the first start alone."""
    caplog.set_level(logging.INFO)
    env = environment(DASHBOARD_HOST=host, DASHBOARD_PASSWORD=password)
    generated = settle_password(env, tmp_path)
    assert generated is not None
    assert len(generated) >= 24
    assert (
        f"asks for the generated password {generated} (any user name), or open /?token={generated} once" in caplog.text
    )
    path = tmp_path / "hybrid_vit_cascade.password"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caplog.clear()
    assert settle_password(env, tmp_path) == generated
    assert generated not in caplog.text
    assert str(path) in caplog.text
    path.write_text("\n")
    assert settle_password(env, tmp_path) not in (generated, None, "")


def test_a_short_password_on_a_public_address_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On loopback it is nobody's business."""
    settle_password(environment(DASHBOARD_PASSWORD="abc123", DASHBOARD_HOST="127.0.0.1"), tmp_path)
    assert caplog.text == ""
    settle_password(environment(DASHBOARD_PASSWORD="abc123", DASHBOARD_HOST="0.0.0.0"), tmp_path)
    assert "DASHBOARD_PASSWORD has fewer than 12 characters; a public address needs more" in caplog.text
    assert "abc123" not in caplog.text


def test_without_a_place_for_a_generated_password_nothing_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails closed: the error names the file and what to do."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(
        MachineError, match=r"cannot write .*password: No such file or directory; free some space, or set"
    ):
        settle_password(PUBLIC, tmp_path / "neither")


def test_where_the_runtime_folder_is_not_ours_a_temporary_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named after the user; the same at the next start."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    password = settle_password(PUBLIC, tmp_path / "run")
    path = tmp_path / f"{os.getuid()}.hybrid_vit_cascade.password"
    assert path.read_text() == f"{password}\n"
    assert settle_password(PUBLIC, tmp_path / "run") == password


@pytest.mark.parametrize("kind", ["readable", "folder", "link", "pipe"])
def test_a_file_that_somebody_prepared_is_not_trusted(tmp_path: Path, kind: str) -> None:
    """Readable by others, a folder, a link to elsewhere, a pipe: refused with what was found."""
    path = tmp_path / "hybrid_vit_cascade.password"
    if kind == "readable":
        path.write_text("known to others")
        path.chmod(0o644)
    elif kind == "folder":
        path.mkdir(mode=0o700)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text("known to others")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path, 0o600)
    found = {"readable": "-rw-r--r--", "folder": "drwx------", "pipe": "prw-------", "link": "Too many levels"}[kind]
    with pytest.raises(MachineError, match=rf"cascade\.password: .*{found}.*; remove it, or set DASHBOARD_PASSWORD$"):
        settle_password(PUBLIC, tmp_path)


def test_a_session_ends_after_its_lifetime() -> None:
    """A cookie is long, random, counts until then, and an invented one never does."""
    now = [0.0]
    sessions = Sessions(lifetime_s=10, clock=lambda: now[0])
    first, second = sessions.open(), sessions.open()
    assert first != second
    assert len(first) >= 40
    assert (sessions.holds(first), sessions.holds(second)) == (True, True)
    assert not any(sessions.holds(value) for value in (None, "", "x", first[:-1], f"{first} "))
    now[0] = 10.0
    assert not sessions.holds(first)


def test_sessions_are_bounded() -> None:
    """The oldest goes first."""
    sessions = Sessions(limit=2)
    cookies = [sessions.open() for _ in range(3)]
    assert [sessions.holds(cookie) for cookie in cookies] == [False, True, True]


class Nap:
    """A sleep that ends when the test says so; `asleep` counts those who wait."""

    def __init__(self) -> None:
        self.asleep = threading.Semaphore(0)
        self.wake = threading.Event()
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.asleep.release()
        assert self.wake.wait(10)

    def fill(self, attempts: list[Callable[[], object]]) -> list[threading.Thread]:
        """Starts the attempts and returns when all of them wait."""
        threads = [threading.Thread(target=attempt) for attempt in attempts]
        for thread in threads:
            thread.start()
            assert self.asleep.acquire(timeout=10)
        return threads


def test_a_right_password_does_not_wait_and_a_wrong_one_does() -> None:
    """Length and case matter, and non-ASCII letters are letters."""
    slept: list[float] = []
    gate = PasswordGate("pässword", delay_s=2.0, sleep=slept.append)
    assert gate.try_password("pässword", "a") is Verdict.RIGHT
    assert slept == []
    wrong = ["", "pässwor", "pässword ", "PÄSSWORD", "p?ssword", "\ud800"]
    assert [gate.try_password(text, "a") for text in wrong] == [Verdict.WRONG] * len(wrong)
    assert slept == [2.0] * len(wrong)


def test_one_client_that_guesses_keeps_no_other_out() -> None:
    """While its wrong answers wait, its next attempts are not compared, right or wrong; others are."""
    nap = Nap()
    gate = PasswordGate("right", per_client=2, overall=8, sleep=nap)
    threads = nap.fill([lambda: gate.try_password("wrong", "a")] * 2)
    assert gate.try_password("wrong", "a") is Verdict.NOT_TRIED
    assert gate.try_password("right", "a") is Verdict.NOT_TRIED
    assert gate.try_password("right", "b") is Verdict.RIGHT
    nap.wake.set()
    for thread in threads:
        thread.join()
    assert gate.try_password("right", "a") is Verdict.RIGHT


def test_guessing_from_many_addresses_is_bounded() -> None:
    """Whatever the names of the clients, no more than `overall` wrong answers wait, and the rest is not compared."""
    nap = Nap()
    gate = PasswordGate("right", per_client=2, overall=4, sleep=nap)
    threads = nap.fill([lambda name=str(i): gate.try_password("wrong", name) for i in range(4)])
    assert {gate.try_password("wrong", str(i)) for i in range(100)} == {Verdict.NOT_TRIED}
    nap.wake.set()
    for thread in threads:
        thread.join()
    assert nap.seconds == [2.0] * 4
    assert gate.try_password("right", "new") is Verdict.RIGHT
