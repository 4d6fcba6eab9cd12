"""The end of a run's pod: its disk is flushed, its checkpoints are whole or it is said aloud, and then it is stopped.

A damaged checkpoint does not keep a pod running: the ones before it are kept, and the disk survives the stop.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from app.config_pod import PodConfig
from app.env import Environment, child_environment
from app.errors import Stopped
from app.ops.notify import POD_NOT_STOPPED, STOPPING, VERIFICATION_FAILED
from app.ops.pod import Patience, stop_this_pod, stops_pod
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

FLUSH_WITHIN_S = 60.0
VERIFY_WITHIN_S = 1800.0
"""100 GiB at 60 MiB/s."""
POLL_S = 0.2
IN_REASON = "before the stop: "
"""Begins the line in REASON that says what was found."""


@dataclass(frozen=True)
class FinalCheck:
    """What was found, in words, and whether all is well."""

    text: str
    passed: bool


def final_check(run_dir: RunDir, run_name: str | None, stop: Callable[[], bool]) -> FinalCheck:
    """Flush the volume and verify every checkpoint of a run, in processes of their own, which may hang.

    Args:
        run_dir: the run.
        run_name: its name.
        stop: cuts it short; then nothing is said of what was found.
    """
    if not run_dir.path.is_dir():
        return FinalCheck("there is no run yet whose checkpoints could be verified", passed=True)
    problem = None
    try:
        _output(["sync", "--file-system", str(run_dir.path)], FLUSH_WITHIN_S, stop, {})
        log.info("the volume is flushed")
    except OSError as error:
        problem = f"THE VOLUME COULD NOT BE FLUSHED: {error}"
    # Without a config, which may be what is wrong: the run's name alone says where it is.
    variables = {"CONFIG": "", "RUN_NAME": run_name or ""}
    try:
        verified = _output([sys.executable, "-m", "app", "checkpoints", "--json"], VERIFY_WITHIN_S, stop, variables)
        found = _verdict(json.loads(verified))
    except (OSError, ValueError) as error:
        found = FinalCheck(f"THE CHECKPOINTS COULD NOT BE VERIFIED: {error}", passed=False)
    if problem is not None:
        found = FinalCheck(f"{found.text}. {problem}", passed=False)
    if not stop():
        log.log(logging.INFO if found.passed else logging.ERROR, "%s", found.text)
        _add_to_reason(run_dir, found.text)
    return found


def end_pod(
    pod: PodConfig,
    env: Environment,
    run_dir: RunDir,
    run_name: str | None,
    code: int,
    stop: Patience,
    send: Callable[[str, str], None],
) -> None:
    """Where this is a pod that ends with its run: look at what it leaves, keep the dashboard up, stop it.

    Args:
        pod: whether, when and how.
        env: the pod's id and the key of RunPod's API.
        run_dir: the run that has ended.
        run_name: its name.
        code: its exit code.
        stop: true once the pod goes down.
        send: tells a webhook of an event.
    """
    pod_id = env.runpod_pod_id
    if not stops_pod(pod, pod_id) or pod_id is None:
        return
    found = final_check(run_dir, run_name, stop)
    if stop():
        return
    if not found.passed:
        send(VERIFICATION_FAILED, found.text)
    terminate = pod.on_finish == "terminate" and code == 0 and found.passed
    if pod.on_finish == "terminate" and not terminate:
        log.warning("this pod is stopped and not terminated: only that of a finished run with whole checkpoints is")

    def announce(text: str) -> None:
        # That the process was asked to stop was told already.
        if code != Stopped.exit_code:
            send(STOPPING, text)

    stop_this_pod(
        pod,
        pod_id,
        env.runpod_api_key,
        stop,
        announce=announce,
        alarm=lambda text: send(POD_NOT_STOPPED, text),
        terminate=terminate,
        why=f"the run has ended, {found.text}",
    )


def _verdict(found: dict[str, Any]) -> FinalCheck:
    """Of what `checkpoints --json` says."""
    files = found["files"]
    if not files:
        return FinalCheck("there are no checkpoints to verify", passed=True)
    damaged = [f"{each['file']} ({each['damage']})" for each in files if each["damage"] is not None]
    resumed = "NONE OF THEM CAN BE RESUMED FROM"
    if found["resume_point"] is not None:
        resumed = f"the run goes on from {found['resume_point']}"
    if not damaged:
        return FinalCheck(f"all {len(files)} checkpoints are whole; {resumed}", passed=True)
    return FinalCheck(
        f"{len(damaged)} OF {len(files)} CHECKPOINTS ARE DAMAGED: {', '.join(damaged)}; {resumed}", passed=False
    )


def _output(command: list[str], limit_s: float, stop: Callable[[], bool], variables: dict[str, str]) -> bytes:
    """What a process wrote.

    Raises:
        OSError: it wrote nothing and failed, or did not end in time.
    """
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment(variables))
    deadline = time.monotonic() + limit_s
    while True:
        try:
            output, _ = child.communicate(timeout=POLL_S)
            break
        except subprocess.TimeoutExpired as error:
            if stop() or time.monotonic() > deadline:
                _leave_behind(child)
                raise TimeoutError(f"{command[0]} did not end within {limit_s:.0f} s") from error
    # `checkpoints` ends with 74 where there is nothing to resume from, and has said so.
    if not output and child.returncode != 0:
        raise ChildProcessError(f"{command[0]} ended with {child.returncode}")
    return output


def _leave_behind(child: subprocess.Popen[bytes]) -> None:
    """Kill a process; one that waits for a disk does not even end by that, and is not waited for."""
    child.kill()
    if child.stdout is not None:
        child.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        child.wait(1)


def _add_to_reason(run_dir: RunDir, text: str) -> None:
    """A line in REASON, where there is one, in place of an earlier one."""
    try:
        lines = run_dir.reason.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(IN_REASON)]
        atomic_write(run_dir.reason, "\n".join([*kept, f"{IN_REASON}{text}", ""]).encode())
    except FileNotFoundError:
        return
    except OSError as error:
        log.error("%s cannot be written: %s", run_dir.reason, error.strerror)
