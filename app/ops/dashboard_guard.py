"""What stands between the network and TensorBoard: the password, `/healthz`, `/status`, headers, no word on queries."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_plus

from werkzeug.wrappers import Request, Response

from app.ops.dashboard_auth import PasswordGate, Sessions, Verdict

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from app.ops.dashboard_status import StatusPages

log = logging.getLogger(__name__)

COOKIE = "hybrid_vit_cascade_session"
TOKEN = "token"
METHODS = ("GET", "HEAD", "POST")
"""POST is how TensorBoard's pages ask for many series at once; nothing here changes anything."""
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",  # TensorBoard shows plugins in frames of its own.
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
}
ASKS = """\
This dashboard asks for a password, with any user name.
It is the value of DASHBOARD_PASSWORD; where that is not set, the log of the container shows the one that was generated.
"""
NOT_LOCAL = """\
This dashboard has no password, so it answers only at http://localhost and http://127.0.0.1.
To reach it from elsewhere, set DASHBOARD_PASSWORD (and not DASHBOARD_AUTH=none).
"""
BUSY = "Too many wrong passwords at the moment: try again in a few seconds.\n"
BROKE = "This page could not be made; the log of the dashboard says where it broke.\n"
LOADING = '<!doctype html><meta http-equiv="refresh" content="2"><title>loading</title><p>TensorBoard is loading.'


class Guard:
    """WSGI application: everything but `/healthz` needs the password, and without one a local address.

    Args:
        password: None asks for none and answers at local addresses only, which a page elsewhere cannot fake by a name
            that resolves to this machine.
        pages: answers below `/status`.
        gate: compares passwords; None is one for `password`.
    """

    def __init__(self, password: str | None, pages: StatusPages, gate: PasswordGate | None = None) -> None:
        self.application: WSGIApplication | None = None
        """TensorBoard, as soon as it is loaded."""
        self.health = "loading"
        """`ok`, or why not."""
        self._pages = pages
        self._sessions = Sessions()
        self._gate = gate if password is None or gate else PasswordGate(password)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """One request."""
        try:
            request = Request(environ)
            answer = self._health() if request.path == "/healthz" else self._refusal(request) or self._page(request)
            return answer(environ, _with_headers(start_response))
        except Exception as error:  # noqa: BLE001 - the boundary of a request: its text may hold the query
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a page broke with %s at\n%s", type(error).__name__, frames.rstrip())
            return _text(500, BROKE)(environ, _with_headers(start_response))

    def _health(self) -> Response:
        return _answer(200 if self.health == "ok" else 503, json.dumps({"status": self.health}), "application/json")

    def _refusal(self, request: Request) -> Response | None:
        """Why this request gets no page, or the redirect to its address without the token; None lets it pass."""
        if request.method not in METHODS:
            return _text(405, "Not allowed.\n", Allow=", ".join(METHODS))
        if self._gate is None and not LOCAL_HOST.fullmatch(request.environ.get("HTTP_HOST", "")):
            return _text(403, NOT_LOCAL)
        token, rest = _split_token(request)
        known = self._gate is None or self._sessions.holds(request.cookies.get(COOKIE))
        if not known:
            refusal = self._check_password(request, token)
            if refusal is not None:
                return refusal
        if token is None:
            return None
        answer = _text(303, "", Location=_address(request.path, rest))
        if not known:
            secure = _is_https(request)
            answer.set_cookie(COOKIE, self._sessions.open(), httponly=True, samesite="Lax", secure=secure, path="/")
        return answer

    def _check_password(self, request: Request, token: str | None) -> Response | None:
        basic = request.authorization
        given = token if token is not None else basic.password if basic and basic.type == "basic" else None
        if given is None:
            return _unauthorized()
        assert self._gate is not None
        verdict = self._gate.try_password(given, _client(request))
        if verdict is Verdict.RIGHT:
            return None
        return _unauthorized() if verdict is Verdict.WRONG else _text(429, BUSY, **{"Retry-After": "3"})

    def _page(self, request: Request) -> Response | WSGIApplication:
        own = self._pages.answer(request)
        if own is not None:
            return own
        if self.application is None:
            return _answer(503, LOADING, "text/html; charset=utf-8", **{"Retry-After": "2"})
        return self.application


def _answer(status: int, text: str, content_type: str, **headers: str) -> Response:
    policy = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
    return Response(text, status, {**policy, **headers}, content_type=content_type)


def _text(status: int, text: str, **headers: str) -> Response:
    return _answer(status, text, "text/plain; charset=utf-8", **headers)


def _unauthorized() -> Response:
    return _text(401, ASKS, **{"WWW-Authenticate": 'Basic realm="hybrid_vit_cascade", charset="UTF-8"'})


def _with_headers(start_response: StartResponse) -> StartResponse:
    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        names = {name.lower() for name, _ in headers}
        added = [(name, value) for name, value in HEADERS.items() if name.lower() not in names]
        return start_response(status, [*headers, *added], exc_info)

    return start


def _split_token(request: Request) -> tuple[str | None, str]:
    """The token of the query, if it has one, and the query without it."""
    if request.method == "POST":
        return None, ""
    found, rest = None, []
    for part in request.query_string.decode("latin-1").split("&"):
        name, _, value = part.partition("=")
        if unquote_plus(name) == TOKEN:
            found = unquote_plus(value)
        else:
            rest.append(part)
    return found, "&".join(rest)


def _address(path: str, query: str) -> str:
    """The address on this server: werkzeug's path begins with one slash, and a quoted backslash is none."""
    safe = quote(path, safe="/:@!$&'()*+,;=~")
    return f"{safe}?{quote(query, safe='%/:@!$&()*+,;=~?')}" if query else safe


def _is_https(request: Request) -> bool:
    forwarded: str = request.headers.get("X-Forwarded-Proto", "")
    return forwarded.split(",")[0].strip().lower() == "https" or request.scheme == "https"


def _client(request: Request) -> str:
    # A client can write what it likes into this header. It only decides with whom it shares a queue; the bound on all
    # queues together holds against guessing.
    return f"{request.remote_addr} {request.headers.get('X-Forwarded-For', '')[:200]}"
