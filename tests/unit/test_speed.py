"""The `perf/` curves, by hand."""

from __future__ import annotations

import pytest

from app.train import speed
from app.train.speed import Speed, Waited


def test_the_points_are_of_the_steps_since_the_last_ones() -> None:
    """Steps of 2, 2 and 4 s that waited 1 s each, 3 TFLOP in each, on cards of 10 TFLOP/s; then one of 1 s alone."""
    measured = Speed(samples=8, tflop=3.0, peak_tflop_per_s=10.0)
    for seconds in (2.0, 2.0, 4.0):
        measured.step(seconds, 1.0)
    assert measured.scalars() == {
        "perf/step_time_s": 4.0,
        "perf/samples_per_s": 2.0,
        "perf/data_wait": pytest.approx(3 / 8),
        "perf/tflop_per_s": pytest.approx(9 / 8),
        "perf/mfu": pytest.approx(9 / 80),
    }
    measured.step(1.0, 0.0)
    assert measured.scalars()["perf/tflop_per_s"] == 3.0


def test_an_unknown_card_has_tflop_but_no_mfu() -> None:
    """Nothing is guessed."""
    measured = Speed(8, 3.0, None)
    measured.step(1.0, 0.0)
    assert measured.scalars().keys() == {
        f"perf/{name}" for name in ("step_time_s", "samples_per_s", "data_wait", "tflop_per_s")
    }


def test_waiting_is_the_time_within_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading takes 3 s a batch, work between two batches does not count, and who asks is told to be waiting."""
    now, waiting, seen = [0.0], [False], []
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])

    def loads():  # type: ignore[no-untyped-def]
        for batch in ("a", "b"):
            now[0] += 3.0
            seen.append(waiting[0])
            yield batch

    batches = Waited(loads(), lambda waits: waiting.__setitem__(0, waits))
    for expected in ("a", "b"):
        assert next(batches) == expected
        now[0] += 100.0
    assert batches.take_s() == 6.0
    assert batches.take_s() == 0.0
    with pytest.raises(StopIteration):
        next(batches)
    assert (seen, waiting[0]) == ([True, True], False)
