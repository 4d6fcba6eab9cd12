"""Stands in the place of libnvidia-ml.so.1, below the real pynvml.

The application calls the real pynvml, and that calls these functions by the names, and with the ctypes arguments, with
which it calls NVIDIA's library. So a function, a field or an error that pynvml does not have fails as it would there.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

GIB = 2**30


@dataclass
class Card:
    """What a GPU tells, in NVML's units; `fails` has the return codes of functions that fail, `every` one for all."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 * GIB
    used: int = 20 * GIB
    gpu_percent: int = 90
    milliwatts: int = 612_500
    celsius: int = 61
    reasons: int = pynvml.nvmlClocksEventReasonSwPowerCap
    uncorrected: int = 0
    capability: tuple[int, int] = (9, 0)
    fails: dict[str, int] = field(default_factory=dict)
    every: int = pynvml.NVML_SUCCESS


class Library:
    """The functions of the C library that are called."""

    def __init__(self, *cards: Card, old_driver: bool = False, driver: str = "570.86.15", cuda: int = 12080) -> None:
        self.cards = cards
        self.driver, self.cuda = driver, cuda
        self.old_driver = old_driver
        self.starts = pynvml.NVML_SUCCESS
        self.threads: set[str] = set()
        """Names of those that called anything."""
        self.inits = 0
        self.entered = 0
        """Starts that no shutdown has followed yet."""
        self.reads = 0
        """Readings that came to their last question."""

    def __getattr__(self, name: str) -> Any:
        """As ctypes: the function of that name; AttributeError where the library has none."""
        if self.old_driver and name == "nvmlDeviceGetCurrentClocksEventReasons":
            raise AttributeError(name)
        function = getattr(type(self), f"c_{name}")

        def call(*arguments: Any) -> int:
            self.threads.add(threading.current_thread().name)
            if arguments and isinstance(arguments[0], pynvml.c_nvmlDevice_t):
                card = self.cards[ctypes.cast(arguments[0], ctypes.c_void_p).value - 1]
                uninitialized = pynvml.NVML_SUCCESS if self.entered else pynvml.NVML_ERROR_UNINITIALIZED
                code = uninitialized or card.every or card.fails.get(name, pynvml.NVML_SUCCESS)
                return code or function(self, card, *arguments[1:]) or pynvml.NVML_SUCCESS
            return function(self, *arguments) or pynvml.NVML_SUCCESS

        return call

    def c_nvmlInitWithFlags(self, flags: int) -> int:
        self.inits += 1
        self.entered += self.starts == pynvml.NVML_SUCCESS
        return self.starts

    def c_nvmlShutdown(self) -> int:
        if not self.entered:
            return pynvml.NVML_ERROR_UNINITIALIZED
        self.entered -= 1
        return pynvml.NVML_SUCCESS

    def c_nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> None:
        buffer.value = self.driver.encode()

    def c_nvmlSystemGetCudaDriverVersion(self, version: Any) -> None:
        version._obj.value = self.cuda

    def c_nvmlDeviceGetCudaComputeCapability(self, card: Card, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = card.capability

    def c_nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self.cards)

    def c_nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        ctypes.memmove(device, ctypes.byref(ctypes.c_void_p(index.value + 1)), ctypes.sizeof(ctypes.c_void_p))
        return self.cards[index.value].every

    def c_nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        indices = [index for index, card in enumerate(self.cards) if card.uuid.encode() == uuid.value]
        return self.c_nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(indices[0]), device)

    def c_nvmlDeviceGetUUID(self, card: Card, buffer: Any, size: Any) -> None:
        buffer.value = card.uuid.encode()

    def c_nvmlDeviceGetName(self, card: Card, buffer: Any, size: Any) -> None:
        buffer.value = card.name.encode()

    def c_nvmlDeviceGetMemoryInfo(self, card: Card, memory: Any) -> None:
        memory._obj.total, memory._obj.used, memory._obj.free = card.total, card.used, card.total - card.used

    def c_nvmlDeviceGetUtilizationRates(self, card: Card, rates: Any) -> None:
        rates._obj.gpu, rates._obj.memory = card.gpu_percent, 7

    def c_nvmlDeviceGetPowerUsage(self, card: Card, milliwatts: Any) -> None:
        milliwatts._obj.value = card.milliwatts

    def c_nvmlDeviceGetTemperature(self, card: Card, sensor: Any, celsius: Any) -> None:
        celsius._obj.value = card.celsius if sensor.value == pynvml.NVML_TEMPERATURE_GPU else 999

    def c_nvmlDeviceGetCurrentClocksEventReasons(self, card: Card, reasons: Any) -> None:
        reasons._obj.value = card.reasons

    c_nvmlDeviceGetCurrentClocksThrottleReasons = c_nvmlDeviceGetCurrentClocksEventReasons

    def c_nvmlDeviceGetTotalEccErrors(self, card: Card, kind: Any, since: Any, count: Any) -> None:
        self.reads += 1
        asked = (kind.value, since.value)
        expected = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        count._obj.value = card.uncorrected if asked == expected else 999


def install(monkeypatch: pytest.MonkeyPatch, library: Library | None) -> None:
    """Have pynvml call `library` in this test; with None it finds no library."""

    def load(name: str) -> Library:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(pynvml, "CDLL", load)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
