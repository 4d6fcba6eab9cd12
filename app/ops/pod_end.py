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
from dataclasses import dataclass
from typing import Any

from app.config_pod import PodConfig
from app.env import Environment, child_environment
from app.errors import Stopped
from app.ops.notify import VERIFICATION_FAILED, POD_NOT_STOPPED, STOPPING
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
    flushed = _output(["sync", "--file-system", str(run_dir.path)], FLUSH_WITHIN_S, stop, {})
    if not isinstance(flushed, str):
        log.info("the volume is flushed")
    # Without a config, which may be what is wrong: the run's name alone says where it is.
    variables = {"CONFIG": "", "RUN_NAME": run_name or ""}
    command = [sys.executable, "-m", "app", "checkpoints", "--json"]
    verified = _output(command, VERIFY_WITHIN_S, stop, variables)
    found = _verdict(verified)
    if isinstance(flushed, str):
        found = FinalCheck(f"{found.text}. THE VOLUME COULD NOT BE FLUSHED: {flushed}", passed=False)
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


def _verdict(verified: bytes | str) -> FinalCheck:
    if isinstance(verified, str):
        return FinalCheck(f"THE CHECKPOINTS COULD NOT BE VERIFIED: {verified}", passed=False)
    try:
        found: dict[str, Any] = json.loads(verified)
        files = found["files"]
    except (ValueError, LookupError, TypeError):
        return FinalCheck(
            "THE CHECKPOINTS COULD NOT BE VERIFIED: `checkpoints --json` said nothing of them", passed=False
        )
    if not files:
        return FinalCheck("there are no checkpoints to verify", passed=True)
    damaged = [f"{each['file']} ({each['damage']})" for each in files if each["damage"] is not None]
    resumed = "NONE OF THEM CAN BE RESUMED FROM"
    if found["resume_point"] is not None:
        resumed = f"the run goes on from {found['resume_point']}"
    if not damaged:
        return FinalCheck(
            f"all {len(files)} checkpoints are whole; {resumed}", passed=found["resume_point"] is not None
        )
    return FinalCheck(
        f"{len(damaged)} OF {len(files)} CHECKPOINTS ARE DAMAGED: {', '.join(damaged)}; {resumed}", passed=False
    )


def _output(command: list[str], limit_s: float, stop: Callable[[], bool], variables: dict[str, str]) -> bytes | str:
    """What a process wrote, or in words why there is nothing to read."""
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment(variables))
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    deadline = time.monotonic() + limit_s
    while True:
        try:
            output, _ = child.communicate(timeout=POLL_S)
            break
        except subprocess.TimeoutExpired:
            if stop() or time.monotonic() > deadline:
                # One that waits for a disk does not end, and is not waited for.
                child.kill()
                return "the pod goes down" if stop() else f"not done after {limit_s:.0f} s"
    # `checkpoints` ends with 74 where there is nothing to resume from, and has said so.
    return output if output or child.returncode == 0 else f"{command[0]} ended with {child.returncode}"


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
