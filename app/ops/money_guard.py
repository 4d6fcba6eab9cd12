"""What a run may cost: the price of the machine, budgets over all attempts, GPUs that are paid for and do nothing.

The supervisor asks, not the trainer: a trainer that hangs asks nothing. A budget counts what the ledger counts: an
attempt costs from the start of its process to its last sign of life. It ends training wherever it runs; whether a
machine is then stopped is `app.ops.pod`'s business.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Self

from app.config import Config
from app.config_pod import PodConfig
from app.env import Environment, visible_gpus
from app.errors import MachineError
from app.ops.costs import HOUR_S, Spent, spent
from app.ops.ledger_table import duration
from app.ops.nvml import GpuReading, Gpus
from app.ops.pod import PodError, RunPodApi, api_of
from app.ops.status import read_status
from app.workspace import RunDir

log = logging.getLogger(__name__)

PRICE_WITHIN_S = 15.0
JOIN_S = 0.1
LOOK_EVERY_S = 5.0
LOOKS_AT_LEAST = 10
"""Readings of a GPU within the time after which it counts as idle."""
MINUTE_S = 60.0


def price_per_hour(
    env: Environment, stop: Callable[[], bool], base: str | None = None, machines: int = 1
) -> float | None:
    """What a run costs in USD per hour: POD_COST_PER_HOUR, else on a pod what RunPod's API says, asked once.

    The machines of a cluster are alike, so it is the price of this one times their number.

    Args:
        env: the environment.
        stop: cuts the question short.
        base: address of the API; None is RunPod's.
        machines: of the run.

    Returns:
        None where it is not known, which on a pod the log says.
    """
    if env.pod_cost_per_hour is not None:
        return machines * env.pod_cost_per_hour
    if env.runpod_pod_id is None:
        return None
    try:
        price = _ask(api_of(env, base), env.runpod_pod_id, stop)
    except PodError as error:
        log.warning(
            "the price of this pod is not known (%s): no cost curves. The variable POD_COST_PER_HOUR sets it, in USD",
            error,
        )
        return None
    log.info("this pod costs %g USD per hour", price)
    return machines * price


def _ask(api: RunPodApi, pod_id: str, stop: Callable[[], bool]) -> float:
    """What the API says of a pod's price, before the deadline.

    Raises:
        PodError: nothing.
    """
    answers: list[float | PodError | None] = []

    def ask() -> None:
        # A signal is for the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            answers.append(api.pod(pod_id).usd_per_hour)
        except PodError as error:
            answers.append(error)

    # To look up the address has no deadline of its own.
    thread = threading.Thread(target=ask, name="price", daemon=True)
    thread.start()
    deadline = time.monotonic() + PRICE_WITHIN_S
    while thread.is_alive() and not stop() and time.monotonic() < deadline:
        thread.join(JOIN_S)
    answer = answers[0] if answers else PodError(f"no answer within {PRICE_WITHIN_S:.0f} s")
    if isinstance(answer, PodError):
        raise answer
    if answer is None:
        raise PodError("RunPod's API does not say it")
    return answer


class IdleGpus:
    """A thread that reads the GPUs now and then: NVML may hang with a card that is lost.

    Args:
        gpus: those of this machine.
        trains: whether the run trains at this moment.
        every_s: seconds between two readings.
        clock: seconds, monotonic.
    """

    def __init__(
        self, gpus: Gpus, trains: Callable[[], bool], every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gpus, self._trains, self._every_s, self._clock = gpus, trains, every_s, clock
        self._since: float | None = None
        self.seconds = 0.0
        """How long all GPUs have done nothing, by the newest reading."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_often, name="idle-gpus", daemon=True)

    def start(self) -> None:
        """Read from now on."""
        self._thread.start()

    def close(self) -> None:
        """Read no more; a reading that hangs is left behind."""
        self._closed.set()
        self._thread.join(JOIN_S)

    def read(self) -> None:
        """Look once; what the thread does again and again."""
        idle, now = _all_idle(self._gpus.read()) and self._trains(), self._clock()
        self._since = None if not idle else now if self._since is None else self._since
        self.seconds = 0.0 if self._since is None else now - self._since

    def _read_often(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while not self._closed.is_set():
            self.read()
            self._closed.wait(self._every_s)
        self._gpus.close()


def _all_idle(readings: dict[int, GpuReading]) -> bool:
    """Whether every GPU that answers is at 0 %; a machine whose GPUs do not answer is not known to idle."""
    known = [each.utilization_percent for each in readings.values() if each.utilization_percent is not None]
    return bool(known) and max(known) == 0


class MoneyGuard:
    """The budgets of a run; a context while a trainer runs, in which `over` is asked again and again.

    Args:
        config: the run.
        run_dir: its folder.
        usd_per_hour: price of the machine; None where it is not known.
        on_pod: whether this is a pod at RunPod.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        usd_per_hour: float | None,
        on_pod: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pod: PodConfig = config.pod
        self._needs_gpu = config.compute.device == "cuda"
        self._run_dir, self.usd_per_hour, self._on_pod, self._clock = run_dir, usd_per_hour, on_pod, clock
        self._before = Spent(0, 0.0, None)
        self._began = clock()
        self._idle: IdleGpus | None = None
        self._warned = False
        self.problem: str | None = None
        """Why the trainer was told to end, and what to do; None while it may go on."""

    def check(self) -> None:
        """Before a trainer is started.

        Raises:
            MachineError: a budget is used up, or cannot be kept.
        """
        if self._pod.max_hours is None and self._pod.max_cost_usd is None:
            return
        if self._pod.max_cost_usd is not None and self.usd_per_hour is None:
            self._say_that_no_cost_is_known()
        try:
            self._before, self._began = spent(self._run_dir, self.usd_per_hour), self._clock()
        except OSError as error:
            raise MachineError(f"{self._run_dir.ledger}: cannot be read: {error.strerror}") from error
        problem = self._used_up()
        if problem is not None:
            raise MachineError(f"not started: {problem}")

    def __enter__(self) -> Self:
        if self._pod.max_idle_gpu_minutes is not None:
            limit_s, began = MINUTE_S * self._pod.max_idle_gpu_minutes, time.time()
            every_s = min(LOOK_EVERY_S, limit_s / LOOKS_AT_LEAST)
            gpus = Gpus(visible_gpus(), expected=self._needs_gpu)
            self._idle = IdleGpus(gpus, lambda: _trains(self._run_dir, began), every_s)
            self._idle.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def over(self) -> bool:
        """Whether the trainer must end; `problem` says why."""
        if self.problem is None:
            problem = self._used_up() or self._idles()
            if problem is not None:
                self.problem = f"training was ended: {problem}"
                log.error("%s. The trainer saves and ends", self.problem)
        return self.problem is not None

    def _used_up(self) -> str | None:
        pod, seconds = self._pod, self._before.seconds + self._clock() - self._began
        if pod.max_hours is not None and seconds >= HOUR_S * pod.max_hours:
            return (
                f"pod.max_hours ({pod.max_hours:g}) is used up: all attempts at this run together took "
                f"{duration(seconds)}. The checkpoints are kept. To go on, raise pod.max_hours and start again"
            )
        usd = self._usd()
        if pod.max_cost_usd is not None and usd is not None and usd >= pod.max_cost_usd:
            return (
                f"pod.max_cost_usd ({pod.max_cost_usd:g}) is used up: all attempts at this run together cost {usd:.2f} "
                f"USD, in {duration(seconds)}. The checkpoints are kept. To go on, raise pod.max_cost_usd and start "
                "again"
            )
        return None

    def _usd(self) -> float | None:
        if self.usd_per_hour is None:
            return None
        return (self._before.usd or 0.0) + self.usd_per_hour / HOUR_S * (self._clock() - self._began)

    def _idles(self) -> str | None:
        minutes = self._pod.max_idle_gpu_minutes
        if minutes is None or self._idle is None or self._idle.seconds < MINUTE_S * minutes:
            return None
        return (
            f"all GPUs were at 0 % for {duration(self._idle.seconds)} while the run trained (pod.max_idle_gpu_minutes: "
            f"{minutes:g}). The checkpoints are kept. The log says what the trainer did meanwhile: put that right, "
            "such as compute.workers or a slow volume, or raise pod.max_idle_gpu_minutes, and start again"
        )

    def _say_that_no_cost_is_known(self) -> None:
        limit = self._pod.max_cost_usd
        what = f"pod.max_cost_usd ({limit:g}) cannot be kept, because the price of this machine is not known"
        if self._on_pod:
            raise MachineError(
                f"not started: {what}. Set POD_COST_PER_HOUR (USD), or use pod.max_hours in its place, and start again"
            )
        if not self._warned:
            self._warned = True
            log.warning("%s: set POD_COST_PER_HOUR (USD). This is no RunPod pod, so training goes on without it", what)


def _trains(run_dir: RunDir, since: float) -> bool:
    """Whether the status of a run, written since then, says that it trains: preparing data needs no GPU."""
    try:
        fields = read_status(run_dir)
    except MachineError:
        return False
    return fields.get("state") == "training" and float(fields.get("time", 0.0)) >= since
