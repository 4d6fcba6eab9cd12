"""Checks of what a run tells and asks others: Weights & Biases, and RunPod for the end of the pod."""

from __future__ import annotations

import base64
import http.client
import json
import re
import urllib.error
import urllib.request
from typing import Any

from app.config_pod import PodConfig
from app.doctor.finding import Finding, Verdict, passed, warned
from app.env import Environment, Secret
from app.ops.pod import API, PodError, RunPodApi

REQUEST_S = 5.0
ANSWER_LIMIT = 1 << 16
WANDB_KEY = re.compile(r"([^-]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
"""40 or more letters and digits, of a private server behind a prefix; or a JSON web token."""
REFUSED = (401, 403)
NEW_WANDB_KEY = "Copy the key anew from the user settings of W&B into WANDB_API_KEY; it trains without W&B until then"
NEW_RUNPOD_KEY = (
    "Make a key in RunPod's console (Settings, API keys) that may write, set RUNPOD_API_KEY, and restart the pod; "
    "else stop the pod by hand when the run has ended: it costs money until then"
)


def wandb_key(env: Environment) -> Finding:
    """Whether W&B is on as it seems to be meant, and its key looks like one."""
    if not env.wandb_on:
        if env.wandb_mode == "online":
            what = "Set WANDB_API_KEY, or leave WANDB_MODE out"
            return warned("wandb_key", "WANDB_MODE is online and there is no WANDB_API_KEY: W&B stays off", what)
        return passed("wandb_key", f"W&B is off ({'WANDB_MODE=disabled' if env.wandb_mode else 'no WANDB_API_KEY'})")
    if env.wandb_api_key is None or env.wandb_mode == "offline":
        return passed("wandb_key", "W&B is offline: `wandb sync` sends the run later")
    key = env.wandb_api_key.reveal()
    if not WANDB_KEY.fullmatch(key):
        found = f"WANDB_API_KEY has {len(key)} characters and does not look like a key (40 or more letters and digits)"
        return warned("wandb_key", found, NEW_WANDB_KEY)
    return passed("wandb_key", f"WANDB_API_KEY has the form of a key ({len(key)} characters)")


def wandb_reach(env: Environment, base: str) -> Finding | None:
    """Whether W&B takes the key: one request.

    Args:
        env: the key.
        base: address of the API.
    """
    if env.wandb_api_key is None or not env.wandb_on or env.wandb_mode == "offline":
        return None
    try:
        answer = _ask_wandb(base, env.wandb_api_key)
    except urllib.error.HTTPError as error:
        with error:
            found = f"{base} answered {error.code} {error.reason}"
        if error.code in REFUSED:
            return warned("wandb", f"{found}: the key is not accepted", NEW_WANDB_KEY)
        return warned("wandb", found, "Nothing now: points are sent when it answers, TensorBoard has them all")
    except (OSError, http.client.HTTPException, ValueError) as error:
        what = "Look at the pod's network. Points are sent when W&B answers, TensorBoard has them all"
        return warned("wandb", f"no answer from {base}: {error}", what)
    if not (answer.get("data") or {}).get("viewer"):
        return warned("wandb", f"{base} knows no user with this key", NEW_WANDB_KEY)
    return passed("wandb", f"{base} accepts the key")


def _ask_wandb(base: str, key: Secret) -> dict[str, Any]:
    login = base64.b64encode(f"api:{key.reveal()}".encode()).decode()
    headers = {
        "Authorization": f"Basic {login}",
        "Content-Type": "application/json",
        "User-Agent": "hybrid-vit-cascade",
    }
    body = json.dumps({"query": "query{viewer{id}}"}).encode()
    request = urllib.request.Request(f"{base}/graphql", body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
        answer = json.loads(response.read(ANSWER_LIMIT))
    if not isinstance(answer, dict):
        raise ValueError("expected an object")
    return answer


def runpod(env: Environment, pod: PodConfig, base: str = API) -> Finding | None:
    """Whether the key can stop this pod when the run has ended: one request that looks at the pod."""
    if env.runpod_pod_id is None or pod.on_finish == "keep":
        return None
    # Asked for in so many words, a stop that fails is a failure; by default the run is worth more than its end.
    verdict = Verdict.FAIL if pod.on_finish == "stop" else Verdict.WARN
    if env.runpod_api_key is None:
        return Finding("runpod", verdict, "no RUNPOD_API_KEY: this pod cannot stop itself", NEW_RUNPOD_KEY)
    try:
        api = RunPodApi(env.runpod_api_key, base, tries=1, deadline_s=REQUEST_S)
        state = api.pod(env.runpod_pod_id)
    except PodError as error:
        if error.status in REFUSED:
            found = f"{base} answered {error.status}: RUNPOD_API_KEY is not accepted, and this pod cannot stop itself"
            return Finding("runpod", verdict, found, NEW_RUNPOD_KEY)
        what = (
            "Look at the answer, and where there is none at the pod's network. At the end of the run the stop is tried "
            "again every few minutes"
        )
        return warned("runpod", str(error), what)
    price = "" if state.usd_per_hour is None else f", {state.usd_per_hour:g} USD/h"
    return passed("runpod", f"the key knows this pod ({state.status}{price}), which is stopped when the run has ended")
