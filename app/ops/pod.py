"""RunPod's API: stop, start and look at a pod, create a template.

Newest first: REST v2, then GraphQL. Nothing here terminates a pod: that would delete its volume disk.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from app.config import PodConfig
from app.env import Environment, Secret
from app.errors import MachineError

log = logging.getLogger(__name__)

API = "https://api.runpod.io"
REQUEST_DEADLINE_S = 20.0
TRIES = 4
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
TRY_AGAIN = (409, 429, 500, 502, 503, 504)
"""409: the pod is changing its state; 429: too many requests; the others: their side."""
POD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
ANSWER_LIMIT = 1 << 20
STOP_AGAIN_S = 300.0
SHOWN = 300
"""Characters of an answer in a message."""


class PodError(MachineError):
    """RunPod's API did not do what it was asked for.

    Args:
        message: for people.
        status: of the HTTP answer; None where there was no answer, or a refusal in one with status 200.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class PodState:
    """What RunPod says of a pod."""

    status: str
    """RUNNING, EXITED, TERMINATED ..."""
    usd_per_hour: float | None
    """None where the answer has no price."""


class RunPodApi:
    """RunPod's API for one key.

    Args:
        key: goes into the Authorization header, never into an address.
        base: address of the API.
        pause: sleeps for some seconds.
        tries: of a request.
        deadline_s: of a try.
    """

    def __init__(
        self,
        key: Secret,
        base: str = API,
        pause: Callable[[float], None] = time.sleep,
        tries: int = TRIES,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self._key, self._base, self._pause, self._tries, self._deadline_s = key, base, pause, tries, deadline_s

    def stop_pod(self, pod_id: str) -> str:
        """Stop a pod: its disk is kept, its GPU is no longer paid for.

        Returns:
            Which interface did it.

        Raises:
            PodError: neither interface did.
        """
        try:
            self._request(f"/v2/pods/{_checked(pod_id)}/action", {"action": "stop"})
        except PodError as error:
            log.warning("%s; trying GraphQL", error)
            self._graphql(f'mutation{{podStop(input:{{podId:"{_checked(pod_id)}"}}){{id desiredStatus}}}}')
            return "GraphQL"
        return "API v2"

    def start_pod(self, pod_id: str) -> None:
        """Start a stopped pod.

        Raises:
            PodError: RunPod refused, or did not answer.
        """
        self._request(f"/v2/pods/{_checked(pod_id)}/action", {"action": "start"})

    def pod(self, pod_id: str) -> PodState:
        """Status and price of a pod.

        Raises:
            PodError: there is no such pod, or no answer.
        """
        answer = self._graphql(f'query{{pod(input:{{podId:"{_checked(pod_id)}"}}){{id desiredStatus costPerHr}}}}')
        found = answer["pod"]
        if not isinstance(found, dict) or "desiredStatus" not in found:
            raise PodError(f"pod {pod_id}: this key's account has no such pod")
        price = found.get("costPerHr")
        return PodState(str(found["desiredStatus"]), float(price) if price else None)

    def create_template(self, template: dict[str, Any]) -> str:
        """Create a template and return its id.

        Raises:
            PodError: it was refused; the message has the answer.
        """
        answer = self._request("/v2/templates", template, tries=1)
        if not isinstance(answer.get("id"), str):
            raise PodError(f"POST {self._base}/v2/templates: expected the template's id, found {_shown(answer)}")
        return str(answer["id"])

    def _graphql(self, query: str) -> dict[str, Any]:
        answer = self._request("/graphql", {"query": query})
        data = answer.get("data")
        if answer.get("errors") or not isinstance(data, dict) or not any(data.values()):
            raise PodError(f"{self._base}/graphql refused: {_shown(answer.get('errors') or answer)}")
        return data

    def _request(self, path: str, body: dict[str, Any], tries: int | None = None) -> dict[str, Any]:
        """POST, answered with a JSON object; waits and tries again where that may help."""
        pause = FIRST_PAUSE_S
        for left in reversed(range(self._tries if tries is None else tries)):
            status = None
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = (
                        f"{error.code} {error.reason}: {_shown(error.read(ANSWER_LIMIT).decode(errors='replace'))}"
                    )
                status, hopeless = error.code, error.code not in TRY_AGAIN
                pause = retry_after_s(error) or pause
            except (OSError, http.client.HTTPException) as error:
                problem, hopeless = f"no answer: {error}", False
            except ValueError:
                problem, hopeless = "the answer is not JSON", True
            if hopeless or not left:
                raise PodError(f"POST {self._base}{path}: {problem}", status)
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise ValueError("tries must be positive")

    def _once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {
            "Authorization": f"Bearer {self._key.reveal()}",
            "Content-Type": "application/json",
            # urllib's own name is turned away by some gateways.
            "User-Agent": "hybrid-vit-cascade",
        }
        request = urllib.request.Request(self._base + path, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self._deadline_s) as response:
            text = response.read(ANSWER_LIMIT)
        answer = json.loads(text) if text.strip() else {}
        return answer if isinstance(answer, dict) else {"answer": answer}


def api_of(env: Environment) -> RunPodApi:
    """The API for the key in the environment.

    Raises:
        PodError: there is none.
    """
    if env.runpod_api_key is None:
        raise PodError("RUNPOD_API_KEY is not set: it takes a key of RunPod's console, under Settings, API keys")
    return RunPodApi(env.runpod_api_key)


def stops_pod(pod: PodConfig, pod_id: str | None) -> bool:
    """Whether the end of the run stops the pod that this container runs on."""
    if pod.on_finish == "keep":
        return False
    if pod_id is None and pod.on_finish == "stop":
        log.warning(
            "pod.on_finish is stop, but RUNPOD_POD_ID is not set: this is no RunPod pod, and it goes on running"
        )
    return pod_id is not None


class Patience(Protocol):
    """The wish to stop, and sleep that it cuts short."""

    def __call__(self) -> bool:
        """Whether to stop."""

    def wait(self, seconds: float) -> None:
        """Sleep."""


def stop_this_pod(
    pod: PodConfig,
    pod_id: str | None,
    key: Secret | None,
    stop: Patience,
    base: str = API,
    announce: Callable[[str], None] = lambda text: None,
) -> None:
    """On a pod whose run has ended: the grace period, then stop it, again and again until it is gone.

    Args:
        pod: whether and when.
        pod_id: the pod that this container runs on; None elsewhere.
        key: of RunPod's API.
        stop: true once the pod goes down.
        base: address of the API.
        announce: told before the grace period that and when.
    """
    if not stops_pod(pod, pod_id) or pod_id is None:
        return
    log.info("this pod is stopped in %g minutes; `pod.on_finish: keep` would leave it running", pod.grace_minutes)
    announce(f"the run has ended and this pod is stopped in {pod.grace_minutes:g} minutes")
    stop.wait(60 * pod.grace_minutes)
    while not stop():
        try:
            if key is None:
                raise PodError("RUNPOD_API_KEY is not set")
            log.info("stopping this pod: accepted by %s", RunPodApi(key, base, stop.wait).stop_pod(pod_id))
        except PodError as error:
            log.error("THIS POD COULD NOT BE STOPPED AND COSTS MONEY: stop it in the console. %s", error)
        stop.wait(STOP_AGAIN_S)


def _checked(pod_id: str) -> str:
    if not POD_ID.fullmatch(pod_id):
        raise PodError(f"pod id {pod_id!r}: expected letters, digits, - and _")
    return pod_id


def retry_after_s(error: urllib.error.HTTPError) -> float | None:
    """How long the server asks to wait, in seconds, up to a minute; None where it does not say."""
    text = error.headers.get("Retry-After", "")
    return min(float(text), LONGEST_PAUSE_S) if text.isdigit() else None


def _shown(answer: object) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text.strip()[:SHOWN] or "(empty answer)"
