"""A stand-in for the server of Weights & Biases on this machine."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """As much of the W&B server as one run needs: it keeps history and summary, and says what it has."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ServerHandler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.requests: list[bytes] = []

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL request."""
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "lab"}}
        bucket = {"id": "b", "name": variables.get("name"), "displayName": "run", "historyLineCount": len(self.history)}
        if operation == "RunResumeStatus":
            tail = json.dumps([json.dumps(row) for row in self.history[-1:]])
            state = {"summaryMetrics": json.dumps(self.summary), "historyTail": tail, "eventsTail": "[]"}
            counts = {
                "logLineCount": 0,
                "eventsLineCount": 0,
                "config": json.dumps(self.config),
                "tags": [],
                "wandbConfig": '{"t": 1}',
            }
            return {"model": {**project, "bucket": {**bucket, **state, **counts} if self.history else None}}
        if operation == "UpsertBucket":
            self.config = json.loads(variables.get("config") or json.dumps(self.config))
            bucket |= {"config": json.dumps(self.config), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def receive(self, files: dict[str, Any]) -> None:
        """A piece of the file stream."""
        if history := files.get("wandb-history.jsonl"):
            assert history["offset"] == len(self.history)
            self.history += [json.loads(line) for line in history["content"]]
        if summary := files.get("wandb-summary.json"):
            self.summary = json.loads(summary["content"][-1])


class ServerHandler(BaseHTTPRequestHandler):
    """Reads one request and answers it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(self.path.encode() + body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.answer(request.get("operationName", ""), request["variables"])}
        elif self.path.endswith("/file_stream"):
            self.server.receive(json.loads(body).get("files") or {})
        encoded = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_PUT = do_POST

    def handle(self) -> None:
        """A client that was killed is no error."""
        with contextlib.suppress(ConnectionResetError):
            super().handle()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@dataclass
class SilentServer:
    """Takes every connection and answers none."""

    address: str
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """What points Weights & Biases to it."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": KEY}

    @property
    def client_ports(self) -> list[int]:
        """From where the connections came."""
        return [connection.getpeername()[1] for connection in self.connections]


@contextmanager
def silent_server() -> Iterator[SilentServer]:
    """A network that hangs."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        server = SilentServer(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.connections.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in server.connections:
                connection.close()
