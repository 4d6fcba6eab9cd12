"""The GPUs of this machine, read through NVML: those that CUDA_VISIBLE_DEVICES leaves, by the numbers of `cuda:N`.

A machine without a GPU has no readings, and neither has a GPU that does not answer any more: that is said once, and it
is asked again now and then. CUDA counts the fastest card first and NVML by PCI address, which is the same order where
all cards are of one kind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

from app.errors import MachineError

log = logging.getLogger(__name__)

GIB = 2**30
RETRY_S = 60.0
NO_GPU_HERE = (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded)
NOT_TOLD = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NoPermission)
"""This card or this driver lacks the figure; any other error is the loss of the card."""
THROTTLED = {
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat, by the driver",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat, by the card",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake, by the power supply",
    pynvml.nvmlClocksEventReasonHwSlowdown: "slowdown, by the card",
}
"""Reasons for a low clock that something should be done about. Idle, the power limit and settings are none of them."""


@dataclass(frozen=True)
class Card:
    """What a GPU is."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """Compute capability: (9, 0) is sm_90."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine and the GPUs that CUDA_VISIBLE_DEVICES leaves."""

    version: str
    cuda: tuple[int, int]
    """The newest CUDA that it runs."""
    cards: tuple[Card, ...]
    hidden: int
    """GPUs that CUDA_VISIBLE_DEVICES hides."""


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None is what the card or its driver does not tell."""

    utilization_percent: float | None
    """Share of the last second or less in which anything was computed."""
    memory_gib: float | None
    """Used, by all processes."""
    power_w: float | None
    temperature_c: float | None
    throttled: frozenset[str] | None
    """Why the clock is lower than it should be, in words of `THROTTLED`."""
    uncorrected_errors: int | None
    """Of the memory, since the driver was loaded."""


class Gpus:
    """The visible GPUs, for one thread: NVML may take its time, or hang with a card that is lost.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None is unset.
        expected: whether the run trains on a GPU, so that a machine without NVML is worth a warning.
        clock: seconds, monotonic.
    """

    def __init__(self, visible: str | None, expected: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._visible, self._expected, self._clock = visible, expected, clock
        self._uuids: dict[int, str] = {}
        """By number; what was found first is looked for later on."""
        self._handles: dict[int, Any] = {}
        self._lost: set[int] = set()
        self._next_try_at = -RETRY_S
        self._absent = self._failed = False

    def read(self) -> dict[int, GpuReading]:
        """The GPUs that answer."""
        if (self._lost or not self._handles) and not self._absent and self._clock() >= self._next_try_at:
            self._next_try_at = self._clock() + RETRY_S
            self._open()
        readings: dict[int, GpuReading] = {}
        for number, handle in list(self._handles.items()):
            try:
                readings[number] = _reading(handle)
            except pynvml.NVMLError as error:
                self._lose(number, error)
        for number in sorted(self._lost & readings.keys()):
            log.info("gpu/%d: NVML answers again", number)
        self._lost -= readings.keys()
        return readings

    def close(self) -> None:
        """Leave NVML."""
        # It may never have been entered, or have gone with the card.
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        self._handles = {}

    def _open(self) -> None:
        """Enter NVML, anew where a GPU is lost, and find the GPUs."""
        self.close()
        try:
            pynvml.nvmlInit()
            if not self._uuids:
                self._find()
        except NO_GPU_HERE as error:
            self._absent = not self._uuids
            self._say_failure(error)
            return
        except pynvml.NVMLError as error:
            self._say_failure(error)
            return
        self._failed = False
        for number, uuid in self._uuids.items():
            try:
                self._handles[number] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except pynvml.NVMLError as error:
                self._lose(number, error)

    def _find(self) -> None:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
        for number, index in enumerate(visible_indices(self._visible, uuids)):
            self._uuids[number] = uuids[index]
            total_gib = pynvml.nvmlDeviceGetMemoryInfo(handles[index]).total / GIB
            log.info("gpu/%d: %s, %.1f GiB", number, pynvml.nvmlDeviceGetName(handles[index]), total_gib)
        if not self._uuids:
            self._absent = True
            log.info("NVML knows of %d GPUs and CUDA_VISIBLE_DEVICES leaves none: no gpu/ curves", len(uuids))

    def _lose(self, number: int, error: pynvml.NVMLError) -> None:
        self._handles.pop(number, None)
        if number not in self._lost:
            log.warning("gpu/%d: NVML does not answer (%s). Its curves stop here, training goes on", number, error)
        self._lost.add(number)

    def _say_failure(self, error: pynvml.NVMLError) -> None:
        if self._absent and self._expected:
            log.warning(
                "the run trains on a GPU, and NVML is not here (%s): no gpu/ curves. A container needs "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
                error,
            )
        elif self._absent:
            log.info("no NVIDIA driver here (%s): no gpu/ curves", error)
        elif not self._failed and not self._lost:
            log.warning("NVML does not start (%s): no gpu/ curves, training goes on", error)
        self._failed = True


def installed_driver(visible: str | None) -> Driver | None:
    """Driver and GPUs; None where this machine, or this container, has none.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None is unset.

    Raises:
        MachineError: there is a driver, and it does not answer.
    """
    try:
        pynvml.nvmlInit()
    except NO_GPU_HERE:
        return None
    except pynvml.NVMLError as error:
        raise MachineError(f"NVML does not start: {error}") from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        chosen = visible_indices(visible, [pynvml.nvmlDeviceGetUUID(handle) for handle in handles])
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return Driver(
            pynvml.nvmlSystemGetDriverVersion(),
            (cuda // 1000, cuda % 1000 // 10),
            tuple(_card(handles[index]) for index in chosen),
            len(handles) - len(chosen),
        )
    except pynvml.NVMLError as error:
        raise MachineError(f"NVML does not answer: {error}") from error
    finally:
        pynvml.nvmlShutdown()


def _card(handle: Any) -> Card:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    total = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    return Card(pynvml.nvmlDeviceGetName(handle), total, (major, minor))


def visible_indices(visible: str | None, uuids: Sequence[str]) -> list[int]:
    """NVML's index of `cuda:0`, `cuda:1` and so on, by CUDA's own rules.

    The first entry that fits no GPU ends the list, and a GPU that stands twice makes all of it void.

    Args:
        visible: CUDA_VISIBLE_DEVICES, numbers or beginnings of UUIDs (`GPU-3fa2`); None is unset. A slice of a GPU
            (`MIG-...`) has no figures of its own in NVML, and ends the list.
        uuids: of all GPUs, in NVML's order.
    """
    if visible is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
        else:
            matches = [int(entry)] if entry.isdecimal() and int(entry) < len(uuids) else []
        if len(matches) != 1:
            break
        found += matches
    return found if len(set(found)) == len(found) else []


def _reading(handle: Any) -> GpuReading:
    """Ask everything.

    Raises:
        NVMLError: the GPU does not answer.
    """
    utilization = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    power_mw = _told(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    reasons = _told(lambda: _clock_reasons(handle))
    return GpuReading(
        utilization_percent=utilization,
        memory_gib=None if memory is None else memory / GIB,
        power_w=None if power_mw is None else power_mw / 1000,
        temperature_c=_told(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        throttled=None if reasons is None else frozenset(word for bit, word in THROTTLED.items() if reasons & bit),
        uncorrected_errors=_told(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        ),
    )


def _told(ask: Callable[[], int]) -> int | None:
    try:
        return ask()
    except NOT_TOLD:
        return None


def _clock_reasons(handle: Any) -> int:
    try:
        reasons: int = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError_FunctionNotFound:
        # Drivers before 535 know it by its older name.
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return reasons
