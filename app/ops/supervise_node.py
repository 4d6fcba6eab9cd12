"""What supervisord runs in place of `train` on the other machines of a cluster: the same, and nothing is written.

What the run comes to is decided, counted and told on the first machine. Here the processes end with its exit codes, and
crashes are counted against the same budget by what the volume shows of the run's progress.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from app.config import Config
from app.config_pod import PodConfig
from app.errors import AppError, CrashBudgetError, LockError, MachineError, Stopped
from app.ops.crash_budget import BUDGET, Attempts, Repetition, progress
from app.ops.money_guard import MoneyGuard
from app.ops.pod import check_ending, stop_this_pod, stops_pod
from app.ops.refusal import finished, refusal_key, standing_refusal
from app.ops.status import read_status
from app.ops.supervise_trainer import (
    DATA_POLL_S,
    FIRST_LOCK_PAUSE_S,
    LONGEST_CRASH_PAUSE_S,
    REFUSED,
    Supervision,
    has_cases,
    has_data,
)
from app.workspace import RunDir, Workspace

log = logging.getLogger(__name__)


class NodeSupervision(Supervision):
    """The launcher of a machine that is not the first, under supervision."""

    def run(self) -> int:
        """Train to whatever end, stop the pod where that is asked for; the exit code."""
        pod = PodConfig()
        try:
            config = self.load_config()
            pod = config.pod
            check_ending(pod, self.env)
            code = self._follow(config, Workspace(self.env.workspace))
        except AppError as error:
            log.error("%s", error)
            code = error.exit_code
        if not self.stop():
            log.info("exit code %d. The first machine of the run says more, and what to do", code)
            pod_id = self.env.runpod_pod_id
            if stops_pod(pod, pod_id) and pod_id is not None:
                terminate = pod.on_finish == "terminate" and code == 0
                stop_this_pod(pod, pod_id, self.env.runpod_api_key, self.stop, terminate=terminate)
        return code

    def _follow(self, config: Config, workspace: Workspace) -> int:
        run_dir = workspace.run_dir(config.run_name)
        data = workspace.data if config.data.path is None else Path(config.data.path)
        refusal = standing_refusal(run_dir, refusal_key(config, self.stages, run_dir, data))
        if refusal is not None:
            return refusal.exit_code
        if finished(config, run_dir):
            return 0
        while config.data.source == "ct" and not (self.stop() or has_data(data) or has_cases(workspace.cache)):
            self.stop.wait(DATA_POLL_S)
        crashes, reached = 0, progress(run_dir)
        guard = _FirstMachine(config, run_dir)
        while not self.stop():
            code = self._attempt(_Unwritten(run_dir), config.compute.hang_after_s, guard)
            if self._is_end(code):
                assert code is not None
                return code
            if code == Stopped.exit_code:
                self._wait_for_machines()
                continue
            pause_s = FIRST_LOCK_PAUSE_S
            if code != LockError.exit_code:
                here = progress(run_dir)
                crashes, reached = (1 if here > reached else crashes + 1), max(here, reached)
                if crashes > BUDGET:
                    raise CrashBudgetError(f"the run crashed {crashes} times without coming further")
                pause_s = min(2.0 ** (crashes - 1), LONGEST_CRASH_PAUSE_S)
            log.error("this machine's processes ended (%s); started again in %.0f s", code, pause_s)
            self.stop.wait(pause_s)
        return Stopped.exit_code

    def _in_log_file(self) -> AbstractContextManager[None]:
        return nullcontext()


class _FirstMachine(MoneyGuard):
    """Counts time and money there; a refusal that did not stand at the start ends this machine's part, too."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        super().__init__(config.model_copy(update={"pod": PodConfig()}), run_dir, None, on_pod=False)
        self._standing = _refusal(run_dir)

    def _used_up(self) -> str | None:
        if _refusal(self._run_dir) in (None, self._standing):
            return None
        return f"the first machine has ended the run, see {self._run_dir.reason}"


def _refusal(run_dir: RunDir) -> tuple[str, float] | None:
    """The run's end as the first machine's supervisor wrote it into the status, and when; None while it goes on."""
    try:
        fields = read_status(run_dir)
    except MachineError:
        return None
    state = str(fields.get("state"))
    return (state, float(fields.get("time", 0.0))) if state.startswith(REFUSED) else None


class _Unwritten(Attempts):
    """The first machine's supervisor keeps the ledger."""

    def started(self, pid: int) -> None:
        """Nothing."""

    def ended(self, code: int, crashed: bool, hung: bool = False) -> None:
        """Nothing."""

    def repetition(self) -> Repetition | None:
        """None: the first machine falls back."""
        return None
