"""A real HTTP server that records what is posted to it, for tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_server import Quiet, serving

SECRET_PATH = "/services/T0PLANTED/webhook"


@dataclass
class Webhook:
    """Somebody who is told."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    """HTTP codes of the first posts; 200 after them."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of every answer."""
    answering: threading.Event = field(default_factory=threading.Event)
    """While it is not set, posts are accepted and not answered."""
    posts: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def events(self) -> list[str]:
        """What was told, in order."""
        return [post["event"] for post in self.posts]

    def until(self, count: int, limit_s: float = 30.0) -> None:
        """Wait for this many posts."""
        deadline = time.monotonic() + limit_s
        while len(self.posts) < count:
            assert time.monotonic() < deadline, f"{count} posts were expected, these came: {self.events}"
            time.sleep(0.005)


@contextmanager
def webhook() -> Iterator[Webhook]:
    """The server, on a port of its own."""
    state = Webhook()
    state.answering.set()

    class Handler(Quiet):
        def do_GET(self) -> None:
            state.paths.append(f"GET {self.path}")
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            state.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            state.paths.append(self.path)
            state.answering.wait()
            try:
                self.send_response(state.answers.pop(0) if state.answers else 200)
                for name, text in state.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except (BrokenPipeError, ConnectionResetError):
                # Whoever posted has given up.
                return

    with serving(Handler) as address:
        state.url = f"{address}{SECRET_PATH}"
        try:
            yield state
        finally:
            state.answering.set()
