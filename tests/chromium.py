"""Headless Chromium over the DevTools protocol on a pipe: no driver and no package are needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WINDOW = (1600, 1000)
ANSWER_S = 60.0


class Browser:
    """One page; every request of it is answered by the network alone.

    Args:
        profile: an empty folder for its files.
        password: given when the server asks; None gives up there, as a person without it would.
    """

    def __init__(self, profile: Path, password: str | None = None) -> None:
        program = shutil.which("chromium")
        assert program, "chromium is missing: apt-get install chromium"
        self._password = password
        self._count = 0
        self._received = b""
        self._loaded = False
        self.statuses: dict[str, int] = {}
        """Address and status of each answer that the page got."""
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
        # Chromium wants the pipe at 3 and 4.
        wrapped = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}', program, *options, "about:blank"]
        self._process = subprocess.Popen(
            wrapped, pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(from_write)
        self._session: str | None = None

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Fetch.enable", handleAuthRequests=True)
        self.resize(*WINDOW)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command of the protocol."""
        number = self._send(method, parameters)
        deadline = time.monotonic() + ANSWER_S
        while True:
            message = self._next(deadline)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """The window, or the screen of a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, url: str) -> int:
        """Loads an address; returns the status of the page itself, after redirects."""
        self.statuses.clear()
        self._loaded = False
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + ANSWER_S
        while not self._loaded:
            self._next(deadline)
        return self.statuses[self.evaluate("location.href.split('#')[0]")]

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, limit_s: float = 30.0) -> Any:
        """The value of the expression as soon as it is true."""
        deadline = time.monotonic() + limit_s
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._count

    def _next(self, deadline: float) -> dict[str, Any]:
        """The next message; events are handled on the way."""
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium has ended"
            self._received += chunk
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._handle(message.get("method"), message.get("params", {}))
        return message

    def _handle(self, event: str | None, fields: dict[str, Any]) -> None:
        if event == "Fetch.requestPaused":
            self._send("Fetch.continueRequest", {"requestId": fields["requestId"]})
        elif event == "Fetch.authRequired":
            reply: dict[str, Any] = {"response": "CancelAuth"}
            if self._password is not None:
                reply = {"response": "ProvideCredentials", "username": "any", "password": self._password}
            self._send("Fetch.continueWithAuth", {"requestId": fields["requestId"], "authChallengeResponse": reply})
        elif event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.responseReceived":
            self.statuses[fields["response"]["url"].split("#")[0]] = fields["response"]["status"]
