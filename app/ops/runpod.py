"""RunPod from a desk: create the template, start a pod again that was taken away."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from app.errors import ConfigError
from app.ops.crash_budget import read_lines
from app.ops.pod import PodError, RunPodApi
from app.workspace import atomic_write

PINNED = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
PICTURE = "expected IMAGE@sha256:DIGEST, the form that never changes what it names"


def pin_image(file: Path, image: str) -> None:
    """Write the image of the template file.

    Raises:
        ConfigError: `image` has no digest, or the file is not a template.
    """
    if not PINNED.fullmatch(image):
        raise ConfigError(f"{image}: {PICTURE}")
    template = read_template(file)
    template["image"] = image
    atomic_write(file, (json.dumps(template, indent=2) + "\n").encode())


def create_template(file: Path, api: RunPodApi) -> str:
    """Create the template of a file and return its id.

    Raises:
        ConfigError: the file cannot be read, or its image is not pinned.
        PodError: RunPod refused it.
    """
    template = read_template(file)
    if not PINNED.fullmatch(str(template.get("image"))):
        raise ConfigError(f"{file}: image {template.get('image')!r}: {PICTURE}. scripts/push writes it")
    return api.create_template(template)


def read_template(file: Path) -> dict[str, Any]:
    """The content of a template file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        template = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(template, dict):
        raise ConfigError(f"{file}: expected an object with name, image, ...")
    return template


def watch(api: RunPodApi, pod_id: str, max_starts: int, max_usd_per_hour: float, ledger: Path) -> str:
    """Look at a pod once, and start it if it is EXITED.

    A pod that stopped itself, because its run is finished or refused, is EXITED too: after a start it says so, and
    stops again. The ledger ends that.

    Args:
        api: of the account.
        pod_id: the pod.
        max_starts: starts in all, earlier ones in the ledger included.
        max_usd_per_hour: a pod that costs more, or whose price is unknown, is not started.
        ledger: JSON lines, one for each start.

    Returns:
        What was found and done, for people.

    Raises:
        PodError: RunPod refused, or a limit is reached.
    """
    state = api.pod(pod_id)
    if state.status != "EXITED":
        return f"pod {pod_id} is {state.status}: nothing to do"
    if state.usd_per_hour is None or state.usd_per_hour > max_usd_per_hour:
        price = "unknown" if state.usd_per_hour is None else f"{state.usd_per_hour:g} USD/h"
        raise PodError(
            f"pod {pod_id} is EXITED and not started: its price is {price}, the limit {max_usd_per_hour:g} USD/h"
        )
    starts = sum(line.get("pod") == pod_id for line in read_lines(ledger))
    if starts >= max_starts:
        raise PodError(
            f"pod {pod_id} is EXITED and not started: it was started {starts} times, the limit is {max_starts}. "
            f"Look at its log and status; then delete its lines in {ledger} or raise --max-starts"
        )
    # The line comes first: a start that nobody counted could be repeated without end.
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a") as file:
        file.write(json.dumps({"pod": pod_id, "time": time.time(), "usd_per_hour": state.usd_per_hour}) + "\n")
    api.start_pod(pod_id)
    return f"pod {pod_id} was EXITED and is started: start {starts + 1} of at most {max_starts}"
