"""RunPod's API: stop, start, terminate and look at a pod, create a template; how the end of a run stops its pod.

Newest first: REST v2, then GraphQL. A pod is stopped, with a network volume too (RunPod's documentation since May 2026;
before, such a pod could only be terminated). Terminating deletes a pod with its own disk, so only `terminates_pod` says
yes to it: where a network volume holds the work.
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
from pathlib import Path
from typing import Any, Protocol

from app.config_pod import PodConfig
from app.env import Environment, Secret
from app.errors import ConfigError, MachineError

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
TELL_EVERY = 12
"""Failures to stop a pod, of which one is told to the webhook: an hour's."""
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
        base: address of the API; None is RunPod's.
        pause: sleeps for some seconds.
        tries: of a request.
        deadline_s: of a try.
    """

    def __init__(
        self,
        key: Secret,
        base: str | None = None,
        pause: Callable[[float], None] = time.sleep,
        tries: int = TRIES,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self._key, self._base, self._pause = key, base or API, pause
        self._tries, self._deadline_s = tries, deadline_s

    def stop_pod(self, pod_id: str) -> str:
        """Stop a pod: its disk is kept, its GPU is no longer paid for.

        Returns:
            Which interface did it.

        Raises:
            PodError: neither interface did.
        """
        graphql = f'mutation{{podStop(input:{{podId:"{_checked(pod_id)}"}}){{id desiredStatus}}}}'
        return self._act(pod_id, "stop", graphql)

    def terminate_pod(self, pod_id: str) -> str:
        """Delete a pod and its own disk; a network volume is kept.

        Returns:
            Which interface did it.

        Raises:
            PodError: neither interface did.
        """
        return self._act(pod_id, "terminate", f'mutation{{podTerminate(input:{{podId:"{_checked(pod_id)}"}})}}')

    def _act(self, pod_id: str, action: str, graphql: str) -> str:
        try:
            self._request(f"/v2/pods/{_checked(pod_id)}/action", {"action": action})
        except PodError as error:
            log.warning("%s; trying GraphQL", error)
            # To terminate answers with nothing.
            self._graphql(graphql, may_be_null=action == "terminate")
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

    def _graphql(self, query: str, may_be_null: bool = False) -> dict[str, Any]:
        answer = self._request("/graphql", {"query": query})
        data = answer.get("data")
        if answer.get("errors") or not isinstance(data, dict) or not (may_be_null or any(data.values())):
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


def api_of(env: Environment, base: str | None = None) -> RunPodApi:
    """The API for the key in the environment; `base` is its address, None RunPod's.

    Raises:
        PodError: there is none.
    """
    if env.runpod_api_key is None:
        raise PodError("RUNPOD_API_KEY is not set: it takes a key of RunPod's console, under Settings, API keys")
    return RunPodApi(env.runpod_api_key, base)


def stops_pod(pod: PodConfig, pod_id: str | None) -> bool:
    """Whether the end of the run stops the pod that this container runs on; elsewhere the log says what it would do."""
    if pod.on_finish == "keep":
        return False
    if pod_id is None:
        log.log(
            logging.INFO if pod.on_finish == "auto" else logging.WARNING,
            "dry run: RUNPOD_POD_ID is not set, so this is no RunPod pod, and it goes on running. On a pod, the "
            "checkpoints would be verified and the pod %s after %g minutes",
            "terminated" if pod.on_finish == "terminate" else "stopped",
            pod.grace_minutes,
        )
    return pod_id is not None


def check_ending(pod: PodConfig, env: Environment) -> None:
    """At the start of a run, while nothing is lost.

    Raises:
        ConfigError: the pod is to be terminated, and nothing says that the work is on a network volume.
    """
    if pod.on_finish != "terminate" or env.runpod_pod_id is None:
        return
    expected = "pod.on_finish: terminate deletes the pod with its own disk, so the work must lie on a network volume"
    instead = "Attach a network volume, or use pod.on_finish: stop, which keeps the pod's disk"
    if env.runpod_volume_id is None:
        raise ConfigError(f"{expected}; RUNPOD_VOLUME_ID is not set, so this pod has none. {instead}")
    if not _is_mounted(env.workspace):
        raise ConfigError(
            f"{expected}; this pod has one (RUNPOD_VOLUME_ID), but {env.workspace} is no mounted volume. Set WORKSPACE "
            f"to the folder where it is mounted. {instead}"
        )


class Patience(Protocol):
    """The wish to stop, and sleep that it cuts short."""

    def __call__(self) -> bool:
        """Whether to stop."""

    def wait(self, seconds: float) -> None:
        """Sleep."""


def stop_this_pod(
    pod: PodConfig,
    pod_id: str,
    key: Secret | None,
    stop: Patience,
    *,
    announce: Callable[[str], None] = lambda text: None,
    alarm: Callable[[str], None] = lambda text: None,
    terminate: bool = False,
    why: str = "the run has ended",
    base: str | None = None,
) -> None:
    """On a pod whose run has ended: the grace period, then stop it, again and again until it is gone.

    Args:
        pod: when.
        pod_id: the pod that this container runs on.
        key: of RunPod's API.
        stop: true once the pod goes down.
        announce: told before the grace period that and when.
        alarm: told now and then that the pod cannot be stopped.
        terminate: delete the pod in place of stopping it.
        why: for log and announcement.
        base: address of the API; None is RunPod's.
    """
    verb = "terminated" if terminate else "stopped"
    text = f"{why}; this pod is {verb} in {pod.grace_minutes:g} minutes"
    log.info("%s. `pod.on_finish: keep` would leave it running", text)
    announce(text)
    stop.wait(60 * pod.grace_minutes)
    failures = 0
    while not stop():
        try:
            if key is None:
                raise PodError("RUNPOD_API_KEY is not set")
            api = RunPodApi(key, base, stop.wait)
            accepted = api.terminate_pod(pod_id) if terminate else api.stop_pod(pod_id)
            log.info("this pod is %s: accepted by %s", verb, accepted)
        except PodError as error:
            problem = f"THIS POD COULD NOT BE {verb.upper()} AND COSTS MONEY: stop or terminate it in the console"
            log.error("%s. The run's files are safe. Trying again in %.0f s. %s", problem, STOP_AGAIN_S, error)
            if failures % TELL_EVERY == 0:
                alarm(problem)
            failures += 1
        stop.wait(STOP_AGAIN_S)


def _is_mounted(folder: Path) -> bool:
    """Whether a volume is mounted at `folder` or above it, below the root."""
    folder = folder.resolve()
    return any(path.is_mount() for path in [folder, *folder.parents] if path != Path("/"))


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
