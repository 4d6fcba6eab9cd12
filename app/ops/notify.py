"""Notifications: a JSON POST to NOTIFY_URL for what happens to a run, from a thread that training never waits for.

Which process sends what, so that nothing is sent twice:

started, resumed, stage finished, finished   the trainer; of several processes of a run the first
refused, stopping                            whoever started the trainer to watch over it, else the trainer itself; a
                                             launcher of several processes only what ends it before they run
verification failed, pod not stopped         whoever stops the pod of a run that has ended
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import urlsplit

from app.env import Environment
from app.errors import AppError, DataError, LockError, Stopped
from app.ops.pod import retry_after_s

log = logging.getLogger(__name__)

STARTED, RESUMED, STAGE_FINISHED, FINISHED = "started", "resumed", "stage finished", "finished"
REFUSED, STOPPING = "refused", "stopping"
VERIFICATION_FAILED, POD_NOT_STOPPED = "verification failed", "pod not stopped"

WAITING_AT_MOST = 20
POST_TIMEOUT_S = 10.0
TRIES = 4
FIRST_PAUSE_S = 1.0
POLL_S = 0.2
AT_END_S = 5.0
"""For what is still to be sent when a run has ended by itself."""
ON_STOP_S = 0.5
"""The same where a killed pod leaves seconds."""
TRY_AGAIN = (408, 429)
"""And all of 500 and more."""
ANSWER_LIMIT = 1 << 12
LONGEST_MESSAGE = 600
QUOTED_PATH = re.compile(r"'[^'\n]*/[^'\n]*'|\"[^\"\n]*/[^\"\n]*\"")
BARE_PATH = re.compile(r"(?<![\w.*])(?:~|\.{1,2})?/[^:;,()\n]*")
"""From its first slash to the next mark of punctuation, since a name in it may have spaces: rather too much."""

Where = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Notice:
    """Something to send."""

    event: str
    message: str
    time: float
    where: Mapping[str, Any]
    """`stage`, `step` and `epoch`, as far as they are known."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, and elsewhere."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class Notifier:
    """Sends notices from its own thread, one at a time, in order; a context that gives what is left a moment.

    Without a URL it does nothing. With one that does not answer, notices are dropped with a line in the log.
    """

    def __init__(
        self,
        env: Environment,
        *,
        run: str | None = None,
        stop: Callable[[], bool] = lambda: False,
        tells_end: bool = True,
        timeout_s: float = POST_TIMEOUT_S,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """Start the thread.

        Args:
            env: has the URL, the pod's id, and the secrets that no notice may hold.
            run: name of the run, as far as it is known.
            stop: whether the process was asked to stop.
            tells_end: whether this process is the one that says why and that it ends.
            timeout_s: of a POST.
            first_pause_s: before a POST is tried again; doubled each time.
        """
        self.run = run
        self.where: Where = dict
        """Where the run is now; asked in the thread."""
        self._url, self._pod = env.notify_url, env.runpod_pod_id
        self._secrets = [secret.reveal() for secret in env.secrets]
        self._stop, self._tells_end = stop, tells_end
        self.tells_stop = tells_end
        """Whether this process says that it was asked to stop; one that has started others which say it, does not."""
        self._timeout_s, self._first_pause_s = timeout_s, first_pause_s
        self._changed = threading.Condition()
        self._waiting: deque[Notice] = deque()
        self._sending: Notice | None = None
        self._deadline: float | None = None
        self._told_stop = False
        self._thread: threading.Thread | None = None
        if self._url is not None:
            self._host = urlsplit(self._url.reveal()).hostname or ""
            self._opener = urllib.request.build_opener(_NoRedirects)
            self._thread = threading.Thread(target=self._work, name="notifications", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A refusal that nobody else tells is told; then the rest is sent, for as long as there is."""
        stopped = self._stop() or isinstance(error, Stopped)
        if stopped:
            if self.tells_stop:
                self.stopping()
        elif self._tells_end and isinstance(error, AppError):
            self.refused(error.exit_code, str(error))
        self.close(ON_STOP_S if stopped else AT_END_S)

    def send(self, event: str, message: str, **where: Any) -> None:
        """Hand over a notice; returns at once. What was handed over first is dropped where too many wait."""
        if self._thread is None:
            return
        notice = Notice(event, message, time.time(), where or dict(self.where()))
        with self._changed:
            if len(self._waiting) >= WAITING_AT_MOST:
                oldest = self._waiting.popleft()
                log.warning("notifications: %s does not keep up, '%s' is dropped", self._host, oldest.event)
            self._told_stop = self._told_stop or event == STOPPING
            self._waiting.append(notice)
            self._changed.notify()

    def stopping(self) -> None:
        """The process was asked to stop; said once, and before anything else that waits: seconds are left."""
        if self._thread is None or self._told_stop:
            return
        # A volume that does not answer must not be waited for with the lock held.
        notice = Notice(STOPPING, "asked to stop", time.time(), dict(self.where()))
        with self._changed:
            if not self._told_stop:
                self._told_stop = True
                self._waiting.appendleft(notice)
                self._changed.notify()

    def refused(self, exit_code: int, reason: str) -> None:
        """The run is refused, and why; another process that trains it is no refusal."""
        if exit_code == LockError.exit_code:
            return
        if exit_code == DataError.exit_code:
            # These name files, and files are named after patients.
            reason = "the input data cannot be used as they are; log and REASON say which and why"
        self.send(REFUSED, f"exit code {exit_code}: {reason}")

    def close(self, limit_s: float) -> None:
        """End the thread once everything is sent or given up, and return after `limit_s` seconds at most."""
        if self._thread is None:
            return
        with self._changed:
            self._deadline = time.monotonic() + limit_s
            self._changed.notify()
        self._thread.join(limit_s)
        with self._changed:
            sending = [] if self._sending is None else [self._sending]
            left = [notice.event for notice in (*sending, *self._waiting)]
        if left:
            log.warning("notifications: %s did not take in time: %s", self._host, ", ".join(left))

    def _work(self) -> None:
        # A signal is for the main thread, which may be asleep and would not wake up for one that arrives here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while True:
            with self._changed:
                self._sending = None
                if not self._waiting and self._deadline is None:
                    self._changed.wait(POLL_S)
            if self.tells_stop and self._stop():
                self.stopping()
            with self._changed:
                if self._waiting:
                    self._sending = self._waiting.popleft()
                elif self._deadline is not None:
                    return
            if self._sending is not None:
                self._deliver(self._sending)

    def _deliver(self, notice: Notice) -> None:
        body = json.dumps(self.payload(notice)).encode()
        pause_s = self._first_pause_s
        for left in reversed(range(TRIES)):
            try:
                self._post(body)
                return
            except urllib.error.HTTPError as error:
                with error:
                    problem, hopeless = f"answer {error.code}", error.code < 500 and error.code not in TRY_AGAIN
                    pause_s = retry_after_s(error) or pause_s
            except (OSError, http.client.HTTPException, ValueError) as error:
                # Its text may hold the address, of which the log has the host alone.
                reason = getattr(error, "reason", error)
                known = isinstance(reason, OSError) and reason.strerror
                problem, hopeless = str(known or type(reason).__name__), isinstance(error, ValueError)
            if hopeless or not left or not self._pause(pause_s):
                break
            pause_s *= 2
        log.warning("notifications: %s did not take '%s': %s", self._host, notice.event, problem)

    def payload(self, notice: Notice) -> dict[str, Any]:
        """The JSON of a notice: no path, no secret."""
        name = "the run" if self.run is None else self.run
        message = self._clean(notice.message)
        text = f"{name}: {notice.event}. {message}"
        place = {key: notice.where.get(key) for key in ("stage", "step", "epoch")}
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(notice.time))
        # Slack shows `text`, Discord `content`.
        shown = {"message": message, "text": text, "content": text}
        return {"event": notice.event, "run": self.run, "time": moment, "pod": self._pod, **place, **shown}

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[hidden]")
        text = " ".join(BARE_PATH.sub("[path]", QUOTED_PATH.sub("[path]", text)).split())
        return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 4]} ..."

    def _post(self, body: bytes) -> None:
        assert self._url is not None
        # urllib's own name is turned away by some gateways.
        headers = {"Content-Type": "application/json", "User-Agent": "hybrid-vit-cascade"}
        request = urllib.request.Request(self._url.reveal(), body, headers, method="POST")
        with self._opener.open(request, timeout=self._timeout_s) as response:
            response.read(ANSWER_LIMIT)

    def _pause(self, seconds: float) -> bool:
        """Wait before the next try; False where there is no time for one."""
        end = time.monotonic() + seconds
        with self._changed:
            while (left := end - time.monotonic()) > 0:
                if (self._deadline is not None and end > self._deadline) or self._stop():
                    return False
                self._changed.wait(min(left, POLL_S))
        return True
