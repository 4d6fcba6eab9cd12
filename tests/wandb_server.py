"""A stand-in for the server of Weights & Biases on this machine."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


def wandb_env(address: str) -> dict[str, str]:
    """Variables that point Weights & Biases to a server."""
    return {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}


@dataclass
class Artifact:
    """A version of an artifact."""

    name: str
    aliases: set[str]
    metadata: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Server(ThreadingHTTPServer):
    """As much of the W&B server as one run needs: it keeps history and summary, and says what it has."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ServerHandler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.requests: list[bytes] = []
        self.artifacts: list[Artifact] = []
        self.takes_files = threading.Event()
        """While it is not set, the question where to send an artifact's files is not answered."""
        self.takes_files.set()

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
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "lab", "username": "lab", "email": "", "flags": "{}"}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return self._answer_of_artifacts(operation, variables)

    def _answer_of_artifacts(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "ArtifactType":
            return {"project": None}
        if operation == "CreateArtifact":
            asked = variables["input"]
            aliases = {alias["alias"] for alias in asked["aliases"]}
            self.artifacts.append(Artifact(asked["artifactCollectionName"], aliases, json.loads(asked["metadata"])))
            artifact = {"id": str(len(self.artifacts) - 1), "state": "PENDING"}
            return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"latestArtifact": None}}}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            manifest = {"id": "m", "file": {"id": "f", "uploadUrl": f"{self.address}/upload", "uploadHeaders": []}}
            return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            self.takes_files.wait()
            return {"createArtifactFiles": {"files": {"edges": [self._new_file(file) for file in _files(variables)]}}}
        if operation == "CommitArtifact":
            self.artifacts[int(variables["artifactID"])].committed = True
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}
        if operation == "ArtifactByID":
            return {"artifact": _described(self.artifacts[int(variables["id"])], variables["id"])}
        return {}

    def _new_file(self, file: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.address}/artifact/{file['artifactID']}/{file['name']}"
        node = {"storagePath": None, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
        return {"node": {**node, "artifact": {"id": file["artifactID"]}}}

    def receive(self, files: dict[str, Any]) -> None:
        """A piece of the file stream."""
        if history := files.get("wandb-history.jsonl"):
            begin, lines = history["offset"], [json.loads(line) for line in history["content"]]
            assert begin <= len(self.history)
            self.history[begin : begin + len(lines)] = lines
        if summary := files.get("wandb-summary.json"):
            self.summary = json.loads(summary["content"][-1])


def _files(variables: dict[str, Any]) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = variables["input"]["artifactFiles"]
    return files


def _described(artifact: Artifact, number: str) -> dict[str, Any]:
    """What the server says of a version that is committed."""
    sequence = {"__typename": "ArtifactSequence", "name": artifact.name, "project": None}
    return {
        "__typename": "Artifact",
        "id": number,
        "artifactSequence": sequence,
        "versionIndex": int(number),
        "artifactType": {"name": "model"},
        "description": None,
        "metadata": None,
        "ttlDurationSeconds": 0,
        "ttlIsInherited": True,
        "tags": [],
        "historyStep": None,
        "state": "COMMITTED",
        "size": 0,
        "digest": "",
        "commitHash": None,
        "fileCount": 1,
        "createdAt": "2026-01-31T00:00:00",
        "updatedAt": None,
        "aliases": [],
    }


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
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            assert operation
            answer = {"data": self.server.answer(operation[1], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.receive(json.loads(body).get("files") or {})
        elif self.path.startswith("/artifact/"):
            _, _, number, name = self.path.split("/")
            self.server.artifacts[int(number)].files[name] = body
        encoded = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_PUT = do_POST

    def handle(self) -> None:
        """A client that was killed is no error."""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            super().handle()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """A server that answers, at `http://127.0.0.1:port`."""
    with Server(port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@dataclass
class SilentServer:
    """Takes every connection and answers none."""

    address: str
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """What points Weights & Biases to it."""
        return wandb_env(self.address)

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
