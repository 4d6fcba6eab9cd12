"""The guard as a plain WSGI application in front of an application that would answer everything."""

import base64
import logging
from collections.abc import Iterable
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest

from app.ops.dashboard_auth import PasswordGate
from app.ops.dashboard_guard import Guard
from app.ops.dashboard_status import StatusPages
from app.workspace import Workspace

PASSWORD = "correct horse: battery"
SECRET_PAGE = b"patients"
PATHS = (
    "/",
    "/status",
    "/status/",
    "/status/progress.png",
    "/data/runs",
    "/healthz/",
    "/healthz/x",
    "/index.html",
    "*",
)


def basic(password: str, user: str = "any") -> dict[str, str]:
    """The header of HTTP Basic."""
    return {"HTTP_AUTHORIZATION": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def inner(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Stands for TensorBoard; breaks where the path says so."""
    if environ["PATH_INFO"] == "/breaks":
        raise ValueError(environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "text/plain"), ("Referrer-Policy", "origin")])
    return [SECRET_PAGE]


class Answer:
    """Status, headers and body of one request."""

    def __init__(self, guard: Guard, path: str = "/", query: str = "", method: str = "GET", **environ: str) -> None:
        self.headers: dict[str, str] = {}
        asked: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "SERVER_NAME": "0.0.0.0",
            "SERVER_PORT": "6006",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "abc-6006.proxy.runpod.net",
            "REMOTE_ADDR": "192.0.2.7",
            "wsgi.url_scheme": "http",
            **environ,
        }
        self.body = b"".join(guard(asked, self.start))

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """WSGI's start_response."""
        self.status = int(status.split()[0])
        assert len({name for name, _ in headers}) == len(headers), "a header twice"
        self.headers = dict(headers)

    @property
    def cookie(self) -> Any:
        """The one cookie that was set, with its attributes."""
        (morsel,) = SimpleCookie(self.headers["Set-Cookie"]).values()
        return morsel


def make_guard(tmp_path: Path, password: str | None, sleep: Any = lambda seconds: None) -> Guard:
    """A guard over an empty workspace whose TensorBoard is loaded."""
    gate = None if password is None else PasswordGate(password, sleep=sleep)
    guard = Guard(password, StatusPages(Workspace(tmp_path)), gate)
    guard.application, guard.health = inner, "ok"
    return guard


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    """One that asks for PASSWORD and waits for nobody."""
    return make_guard(tmp_path, PASSWORD)


@pytest.fixture
def open_guard(tmp_path: Path) -> Guard:
    """One without a password."""
    return make_guard(tmp_path, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_nothing_passes_without_the_password(guard: Guard, path: str, method: str) -> None:
    """Every path but `/healthz` itself; the answer says how to log in and is not kept by any cache."""
    answer = Answer(guard, path, method=method)
    assert answer.status == 401
    assert SECRET_PAGE not in answer.body
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="hybrid_vit_cascade", charset="UTF-8"'
    assert answer.headers["Cache-Control"] == "no-store"
    assert method == "HEAD" or b"value of DASHBOARD_PASSWORD" in answer.body


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "TRACE", "CONNECT", "PATCH"])
def test_other_methods_are_refused(guard: Guard, method: str) -> None:
    """With the password too: TensorBoard needs none of them."""
    answer = Answer(guard, method=method, **basic(PASSWORD))
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, POST")


@pytest.mark.parametrize("user", ["", "admin", "any:"])
def test_basic_with_the_password_passes(guard: Guard, user: str) -> None:
    """Any user name; a colon belongs to the password alone, since a user name has none."""
    answer = Answer(guard, **basic(PASSWORD, user))
    assert answer.status == (401 if ":" in user else 200)
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic /w==",
        "Bearer correct horse: battery",
        "Digest username=x",
        "correct horse: battery",
    ],
)
def test_a_header_that_is_not_basic_is_no_password(guard: Guard, header: str) -> None:
    """Malformed or of another scheme: 401, no error."""
    assert Answer(guard, HTTP_AUTHORIZATION=header).status == 401


def test_a_token_becomes_a_cookie_and_leaves_the_address(guard: Guard) -> None:
    """303 to the same page without it, rest of the query kept; the cookie then opens the page, and is not the token."""
    answer = Answer(guard, "/status", "run=a%20b&token=correct+horse%3A+battery&smooth=0.6")
    assert (answer.status, answer.headers["Location"]) == (303, "/status?run=a%20b&smooth=0.6")
    assert answer.headers["Cache-Control"] == "no-store"
    cookie = answer.cookie
    assert (cookie["httponly"], cookie["samesite"], cookie["secure"], cookie["path"]) == (True, "Lax", "", "/")
    assert (cookie["domain"], cookie["max-age"], cookie["expires"]) == ("", "", "")
    assert len(cookie.value) >= 40
    assert PASSWORD not in cookie.value
    opened = Answer(guard, "/", HTTP_COOKIE=f"other=1; {cookie.key}={cookie.value}")
    assert (opened.status, opened.body) == (200, SECRET_PAGE)
    assert "Set-Cookie" not in opened.headers
    assert Answer(guard, "/", HTTP_COOKIE=f"{cookie.key}={cookie.value}x").status == 401
    assert Answer(guard, "/", "token=correct%20horse:%20battery").cookie.value != cookie.value


@pytest.mark.parametrize(
    ("environ", "secure"),
    [
        ({"HTTP_X_FORWARDED_PROTO": "https"}, True),
        ({"HTTP_X_FORWARDED_PROTO": "HTTPS, http"}, True),
        ({"HTTP_X_FORWARDED_PROTO": "http"}, ""),
        ({"wsgi.url_scheme": "https"}, True),
    ],
)
def test_the_cookie_is_secure_on_https(guard: Guard, environ: dict[str, str], secure: object) -> None:
    """RunPod's proxy speaks HTTPS outside and says so."""
    assert Answer(guard, query="token=correct+horse:+battery", **environ).cookie["secure"] == secure


@pytest.mark.parametrize("query", ["token=", "token=wrong", "token", "token=correct", "Token=x", "%74oken=no"])
def test_a_wrong_token_gives_nothing(guard: Guard, query: str) -> None:
    """Neither a redirect nor a cookie."""
    answer = Answer(guard, query=query)
    assert answer.status == 401
    assert {"Set-Cookie", "Location"} & set(answer.headers) == set()


def test_a_token_is_for_addresses_only(guard: Guard) -> None:
    """A form that is posted from elsewhere cannot log anybody in."""
    assert Answer(guard, query="token=correct+horse:+battery", method="POST").status == 401


def test_an_old_token_in_a_known_browser_only_leaves_the_address(guard: Guard) -> None:
    """A bookmark whose password has changed still works as long as the session does."""
    cookie = Answer(guard, query="token=correct+horse:+battery").cookie
    answer = Answer(guard, query="token=old", HTTP_COOKIE=f"{cookie.key}={cookie.value}")
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "path", ["//evil.example/", "///evil.example", "/\\evil.example", "/\r\nSet-Cookie: a=b", "/a\tb"]
)
def test_the_redirect_stays_on_this_server(guard: Guard, path: str) -> None:
    """No address of another server, no second header."""
    location = Answer(guard, path, "token=correct+horse:+battery&x=%0d%0a\r\n").headers["Location"]
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert not any(character in location for character in "\r\n\t\\")


def test_wrong_passwords_wait_and_missing_ones_do_not(tmp_path: Path) -> None:
    """A browser's first request has no password and gets its 401 at once."""
    slept: list[float] = []
    guard = make_guard(tmp_path, PASSWORD, slept.append)
    Answer(guard)
    Answer(guard, HTTP_COOKIE="hybrid_vit_cascade_session=old")
    assert slept == []
    Answer(guard, **basic("wrong"))
    Answer(guard, query="token=wrong")
    assert slept == [2.0, 2.0]


def test_while_a_client_waits_it_is_told_to_come_back(tmp_path: Path) -> None:
    """429 with the right password too, until its two wrong ones are answered; sessions and other clients go on."""
    right = basic(PASSWORD)
    meanwhile: dict[str, Answer] = {}
    depth = 0

    def sleep(_seconds: float) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            assert Answer(guard, **basic("wrong too")).status == 401
        else:
            meanwhile["same"] = Answer(guard, **right)
            meanwhile["session"] = Answer(guard, HTTP_COOKIE=f"{cookie.key}={cookie.value}")
            meanwhile["elsewhere"] = Answer(guard, **right, REMOTE_ADDR="192.0.2.8")
            meanwhile["behind the same proxy"] = Answer(guard, **right, HTTP_X_FORWARDED_FOR="198.51.100.1")

    guard = make_guard(tmp_path, PASSWORD, sleep)
    cookie = Answer(guard, query="token=correct+horse:+battery").cookie
    assert Answer(guard, **basic("wrong")).status == 401
    same = meanwhile.pop("same")
    assert (same.status, same.headers["Retry-After"]) == (429, "3")
    assert same.body == b"Too many wrong passwords at the moment: try again in a few seconds.\n"
    assert {name: answer.status for name, answer in meanwhile.items()} == dict.fromkeys(meanwhile, 200)
    assert Answer(guard, **right).status == 200


@pytest.mark.parametrize("host", ["localhost:6006", "127.0.0.1:6006", "[::1]:6007", "LOCALHOST", "127.0.0.1"])
def test_without_a_password_local_addresses_pass(open_guard: Guard, host: str) -> None:
    """Any port: a container publishes 6006 as it likes."""
    assert Answer(open_guard, HTTP_HOST=host).body == SECRET_PAGE


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example:6006",
        "localhost.evil.example",
        "127.0.0.1.evil.example:6006",
        "evil.example,localhost",
        "localhost:6006,evil.example",
        "localhost:6006@evil.example",
        "localhost:x",
        "0.0.0.0:6006",
        "[::1].evil.example",
        "localhost:6006\n",
    ],
)
def test_without_a_password_other_names_are_refused(open_guard: Guard, host: str) -> None:
    """A page elsewhere whose name resolves to this machine reads nothing; nor does a published port."""
    for path in ("/", "/status", "/data/runs"):
        answer = Answer(open_guard, path, HTTP_HOST=host)
        assert answer.status == 403
        assert b"answers only at http://localhost and http://127.0.0.1" in answer.body


def test_without_a_password_a_token_still_leaves_the_address(open_guard: Guard) -> None:
    """And sets no cookie, since nobody asks for one."""
    answer = Answer(open_guard, "/status", "token=x", HTTP_HOST="localhost:6006")
    assert (answer.status, answer.headers["Location"]) == (303, "/status")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("query", ["", "token=wrong"])
def test_health_is_open_and_says_nothing_else(guard: Guard, query: str) -> None:
    """For probes, at any name, with a fixed text; 503 until TensorBoard answers."""
    answer = Answer(guard, "/healthz", query)
    assert (answer.status, answer.body) == (200, b'{"status": "ok"}')
    assert answer.headers["Content-Type"] == "application/json"
    guard.health = "loading"
    assert (Answer(guard, "/healthz").status, Answer(guard, "/healthz").body) == (503, b'{"status": "loading"}')


def test_until_tensorboard_is_loaded_its_pages_say_so(guard: Guard) -> None:
    """They try again by themselves; the password is asked all the same, and `/status` is there already."""
    guard.application = None
    answer = Answer(guard, **basic(PASSWORD))
    assert answer.status == 503
    assert b'<meta http-equiv="refresh" content="2">' in answer.body
    assert b"TensorBoard is loading" in answer.body
    assert Answer(guard).status == 401
    assert Answer(guard, "/status", **basic(PASSWORD)).status == 200


@pytest.mark.parametrize("path", ["/", "/status", "/healthz", "/breaks"])
def test_every_answer_has_the_security_headers(guard: Guard, path: str) -> None:
    """Those of TensorBoard's own answers stay as they are."""
    for environ in ({}, basic(PASSWORD)):
        headers = Answer(guard, path, **environ).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "SAMEORIGIN"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Referrer-Policy"] == ("origin" if path == "/" and environ else "no-referrer")


def test_a_page_that_breaks_is_logged_without_its_query(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the kind of error and where, not its text; the browser gets 500 and no traceback."""
    caplog.set_level(logging.DEBUG)
    answer = Answer(guard, "/breaks", "run=patient-name", **basic(PASSWORD))
    assert answer.status == 500
    assert answer.body == b"This page could not be made; the log of the dashboard says where it broke.\n"
    assert "a page broke with ValueError at" in caplog.text
    assert "raise ValueError(environ" in caplog.text
    assert "patient-name" not in caplog.text
