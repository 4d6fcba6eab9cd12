"""PID 1 of the container: starts supervisord, passes SIGTERM on at once, reaps, and leaves when all are gone.

supervisord answers a signal after up to a second and stops its programs one after another; a pod gives five seconds in
all. So the trainer hears of it here first.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.env import Environment, child_environment, cluster_node, this_pod
from app.errors import MachineError, Stopped
from app.ops.startup import RUNTIME, runtime_folder, sshd_command, write_shell_file

log = logging.getLogger(__name__)

SUPERVISORD_CONFIG = Path(__file__).resolve().parents[2] / "docker" / "supervisord.conf"
PID_FILE = "hybrid_vit_cascade.trainer.json"
STOPS = {signal.SIGTERM, signal.SIGINT}
LISTENED = {*STOPS, signal.SIGCHLD}
LOOK_EVERY_S = 5.0
KILL_AFTER_S = 4.4
"""What is left of a pod's five seconds is for the kernel and this process."""
HURRY_AFTER_S = 2.5
LAST_REAPING_S = 0.2
DOCTOR_S = 2.0
"""So long the programs wait for the doctor, so that its lines stand before theirs; a slower one goes on beside them."""
PR_SET_CHILD_SUBREAPER = 36
INIT = 1


@dataclass
class Shim:
    """The processes of the container."""

    pid_file: Path
    environment: Mapping[str, str]
    supervisord: int | None = None
    ended: int | None = None
    """Exit code of supervisord."""
    doctor: int | None = None

    def run(self, doctor: Sequence[str], sshd: Sequence[str] | None) -> int:
        """Until a signal comes or supervisord ends; the exit code.

        Args:
            doctor: a command that says what is wrong here; how it ends means nothing.
            sshd: the SSH server; None is none.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, LISTENED)
        _adopt_orphans()
        if sshd is not None:
            self._spawn(sshd)
        if self._examine(doctor):
            return Stopped.exit_code
        # Named root, supervisord does not log as critical that nobody told it to be another user.
        user = ["-u", "root"] if os.getuid() == 0 else []
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(SUPERVISORD_CONFIG), *user]
        self.supervisord = self._spawn(command)
        while True:
            received = signal.sigtimedwait(LISTENED, LOOK_EVERY_S)
            self._reap()
            if self._stopped_by(received):
                return Stopped.exit_code
            if self.ended is not None:
                log.error("supervisord ended with %d, which it never should; leaving, to be started again", self.ended)
                self._stop()
                return MachineError.exit_code

    def _examine(self, doctor: Sequence[str]) -> bool:
        """Start the doctor and give it a moment; whether a signal came meanwhile."""
        self.doctor = self._spawn(doctor)
        until = time.monotonic() + DOCTOR_S
        while self.doctor is not None and (left := until - time.monotonic()) > 0:
            received = signal.sigtimedwait(LISTENED, left)
            self._reap()
            if self._stopped_by(received):
                return True
        return False

    def _stopped_by(self, received: signal.struct_siginfo | None) -> bool:
        """Whether this signal ends the container; then everything has ended."""
        if received is None or received.si_signo not in STOPS:
            return False
        log.info("%s: stopping", signal.Signals(received.si_signo).name)
        self._stop()
        return True

    def _spawn(self, command: Sequence[str]) -> int:
        # The mask is inherited; with it a child would be deaf to SIGTERM.
        return os.posix_spawnp(command[0], list(command), self.environment, setsigmask=[])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.doctor:
                self.doctor = None
            if pid == self.supervisord:
                self.supervisord, self.ended = None, os.waitstatus_to_exitcode(status)

    def _stop(self) -> None:
        """The trainer first, then supervisord, then whatever is left, then the end of patience."""
        start = time.monotonic()
        trainer = self._trainer() | self._adopted()
        _signal(trainer, signal.SIGTERM)
        if self.supervisord is not None:
            _signal({self.supervisord}, signal.SIGTERM)
        hurried = False
        while left := descendants():
            if time.monotonic() - start > KILL_AFTER_S:
                log.error("killing %d processes that did not end in %.1f s", len(left), KILL_AFTER_S)
                _signal(left, signal.SIGKILL)
                signal.sigtimedwait({signal.SIGCHLD}, LAST_REAPING_S)
                break
            if not hurried and not left & trainer and time.monotonic() - start > HURRY_AFTER_S:
                # The trainer has had its time, and the dashboard need not wait until supervisord turns to it.
                hurried = True
                _signal({pid for pid in left if pid != self.supervisord}, signal.SIGTERM)
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)
            self._reap()
        self._reap()
        log.info("all processes ended after %.1f s", time.monotonic() - start)

    def _trainer(self) -> set[int]:
        """The trainer's process, where it runs and is one of ours: a number in a file may be outdated."""
        try:
            found = json.loads(self.pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return set()
        return set(found) & descendants()

    def _adopted(self) -> set[int]:
        """Orphans, a trainer among them if the process that watched over it was killed; and the SSH server."""
        return {pid for pid, parent in living().items() if parent == os.getpid()} - {self.supervisord}


def supervise(
    env: Environment, train_arguments: Sequence[str], config_arguments: Sequence[str], runtime: Path = RUNTIME
) -> int:
    """Run the container's programs until it is stopped.

    Args:
        env: the environment.
        train_arguments: of the command `train`.
        config_arguments: those of them that say the config.
        runtime: folder for what must not lie on the volume.

    Returns:
        The exit code of the container.
    """
    folder = runtime_folder(runtime)
    shell_file = write_shell_file(folder)
    log.info("variables for shells by SSH: %s", shell_file)
    sshd = None if env.public_key is None else sshd_command(env.public_key, folder)
    pid_file = folder / PID_FILE
    pid_file.unlink(missing_ok=True)
    arguments = [*train_arguments, "--pid-file", str(pid_file)]
    node = cluster_node()
    added = {
        "PYTHON": sys.executable,
        "TRAIN_ARGS": shlex.join(arguments),
        "RUNTIME_DIR": str(folder),
        "SERVES": "true" if node is None or node.rank == 0 else "false",
    }
    doctor = [sys.executable, "-m", "app", "doctor", "--brief", *config_arguments]
    return Shim(pid_file, child_environment(added)).run(doctor, sshd)


class Parked:
    """The wish to stop of a process that waits for nothing else, with its signals blocked."""

    def __init__(self) -> None:
        """From now on signals wait for `wait`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        self._asked = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._asked

    def wait(self, seconds: float) -> None:
        """Sleep, cut short by a stop."""
        if not self._asked:
            self._asked = signal.sigtimedwait(STOPS, seconds) is not None


def park(problem: str) -> int:
    """Keep a container that cannot start, instead of having it restarted for ever; a pod is stopped, as after any end.

    Returns:
        The exit code, once it is stopped.
    """
    # Imported late: the first process of a container that starts needs none of it.
    from app.config_pod import PodConfig
    from app.ops.pod import stop_this_pod

    parked = Parked()
    print(f"error: {problem}\nNothing runs; this container waits to be stopped.", file=sys.stderr, flush=True)
    pod_id, key = this_pod()
    if pod_id is not None:
        why = "nothing runs here, because the container could not start"
        stop_this_pod(PodConfig(), pod_id, key, parked, announce=_say, why=why)
    while not parked():
        parked.wait(LOOK_EVERY_S)
    return Stopped.exit_code


def _say(text: str) -> None:
    # There may be no log yet.
    print(text, file=sys.stderr, flush=True)


def living() -> dict[int, int]:
    """Parent of each living process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    return parents


def descendants() -> set[int]:
    """All living processes below this one."""
    parents = living()
    found: set[int] = set()
    generation = {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _adopt_orphans() -> None:
    """What PID 1 does by nature: processes whose parent ended become ours."""
    if os.getpid() != INIT:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
