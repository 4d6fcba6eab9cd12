"""GPUs through the real pynvml, above a library that stands in for the driver's."""

from __future__ import annotations

import logging

import pynvml
import pytest
import torch

from app.ops.nvml import RETRY_S, Gpus, visible_indices
from tests.nvml_library import GIB, Card, Library, install

UUIDS = ["GPU-3fa21b", "GPU-3fa29c", "GPU-b00000"]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """What was said at a level."""
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_figures_come_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure that the library gives, from mW and bytes; the power limit is no throttling."""
    install(monkeypatch, Library(Card(UUIDS[0], used=3 * GIB // 2, uncorrected=2)))
    (reading,) = Gpus(None, expected=True).read().values()
    assert (reading.utilization_percent, reading.memory_gib, reading.power_w) == (90, 1.5, 612.5)
    assert (reading.temperature_c, reading.throttled, reading.uncorrected_errors) == (61, frozenset(), 2)


@pytest.mark.parametrize("old_driver", [False, True])
def test_reasons_for_throttling_come_in_words(monkeypatch: pytest.MonkeyPatch, old_driver: bool) -> None:
    """Heat and power brake, asked by the new name or, of a driver without it, by the old one."""
    bits = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    card = Card(UUIDS[0], reasons=bits | pynvml.nvmlClocksEventReasonGpuIdle)
    install(monkeypatch, Library(card, old_driver=old_driver))
    assert Gpus(None, True).read()[0].throttled == {"heat, by the card", "power brake, by the power supply"}


def test_what_a_card_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GeForce has no error counters, a pod may not read the power: the other figures come all the same."""
    refused = {
        "nvmlDeviceGetTotalEccErrors": pynvml.NVML_ERROR_NOT_SUPPORTED,
        "nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_NO_PERMISSION,
    }
    install(monkeypatch, Library(Card(UUIDS[0], fails=refused)))
    reading = Gpus(None, True).read()[0]
    assert (reading.uncorrected_errors, reading.power_w, reading.temperature_c) == (None, None, 61)


@pytest.mark.parametrize(
    "visible",
    [
        "0",
        "2,0",
        " 1 , 2 ",
        "",
        "-1",
        "0,7,1",
        "0,0",
        "GPU-b",
        "GPU-3fa29,GPU-3fa21",
        "GPU-3fa",
        "GPU-b,GPU-x,GPU-3fa21",
    ],
)
def test_the_visible_gpus_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    """CUDA_VISIBLE_DEVICES as torch itself reads it: order, unknown entries, doubles, beginnings of UUIDs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = torch.cuda._parse_visible_devices()
    if expected and isinstance(expected[0], str):
        expected = torch.cuda._transform_uuid_to_ordinals(expected, UUIDS)
    elif any(index >= len(UUIDS) for index in expected):
        # torch leaves it to the driver to end the list where a number fits no GPU.
        expected = expected[: next(place for place, index in enumerate(expected) if index >= len(UUIDS))]
    assert visible_indices(visible, UUIDS) == expected


def test_readings_have_the_numbers_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three are visible, in another order: number 0 is the first of them."""
    install(monkeypatch, Library(*(Card(uuid, celsius=50 + index) for index, uuid in enumerate(UUIDS))))
    readings = Gpus("2,0", True).read()
    assert {number: reading.temperature_c for number, reading in readings.items()} == {0: 52, 1: 50}


@pytest.mark.parametrize(("expected", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_no_driver_is_a_valid_state(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: bool, level: int
) -> None:
    """It is said once, aloud only where the run trains on a GPU, and not asked again."""
    caplog.set_level(logging.INFO)
    install(monkeypatch, None)
    clock = Clock()
    gpus = Gpus(None, expected, clock)
    for _ in range(3):
        assert gpus.read() == {}
        clock.now += 2 * RETRY_S
    assert [record.levelno for record in caplog.records] == [level]


def test_a_lost_gpu_is_reported_once_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two falls off the bus: the other goes on; asked again every minute, it comes back."""
    caplog.set_level(logging.INFO)
    cards = [Card(uuid) for uuid in UUIDS[:2]]
    library, clock = Library(*cards), Clock()
    install(monkeypatch, library)
    gpus = Gpus(None, True, clock)
    assert gpus.read().keys() == {0, 1}
    cards[1].every = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(20):
        clock.now += 10
        assert gpus.read().keys() == {0}
    (lost,) = messages(caplog, logging.WARNING)
    assert lost == "gpu/1: NVML does not answer (GPU is lost). Its curves stop here, training goes on"
    assert library.inits == 1 + 200 // RETRY_S
    cards[1].every = pynvml.NVML_SUCCESS
    clock.now += RETRY_S
    assert gpus.read().keys() == {0, 1}
    assert messages(caplog, logging.INFO)[-1] == "gpu/1: NVML answers again"
    assert library.entered == 1
    gpus.close()
    assert library.entered == 0


def test_a_driver_that_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Exchanged under a running process: every GPU is lost, NVML does not start, and after that it does."""
    card, clock = Card(UUIDS[0]), Clock()
    library = Library(card)
    install(monkeypatch, library)
    gpus = Gpus(None, True, clock)
    assert gpus.read()
    card.every = pynvml.NVML_ERROR_UNINITIALIZED
    library.starts = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    for _ in range(5):
        clock.now += RETRY_S
        assert gpus.read() == {}
    assert len(messages(caplog, logging.WARNING)) == 1
    card.every = library.starts = pynvml.NVML_SUCCESS
    clock.now += RETRY_S
    assert gpus.read()[0].power_w == 612.5


def test_an_nvml_that_does_not_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Driver and library of two versions: one warning, then silence until it works."""
    library, clock = Library(Card(UUIDS[0])), Clock()
    install(monkeypatch, library)
    library.starts = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    gpus = Gpus(None, True, clock)
    for _ in range(3):
        assert gpus.read() == {}
        clock.now += RETRY_S
    (warning,) = messages(caplog, logging.WARNING)
    assert "version mismatch" in warning
    library.starts = pynvml.NVML_SUCCESS
    assert gpus.read().keys() == {0}
