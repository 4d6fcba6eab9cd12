"""GPUs and machine beside the curves: a thread reads them, the training thread logs what was gathered.

The thread alone calls NVML and looks at volumes, either of which may hang; a step costs the trainer an addition. What
is read since the last point becomes one point, as `app.tags` says for each figure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

from app.config import Config
from app.env import visible_gpus
from app.ops.disk_forecast import DiskForecast
from app.ops.gpu_alarms import IdleAlarm, MemoryErrorAlarm, Steps, ThrottleAlarm
from app.ops.host import Host
from app.ops.nvml import GpuReading, Gpus
from app.tags import GPU_FIGURES, HOST_FIGURES
from app.workspace import RunDir

log = logging.getLogger(__name__)

SILENT_FOR_S = 120.0
"""So long after a reading was due, the thread is taken to hang."""
CLOSE_WITHIN_S = 0.5


class Telemetry:
    """What the machine does while a run trains.

    Args:
        gpus: those of this machine.
        host: the machine.
        disk: the run's volume.
        idle: told of every reading.
        total_steps: of the run, over all stages; for the estimate of its end.
        every_s: seconds between two readings.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        gpus: Gpus,
        host: Host,
        disk: DiskForecast,
        idle: IdleAlarm,
        total_steps: int,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpus, self._host, self._disk, self._idle = gpus, host, disk, idle
        self._throttled, self._memory_errors = ThrottleAlarm(), MemoryErrorAlarm()
        self._total_steps, self._every_s, self._clock = total_steps, every_s, clock
        self._steps, self._waiting = Steps(), False
        self._first: tuple[float, int] | None = None
        """(time, steps over all stages) at the first step of this process, and at its newest one."""
        self._newest: tuple[float, int] | None = None
        self._lock = threading.Lock()
        self._gathered: dict[str, list[float]] = {}
        self._read_at = clock()
        self._said_silent = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_often, name="telemetry", daemon=True)

    @classmethod
    def of_run(cls, config: Config, run_dir: RunDir, trains_on: int) -> Self:
        """The telemetry of a run that trains on so many GPUs of this machine, under way."""
        telemetry = cls(
            Gpus(visible_gpus(), expected=trains_on > 0),
            Host(),
            DiskForecast(run_dir, config),
            IdleAlarm(trains_on, config.compute.workers),
            sum(stage.epochs * stage.steps_per_epoch for stage in config.stages),
            config.logging.telemetry_every_s,
        )
        telemetry.start()
        return telemetry

    def start(self) -> None:
        """Read from now on."""
        self._thread.start()

    def close(self) -> None:
        """Read no more; a reading that hangs is left behind."""
        self._closed.set()
        self._thread.join(CLOSE_WITHIN_S)

    def waits(self, for_samples: bool) -> None:
        """The training thread begins, or ends, to wait for samples."""
        self._waiting = for_samples

    def step(self, global_step: int, seconds: float, waited_s: float) -> None:
        """A step was completed, the `global_step`-th over all stages, and waited so long for its samples."""
        steps = self._steps
        self._steps = Steps(steps.completed + 1, steps.seconds + seconds, steps.waited_s + waited_s)
        self._newest = self._clock(), global_step
        self._first = self._first or self._newest

    def scalars(self) -> dict[str, float]:
        """Points of the `gpu/` and `host/` curves from what was read since the last call; empty if nothing was."""
        silent_s = self._clock() - self._read_at
        if silent_s > self._every_s + SILENT_FOR_S and not self._said_silent:
            self._said_silent = True
            log.warning("GPUs and machine were not read for %.0f s: NVML or a volume does not answer", silent_s)
        with self._lock:
            gathered, self._gathered = self._gathered, {}
        return {tag: _summary(tag, values) for tag, values in gathered.items()}

    def read(self) -> None:
        """Read everything once; what the thread does again and again."""
        readings = self._gpus.read()
        now = self._clock()
        self._idle(now, readings, self._steps._replace(waiting=self._waiting))
        self._throttled(now, readings)
        self._memory_errors(readings)
        values = {f"host/{name}": value for name, value in self._host.read().items()}
        values |= {f"host/{name}": value for name, value in self._disk_figures().items()}
        for number, reading in readings.items():
            values |= {f"gpu/{number}/{name}": value for name, value in _figures(reading)}
        with self._lock:
            for tag, value in values.items():
                self._gathered.setdefault(tag, []).append(value)
        self._read_at, self._said_silent = now, False

    def _disk_figures(self) -> dict[str, float]:
        try:
            return self._disk.read(self._seconds_left())
        except OSError as error:
            # The saves say it too, and louder.
            log.debug("the run's volume cannot be read: %s", error)
            return {}

    def _seconds_left(self) -> float | None:
        """To the end of the run, at the pace of this process so far, validations included."""
        first, newest = self._first, self._newest
        if first is None or newest is None or newest[1] <= first[1]:
            return None
        return (newest[0] - first[0]) / (newest[1] - first[1]) * (self._total_steps - newest[1])

    def _read_often(self) -> None:
        while not self._closed.is_set():
            self.read()
            self._closed.wait(self._every_s)
        self._gpus.close()


def _figures(reading: GpuReading) -> Iterable[tuple[str, float]]:
    """What a GPU told, by the names of its curves."""
    figures = {
        "utilization_percent": reading.utilization_percent,
        "memory_gib": reading.memory_gib,
        "power_w": reading.power_w,
        "temperature_c": reading.temperature_c,
        "throttled": None if reading.throttled is None else float(bool(reading.throttled)),
        "uncorrected_errors": reading.uncorrected_errors,
    }
    return ((name, value) for name, value in figures.items() if value is not None)


def _summary(tag: str, values: list[float]) -> float:
    group, _, name = tag.partition("/")
    figures = GPU_FIGURES if group == "gpu" else HOST_FIGURES
    return figures[name.rpartition("/")[2]](values)
