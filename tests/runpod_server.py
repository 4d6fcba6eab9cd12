"""A real HTTP server that speaks the documented part of RunPod's API, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_server import Quiet, serving

KEY = "rpa_0123456789"
POD = "abc123"
ACTIONS = ("start", "stop", "restart", "terminate")
TEMPLATE_REQUIRED = ("name", "image")


@dataclass
class RunPod:
    """An account with one pod."""

    url: str = ""
    status: str = "RUNNING"
    usd_per_hour: float | None = 0.44
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    """By path: HTTP codes, or texts with code 200, that are answered before the truth is."""
    retry_after: str | None = None
    requests: list[tuple[str, Any]] = field(default_factory=list)
    """(path, body) of everything that came."""
    templates: list[dict[str, Any]] = field(default_factory=list)

    def paths(self) -> list[str]:
        """Where the requests went, in order."""
        return [path for path, _ in self.requests]

    def answer(self, path: str, key: str | None, body: Any) -> tuple[int, Any]:
        """Code and JSON body."""
        if key != f"Bearer {KEY}":
            return 401, {"error": "unauthorized"}
        fault = self.faults.get(path, [])
        if fault:
            first = fault.pop(0)
            return (first, {"error": "as planned"}) if isinstance(first, int) else (200, first)
        if path == "/graphql":
            return 200, self._graphql(body["query"])
        if path == "/v2/templates":
            missing = [name for name in TEMPLATE_REQUIRED if not body.get(name)]
            if missing:
                return 422, {"error": f"missing {missing}"}
            self.templates.append(body)
            return 201, {"id": "tpl_1", **body}
        match = re.fullmatch(r"/v2/pods/([^/]+)/action", path)
        if match is None or match[1] != POD:
            return 404, {"error": "not found"}
        if body.get("action") not in ACTIONS:
            return 422, {"error": "unknown action"}
        self.status = {"stop": "EXITED", "terminate": "TERMINATED"}.get(body["action"], "RUNNING")
        return 200, {"id": POD, "status": self.status}

    def _graphql(self, query: str) -> dict[str, Any]:
        if re.fullmatch(rf'mutation\{{podTerminate\(input:\{{podId:"{POD}"\}}\)\}}', query):
            self.status = "TERMINATED"
            return {"data": {"podTerminate": None}}
        match = re.fullmatch(r'(mutation|query)\{(podStop|pod)\(input:\{podId:"([^"]+)"\}\)\{([\w ]+)\}\}', query)
        if match is None:
            return {"errors": [{"message": f"syntax: {query}"}]}
        if match[3] != POD:
            return {"data": {match[2]: None}}
        if match[2] == "podStop":
            self.status = "EXITED"
        pod = {"id": POD, "desiredStatus": self.status, "costPerHr": self.usd_per_hour}
        return {"data": {match[2]: {name: pod[name] for name in match[4].split()}}}


@contextmanager
def runpod() -> Iterator[RunPod]:
    """The server, on a port of its own."""
    state = RunPod()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, body))
            code, answer = state.answer(self.path, self.headers.get("Authorization"), body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(code)
            if code == 429 and state.retry_after is not None:
                self.send_header("Retry-After", state.retry_after)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as state.url:
        yield state
