"""What supervisord runs in place of `train`: starts it, starts it again after a crash, and knows when not to.

finished, DONE on the volume            does not train; the dashboard stays
refused, and nothing has changed        does not train, says why again (70, 71, 74)
refused: 65, 69, 78                     ends; looked at again at the next start of the container
a budget is used up                     does not train, or has the trainer save and end: 69
the data folder is empty                waits for a CT
75, another process holds the run       waits and tries again
the same error at the same step         again from the state before, once; then 71
143, and another machine was stopped    again, when it is back
no sign of life                         is ended, with its stack traces in the log: a crash
anything else                           a crash: again from the last checkpoint, within the crash budget
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from app.config import Config
from app.config_pod import PodConfig
from app.env import Environment, child_environment
from app.errors import AppError, CrashBudgetError, DataError, LockError, MachineError, Stopped
from app.log import LOG_FILE, also_in_file
from app.ops.crash_budget import BUDGET, Attempts, Repetition
from app.ops.money_guard import MoneyGuard, price_per_hour
from app.ops.notify import Notifier
from app.ops.pod import check_ending
from app.ops.pod_end import end_pod
from app.ops.refusal import (
    finished,
    forget_config_refusal,
    leave_reason,
    let_stand,
    reason,
    refusal_key,
    standing_refusal,
)
from app.ops.status import RunStatus, read_status
from app.ops.watchdog import Watchdog
from app.workspace import RunDir, Workspace

log = logging.getLogger(__name__)

WRONG_ARGUMENTS = 2
ENDS = (0, WRONG_ARGUMENTS, 65, 69, 70, 71, 74, 78, 143)
"""Exit codes that are not answered by a new start; see `app.errors`."""
STOPPED_EARLY = (-signal.SIGTERM, -signal.SIGINT)
"""Stopped before the trainer had its handlers in place."""
REFUSED = "refused"
"""Begins the state of a run that has ended for good without having finished."""
SIGNALLED = 128
"""Of a run on several GPUs, 128 + N: signal N ended one of its processes, and the launcher all."""
POLL_S = 0.2
LONGEST_CRASH_PAUSE_S = 8.0
FIRST_LOCK_PAUSE_S, LONGEST_LOCK_PAUSE_S = 5.0, 60.0
DATA_POLL_S, DATA_NOTICE_S = 2.0, 60.0
DATA_SETTLES_S = 5.0
"""Whoever copies CTs has finished when nothing in the folder changed for this long."""

GO_ON = {
    0: "To train on, ask for more epochs or give another RUN_NAME, and restart",
    65: "Put the data right and restart: they are checked again at every start",
    69: "Restart when the machine has what is asked for: it is checked again at every start",
    78: "Correct the configuration and restart: it is checked again at every start",
}
STANDS = "This stands until the config, the image or the checkpoints change; deleting {} makes the next start try again"


class StopRequest:
    """Callable: True once SIGTERM or SIGINT arrived; passes the signal on to the trainer at once."""

    def __init__(self) -> None:
        """Install the handlers; main thread only."""
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = False
        signal.signal(signal.SIGTERM, self._pass_on)
        signal.signal(signal.SIGINT, self._pass_on)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._asked

    def watch(self, child: subprocess.Popen[bytes]) -> None:
        """The process that hears of it, too."""
        self._child = child
        if self._asked:
            child.terminate()

    def wait(self, seconds: float) -> None:
        """Sleep, cut short by a stop."""
        deadline = time.monotonic() + seconds
        while not self._asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))

    def _pass_on(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if self._child is not None:
            self._child.terminate()


@dataclass(frozen=True)
class Supervision:
    """The trainer under supervision.

    Args:
        load_config: the config of this start; raises ConfigError.
        train_arguments: of the command `train`.
        stages: what `--stages` names.
        env: the environment.
        stop: the wish to stop.
        pid_file: where the processes to be signalled stand while the trainer runs; None where nobody asks.
        notifier: says that the run is refused or stops; what it comes to otherwise, the trainer says.
        machines: that train the run together.
    """

    load_config: Callable[[], Config]
    train_arguments: Sequence[str]
    stages: Sequence[str]
    env: Environment
    stop: StopRequest
    pid_file: Path | None
    notifier: Notifier
    machines: int = 1

    def run(self) -> int:
        """Train to whatever end, say how to go on, stop the pod where that is asked for; the exit code."""
        workspace, pod, run_name = Workspace(self.env.workspace), PodConfig(), self.env.run_name
        run_dir, problem = workspace.run_dir(self.env.run_name), None
        try:
            workspace.ensure()
            config = self.load_config()
            pod, run_dir, run_name = config.pod, workspace.run_dir(config.run_name), config.run_name
            self.notifier.run, self.notifier.where = run_name, lambda: _where(run_dir)
            check_ending(pod, self.env)
            code = self._to_an_end(config, workspace, run_dir)
        except AppError as error:
            code, problem = _refused(run_dir, error), str(error)
        except OSError as error:
            problem = f"{error.filename or workspace.root}: {error.strerror}"
            code = _refused(run_dir, MachineError(problem))
        if not self.stop():
            if code != 0:
                _mark_refused(run_dir, code)
            if code == Stopped.exit_code:
                # The trainer heard of it first.
                self.notifier.stopping()
            elif code != 0:
                self.notifier.refused(code, problem or reason(run_dir, code) or "see the log")
            self._say_how_to_go_on(code, run_dir)
            end_pod(pod, self.env, run_dir, run_name, code, self.stop, self.notifier.send)
        return code

    def _to_an_end(self, config: Config, workspace: Workspace, run_dir: RunDir) -> int:
        run_dir.ensure()
        forget_config_refusal(workspace.run_dir(self.env.run_name))
        data = workspace.data if config.data.path is None else Path(config.data.path)
        refusal = standing_refusal(run_dir, refusal_key(config, self.stages, run_dir, data))
        if refusal is not None:
            log.error("not started, because the last attempt was refused and nothing has changed. %s", refusal.text)
            return refusal.exit_code
        if finished(config, run_dir):
            log.info("finished before: all stages are trained; not started again. Checkpoints in %s", run_dir.path)
            return 0
        run_dir.done.unlink(missing_ok=True)
        price = price_per_hour(self.env, self.stop, machines=self.machines)
        guard = MoneyGuard(config, run_dir, price, self.env.runpod_pod_id is not None)
        if self.stop():
            return Stopped.exit_code
        guard.check()
        if config.data.source == "ct":
            self._wait_for_data(data, workspace, run_dir)
        if self.stop():
            return Stopped.exit_code
        try:
            code = self._train(run_dir, config.compute.hang_after_s, guard)
        except CrashBudgetError as error:
            code = _refused(run_dir, error)
        let_stand(run_dir, code, refusal_key(config, self.stages, run_dir, data))
        return code

    def _train(self, run_dir: RunDir, hang_after_s: float, guard: MoneyGuard) -> int:
        """Start the trainer, again after each crash, until it ends for good.

        Raises:
            MachineError: a budget is used up.
        """
        attempts = Attempts(run_dir)
        if attempts.exhausted():
            # What made the refusal stand has changed, or REASON was deleted: somebody wants another try.
            attempts.forgive()
        lock_pause = FIRST_LOCK_PAUSE_S
        while True:
            guard.check()
            code = self._attempt(attempts, hang_after_s, guard)
            if self._is_end(code):
                assert code is not None
                return code
            if code == Stopped.exit_code:
                self._wait_for_machines()
            elif code == LockError.exit_code:
                log.warning("another process trains this run; trying again in %.0f s", lock_pause)
                self.stop.wait(lock_pause)
                lock_pause = min(2 * lock_pause, LONGEST_LOCK_PAUSE_S)
            else:
                self._after_crash(attempts, code, run_dir)
            if self.stop():
                return Stopped.exit_code

    def _is_end(self, code: int | None) -> bool:
        """Whether there is no next start."""
        elsewhere = code == Stopped.exit_code and self.machines > 1 and not self.stop()
        return code in ENDS and not elsewhere

    def _wait_for_machines(self) -> None:
        log.info("another machine of the run was stopped; started again, this one waits for it")
        self.stop.wait(FIRST_LOCK_PAUSE_S)

    def _in_log_file(self) -> AbstractContextManager[None]:
        """A context in which log lines reach the log file too."""
        return also_in_file(Workspace(self.env.workspace).logs, self.env)

    def _attempt(self, attempts: Attempts, hang_after_s: float, guard: MoneyGuard) -> int | None:
        """Start the trainer once; its exit code, or None where it hung and was ended.

        Raises:
            MachineError: it was ended for what it costs.
        """
        command = [sys.executable, "-m", "app", "train", *self.train_arguments]
        repeated = attempts.repetition()
        if repeated is not None and repeated.wants_fall_back:
            command.append("--fall-back")
        price = {} if guard.usd_per_hour is None else {"POD_COST_PER_HOUR": repr(guard.usd_per_hour)}
        with Watchdog(hang_after_s, self.stop, self._in_log_file) as watchdog, guard:
            child = watchdog.start(command, child_environment(price))
            self.stop.watch(child)
            attempts.started(child.pid)
            self._write_pids(child.pid)
            code, hung = watchdog.wait(child, guard.over)
        if self.pid_file is not None:
            self.pid_file.unlink(missing_ok=True)
        if guard.problem is not None and code != 0:
            attempts.ended(Stopped.exit_code if code in STOPPED_EARLY else code, crashed=False)
            raise MachineError(guard.problem)
        if hung and not self.stop():
            attempts.ended(code, crashed=True, hung=True)
            return None
        if code in STOPPED_EARLY or (self.stop() and code != 0):
            code = Stopped.exit_code
        attempts.ended(code, crashed=code not in ENDS and code != LockError.exit_code)
        return code

    def _write_pids(self, trainer: int) -> None:
        if self.pid_file is not None:
            self.pid_file.write_text(json.dumps([trainer]))

    def _after_crash(self, attempts: Attempts, code: int | None, run_dir: RunDir) -> None:
        """Wait before the next start.

        Raises:
            CrashBudgetError: there is no next one.
        """
        repeated, crashes = attempts.repetition(), attempts.crashes()
        if repeated is not None and repeated.final:
            raise CrashBudgetError(self._same_again(repeated, run_dir))
        if len(crashes) > BUDGET:
            listed = ", ".join(map(_end, crashes))
            raise CrashBudgetError(
                f"the trainer crashed {len(crashes)} times without coming further than its last checkpoint ({listed}). "
                f"What it wrote before it ended is above and in the log; the attempts stand in {run_dir.attempts}"
            )
        pause = min(2.0 ** (len(crashes) - 1), LONGEST_CRASH_PAUSE_S)
        wants_fall_back = repeated is not None and repeated.wants_fall_back
        log.error(
            "the trainer ended unexpectedly (%s): crash %d without progress, %d are borne; started again from its "
            "last checkpoint%s in %.0f s",
            _end(code),
            len(crashes),
            BUDGET,
            " but one, because the same error came at the same step" if wants_fall_back else "",
            pause,
        )
        self.stop.wait(pause)

    def _same_again(self, repeated: Repetition, run_dir: RunDir) -> str:
        workspace = Workspace(self.env.workspace)
        older = "there was no older state to begin from"
        if repeated.older_state is not None:
            older = f"it came from the state before, too ({repeated.older_state}; newer files: {run_dir.quarantine})"
        return (
            f"the same error ended the trainer {repeated.times} times: {repeated.error}, after {repeated.global_step} "
            f"steps of the run; {older}. Its traceback is in {workspace.logs / LOG_FILE}. Put right what it is about: "
            f"a file that it names, a setting, the image. The attempts stand in {run_dir.attempts}"
        )

    def _wait_for_data(self, folder: Path, workspace: Workspace, run_dir: RunDir) -> None:
        """Return once there is something in the data folder or the cache, and nobody is copying any more."""
        if has_data(folder) or has_cases(workspace.cache):
            return
        status, told = RunStatus(run_dir), -DATA_NOTICE_S
        while not self.stop() and not has_data(folder):
            if time.monotonic() - told >= DATA_NOTICE_S:
                told = time.monotonic()
                log.info("waiting for data: no CT in %s yet; training starts when one is there", folder)
                status(state="waiting for data")
            self.stop.wait(DATA_POLL_S)
        before = None
        while not self.stop() and (now := _listing(folder)) != before:
            before = now
            self.stop.wait(DATA_SETTLES_S)
        log.info("data arrived in %s", folder)

    def _say_how_to_go_on(self, code: int, run_dir: RunDir) -> None:
        advice = GO_ON.get(code, STANDS.format(run_dir.reason))
        if code == WRONG_ARGUMENTS:
            advice = "Correct the arguments and restart"
        log.info("exit code %d. The dashboard stays up. %s", code, advice)


def _refused(run_dir: RunDir, error: AppError) -> int:
    log.error("%s", error)
    leave_reason(run_dir, error)
    return error.exit_code


def _mark_refused(run_dir: RunDir, code: int) -> None:
    if run_dir.status.exists():
        try:
            RunStatus(run_dir).close(f"{REFUSED}, exit code {code}")
        except OSError as error:
            log.error("%s cannot be written: %s", run_dir.status, error.strerror)


def _where(run_dir: RunDir) -> dict[str, Any]:
    """The status; empty where there is none yet."""
    try:
        return read_status(run_dir)
    except MachineError:
        return {}


def _end(code: int | None) -> str:
    if code is None:
        return "it hung"
    if 0 <= code <= SIGNALLED:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name if code < 0 else f"{signal.Signals(code - SIGNALLED).name} of a process"
    except ValueError:
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def has_data(folder: Path) -> bool:
    """Whether there is something to prepare."""
    # Imported late: reading volumes takes libraries that every start would wait for.
    from app.data.sources import find_sources

    try:
        found = find_sources(folder)
    except FileNotFoundError:
        return False
    except (OSError, DataError) as error:
        raise MachineError(f"{folder}: cannot be read: {error}") from error
    return bool(found.sources or found.dicom or found.refused)


def has_cases(cache: Path) -> bool:
    """Whether some prepared case is in the cache, which is enough to train."""
    from app.data.cache import CASE_FILE

    return any(cache.glob(f"*/{CASE_FILE}"))


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    """Everything below a folder, hidden files of copying programs included."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), state.st_size, state.st_mtime_ns))
    return found
