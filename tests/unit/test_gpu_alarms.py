"""What is said aloud about GPUs, and that it is said once."""

from __future__ import annotations

import logging

import pytest

from app.ops.gpu_alarms import IdleAlarm, MemoryErrorAlarm, Steps, ThrottleAlarm
from app.ops.nvml import GpuReading


def reading(percent: float = 90, throttled: set[str] | None = None, errors: int | None = None) -> GpuReading:
    """One GPU."""
    return GpuReading(percent, 20.0, 600.0, 60.0, None if throttled is None else frozenset(throttled), errors)


class Trainer:
    """Time that passes with a reading every 10 s, while steps of 2 s wait for data for some share of it."""

    def __init__(self, alarm: IdleAlarm) -> None:
        self.alarm, self.now, self.steps = alarm, 0.0, Steps()

    def minutes(self, count: float, *percents: float, waits: float = 0.0, stands: bool = False) -> None:
        """So many minutes with these utilisations in %; `stands`: without a step, in a wait for data or not."""
        for _ in range(int(6 * count)):
            self.now += 10
            if stands:
                self.steps = self.steps._replace(waiting=waits > 0)
            else:
                done, seconds, waited_s, _ = self.steps
                self.steps = Steps(done + 5, seconds + 10, waited_s + 10 * waits)
            self.alarm(self.now, {number: reading(percent) for number, percent in enumerate(percents)}, self.steps)


@pytest.mark.parametrize(
    ("waits", "stands", "cause"),
    [
        (0.97, False, "the trainer waits for data 97 % of the time. Raise compute.workers (3 now)"),
        (0.1, False, "data is there (the wait for it is 10 % of the time)"),
        (1.0, True, "the trainer waits for data, and for nothing else since its last step"),
        (0.0, True, "no step was completed meanwhile"),
    ],
)
def test_an_idle_gpu_is_said_out_loud_once_with_its_cause(
    caplog: pytest.LogCaptureFixture, waits: float, stands: bool, cause: str
) -> None:
    """At 1 % for twenty minutes after good work: said as soon as three minutes are below 5 %."""
    caplog.set_level(logging.INFO)
    trainer = Trainer(IdleAlarm(1, workers=3))
    trainer.minutes(10, 90.0, waits=waits)
    trainer.minutes(2.9, 1.0, waits=waits, stands=stands)
    assert not caplog.records
    trainer.minutes(17, 1.0, waits=waits, stands=stands)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("gpu/0 is at 1 % for 3 minutes: ")
    assert cause in record.getMessage()


def test_a_gpu_that_works_again_may_be_warned_of_again(caplog: pytest.LogCaptureFixture) -> None:
    """Idle, busy, idle: two warnings, and one line between them."""
    caplog.set_level(logging.INFO)
    trainer = Trainer(IdleAlarm(1, 0))
    for percent in (0.0, 90.0, 0.0):
        trainer.minutes(10, percent)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]


def test_pauses_and_gpus_of_others_are_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Two minutes of nothing, data prepared before the first step, and a second GPU that the run does not use."""
    trainer = Trainer(IdleAlarm(1, 0))
    trainer.minutes(60, 0.0, 0.0, stands=True)
    trainer.minutes(10, 90.0, 0.0)
    trainer.minutes(2, 0.0, 0.0, waits=0.9)
    trainer.minutes(8, 90.0, 0.0)
    assert not caplog.records


def test_throttling_is_said_when_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    """Heat that comes and goes every 20 s is one line; an hour later it is another."""
    alarm = ThrottleAlarm()
    for now in (*range(0, 600, 10), *range(4000, 4600, 10)):
        alarm(now, {0: reading(throttled={"heat, by the card"} if now % 20 else set()), 1: reading()})
    assert [record.getMessage() for record in caplog.records] == [
        "gpu/0 is throttled: heat, by the card. Steps take longer meanwhile"
    ] * 2


def test_new_memory_errors_are_loud_each_time(caplog: pytest.LogCaptureFixture) -> None:
    """Two before the run are a warning; two more, and one more after that, are errors."""
    alarm = MemoryErrorAlarm()
    for errors in (2, 2, None, 4, 4, 5):
        alarm({0: reading(errors=errors)})
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR", "ERROR"]
    assert "gpu/0: 2 NEW UNCORRECTED MEMORY ERRORS, 4 in all" in caplog.text
