"""`train` on several GPUs or machines: torch's elastic launcher, which starts a process per GPU and ends as they end.

It makes one attempt: what ended it stands in the exit code, and whoever watches over it starts it again, so that a lost
process counts once against the crash budget.

the processes end with                                the launcher ends with
0, all of them                                        0
a code of `app.errors`, which they agree on           that code, when all have left
anything else, or one is killed                       the first one's code, 128 + N for signal N; the others are ended
whatever, after SIGTERM, which is passed on at once   143 within 4 s
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.events.api import Event, EventSource

from app.env import ClusterNode, process_environment
from app.errors import AppError, Stopped
from app.meeting import LOOPBACK, Meeting, interface_to
from app.ops.signals import StopSignal
from app.ops.watchdog import STATES, process_state

log = logging.getLogger(__name__)

POLL_S = 0.1
AGREED_S = 90.0
"""For processes that leave for the same reason, and for the first to send the rest of its curves elsewhere."""
GONE_S = 1.0
"""For processes to notice by themselves that one is lost."""
LEAVE_S = 5.0
"""After SIGTERM a process is gone in less than 4 s."""
KILLED_S = 60.0
FAREWELL_S = 2.0
EXIT_BARRIER_S = 30.0
TRACES_APART_S = 0.08
"""Stack traces of several processes go into one pipe, one after another; the watchdog waits a second for all."""
SIGNALLED = 128


class Agent(SimpleElasticAgent):
    """The processes of this machine.

    Args:
        spec: how many they are.
        meeting: the other machines.
        command: of each process.
        beat_fd: where the first machine's processes leave their signs of life; None where nobody listens.
        stop: the wish to stop.
    """

    def __init__(
        self, spec: WorkerSpec, meeting: Meeting, command: Sequence[str], beat_fd: int | None, stop: StopSignal
    ) -> None:
        super().__init__(spec)
        self._meeting, self._command, self._beat_fd, self._stop = meeting, list(command), beat_fd, stop
        self._interface = interface_to(meeting.node.address if meeting.node.count > 1 else LOOPBACK)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._code: int | None = None
        """Exit code of the first process that failed."""
        self._failed_at, self._announced, self._alone = 0.0, False, meeting.node.count == 1
        self._traces_wanted = False

    def exit_code(self) -> int:
        """What the run came to, once `run` has returned."""
        code = self._code or 0
        if self._stop() and (code < 0 or code == AppError.exit_code):
            # Whoever waited for the others longest may have found them gone.
            code = Stopped.exit_code
        return SIGNALLED - code if code < 0 else code

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._stop():
            raise Stopped("stopped before the processes of the run were started")
        self._stop.at_the_last_moment(self._kill_after)
        first_machine = worker_group.group_rank == 0
        descriptors = (self._beat_fd,) if first_machine and self._beat_fd is not None else ()
        for worker in worker_group.workers:
            place = {
                "RANK": worker.global_rank,
                "WORLD_SIZE": worker.world_size,
                "LOCAL_RANK": worker.local_rank,
                "LOCAL_WORLD_SIZE": worker_group.spec.local_world_size,
                "GROUP_RANK": worker_group.group_rank,
                "MASTER_ADDR": worker_group.master_addr,
                "MASTER_PORT": worker_group.master_port,
                "TORCHELASTIC_RUN_ID": self._meeting.get_run_id(),
                "TORCHELASTIC_RESTART_COUNT": 0,
                "TORCHELASTIC_MAX_RESTARTS": 0,
                "TORCHELASTIC_USE_AGENT_STORE": self._meeting.use_agent_store,
            }
            environment = process_environment({name: str(value) for name, value in place.items()}, self._interface)
            child = subprocess.Popen(self._command, env=environment, pass_fds=descriptors)
            self._children[worker.local_rank] = child
        if descriptors:
            signal.signal(signal.SIGUSR1, self._want_traces)
        self._stop.at_once(self._terminate)
        log.info(
            "processes: %d on this machine, %d in the run", len(self._children), worker_group.workers[0].world_size
        )
        return {local_rank: child.pid for local_rank, child in self._children.items()}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._traces_wanted:
            self._traces_wanted = False
            self._trace(worker_group)
        codes = {rank: code for rank, child in self._children.items() if (code := child.poll()) is not None}
        self._look_for_failure(codes, worker_group)
        if self._code is None:
            if len(codes) < len(self._children):
                return RunResult(WorkerState.HEALTHY)
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        patience_s = AGREED_S if self._code > AppError.exit_code else GONE_S
        # Another machine may know better why a process found the others gone.
        settled = len(codes) == len(self._children) and (self._alone or self._code != AppError.exit_code)
        if not settled and time.monotonic() - self._failed_at < patience_s:
            return RunResult(WorkerState.HEALTHY)
        return RunResult(WorkerState.FAILED)

    def _look_for_failure(self, codes: dict[int, int], worker_group: WorkerGroup) -> None:
        """Set the exit code of the first process that failed; one that only found another gone gives way to that."""
        before, unexplained = self._code, (None, AppError.exit_code)
        failed = {rank: code for rank, code in codes.items() if code != 0}
        if failed and self._code in unexplained:
            rank = min(failed, key=lambda rank: (failed[rank] == AppError.exit_code, rank))
            self._code = failed[rank]
            if self._code < 0 and not self._stop():
                log.error(
                    "process %d of the run (pid %d) was ended by %s; started again, the run goes on from its last "
                    "checkpoint",
                    worker_group.workers[rank].global_rank,
                    self._children[rank].pid,
                    _signal_name(-self._code),
                )
        if self._code in unexplained:
            self._code = self._meeting.over() or self._code
        else:
            self._announce()
        if before is None and self._code is not None:
            self._failed_at = time.monotonic()

    def _announce(self) -> None:
        if self._code is not None and not self._announced:
            self._announced = True
            self._code = self._meeting.announce(self._code)

    def _stop_workers(self, worker_group: WorkerGroup, is_restart: bool = False) -> None:
        self._shutdown()

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30, is_restart: bool = False
    ) -> None:
        """End what is left of the processes, and tell the other machines."""
        self._announce()
        self._terminate()
        self._kill_after(min(LEAVE_S, self._stop.seconds_left()))
        for child in self._children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(KILLED_S)
        if self._code is not None:
            self._meeting.leave(min(FAREWELL_S, self._stop.seconds_left()))

    def _exit_barrier(self) -> None:
        """The first machine stays for the others; torch's own barrier makes a stack trace of a store that is gone."""
        self._meeting.leave(EXIT_BARRIER_S)

    def _construct_event(self, state: str, source: EventSource, *_unused: Any, **_unused_too: Any) -> Event:
        """Nobody listens to torch's events, and for each of them it would look this machine's name up in the DNS."""
        return Event(state, source)

    def _left(self) -> list[subprocess.Popen[bytes]]:
        return [child for child in self._children.values() if child.poll() is None]

    def _terminate(self) -> None:
        for child in self._left():
            child.terminate()

    def _kill_after(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._left() and time.monotonic() < end:
            time.sleep(POLL_S / 4)
        for child in self._left():
            log.error("a process of the run (pid %d) did not leave in time and is killed", child.pid)
            child.kill()

    def _want_traces(self, _number: int, _frame: FrameType | None) -> None:
        self._traces_wanted = True

    def _trace(self, worker_group: WorkerGroup) -> None:
        """Have each process write its stacks, as the watchdog would have a single one do."""
        for worker in worker_group.workers:
            child = self._children[worker.local_rank]
            state = STATES.get(process_state(child.pid), "it has ended")
            log.error("process %d of the run (pid %d): %s", worker.global_rank, child.pid, state)
            child.send_signal(signal.SIGUSR1)
            child.send_signal(signal.SIGCONT)
            time.sleep(TRACES_APART_S)


def launch(
    count: int, node: ClusterNode | None, polled: Callable[[], bool], stop: StopSignal, beat_fd: int | None
) -> int:
    """Run this process's own command in `count` processes on this machine; the exit code.

    Args:
        count: processes of this machine.
        node: this machine's place among those of the run.
        polled: asked while nothing but this process works.
        stop: the wish to stop.
        beat_fd: where signs of life go.

    Raises:
        MachineError: the machines do not meet.
        Stopped: before the processes were started.
    """
    meeting = Meeting(node, polled)
    spec = WorkerSpec(
        role="train",
        local_world_size=count,
        rdzv_handler=meeting,
        entrypoint=sys.executable,
        max_restarts=0,
        monitor_interval=POLL_S,
    )
    command = [sys.executable, *sys.orig_argv[1:], "--launcher", str(os.getpid())]
    agent = Agent(spec, meeting, command, beat_fd, stop)
    agent.run()
    return agent.exit_code()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
