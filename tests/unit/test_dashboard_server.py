"""The HTTP server under a small application: bounded, quiet, and honest about its port."""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from app.errors import MachineError
from app.ops import dashboard_server
from app.ops.dashboard_server import RequestHandler, Server

REQUEST = b"GET /page?token=secret HTTP/1.1\r\nHost: localhost\r\n\r\n"


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answers; breaks where it is asked to."""
    if environ["PATH_INFO"] == "/breaks":
        raise ValueError(environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"good"]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server for two connections at a time that may be silent for half a second."""
    monkeypatch.setattr(dashboard_server, "CONNECTIONS", 2)
    monkeypatch.setattr(RequestHandler, "timeout", 0.5)
    with Server("127.0.0.1", 0, application) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.port
        server.shutdown()
        thread.join()


def answer(port: int, request: bytes = REQUEST) -> bytes:
    """All that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(10_000):
            received += chunk
        return received


def test_an_answer_does_not_say_what_the_server_is(port: int) -> None:
    """Neither Python nor werkzeug nor a version."""
    text = answer(port)
    assert text.startswith(b"HTTP/1.1 200 OK\r\nServer: dashboard\r\n")
    assert text.endswith(b"\r\n\r\ngood")


def test_connections_are_bounded_and_silent_ones_dropped(port: int) -> None:
    """Two that say nothing take both places; a third is closed at once; once they are dropped all is well."""
    with (
        socket.create_connection(("127.0.0.1", port)) as first,
        socket.create_connection(("127.0.0.1", port)) as second,
    ):
        first.sendall(b"GET / HT")
        try:
            refused = answer(port)
        except ConnectionError:
            refused = b""
        assert refused == b""
        for silent in (first, second):
            silent.settimeout(5)
            assert silent.recv(100) == b""
        for _ in range(5):
            assert answer(port).endswith(b"good")


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST,
        b"GET /?token=secret\x01 HTTP/9.9\r\n\r\n",
        b"token=secret\r\n\r\n",
        b"GET /page?token=secret HTTP/1.1\r\n" + b"X: secret\r\n" * 200 + b"\r\n",
        b"GET /" + b"secret" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /breaks?token=secret HTTP/1.1\r\n\r\n",
    ],
    ids=["good", "version", "syntax", "headers", "length", "breaks"],
)
def test_nothing_of_a_request_is_logged(
    port: int, request_: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with it."""
    caplog.set_level(logging.DEBUG)
    with contextlib.suppress(ConnectionError):
        answer(port, request_)
    written = capfd.readouterr()
    assert "secret" not in caplog.text + written.out + written.err
    assert ("a page broke while it was sent" in caplog.text) == (b"/breaks" in request_)


def test_a_taken_port_is_named() -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        message = f"^port {taken} of 127.0.0.1 is taken: stop what listens there, or choose another one with PORT$"
        with pytest.raises(MachineError, match=message):
            Server("127.0.0.1", taken, application)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.name.invalid"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    """With what it should be."""
    message = (
        rf"^cannot listen on port 7 of {host}: .*\. DASHBOARD_HOST must be an address of this machine, such as 127"
    )
    with pytest.raises(MachineError, match=message):
        Server(host, 7, application)
