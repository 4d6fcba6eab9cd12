"""Real training processes for tests, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, TINY

WALL_CLOCK_TAGS = ("epoch_time", "perf/", "ops/", "gpu/", "host/")
"""Tags whose values are times, or what the machine did; all others must be equal between two runs of one config."""
AT_ANY_STEP = ("ops/", "gpu/", "host/")
"""Tags whose steps depend on the clock too."""
RTOL = 1e-5
"""Of every point of every curve. Two processes add the same gradients in another order; one step differs by 1e-7."""
ATOL_DB = 1e-3
"""Of gains and X-ray use, which are differences of PSNRs and near 0 in a network that has learned nothing yet."""
RUN = Path("hybrid_vit_cascade/checkpoints/tiny")

SHORT = ("--stages", "stage_8", "stage_16")
"""Of the command line: two stages, and so one hand-over."""

Series = dict[str, list[tuple[int, float]]]


def start(
    workspace: Path, *arguments: str, env: Mapping[str, str] | None = None, fault: str | None = None
) -> subprocess.Popen[str]:
    """`python -m app train` on the tiny cascade, in a process group of its own; with a fault of `tests/faulty.py`."""
    program = ["app"] if fault is None else ["tests.faulty", fault]
    return subprocess.Popen(
        [sys.executable, "-m", *program, "train", "--config", str(TINY), *arguments],
        cwd=ROOT,
        env={**os.environ, "WORKSPACE": str(workspace), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def command(workspace: Path, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m app ...`, finished."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, "WORKSPACE": str(workspace), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def train(workspace: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Train to the end: exit code and output."""
    process = start(workspace, *arguments, env=env)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def manifest(run: Path) -> list[dict[str, Any]]:
    """Committed lines; a torn last line is left out."""
    path = run / "manifest.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if line["state"] == "committed"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    """Poll a condition on the files of a live process."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the process ended first, exit code {process.returncode}:\n{output}")
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def marked_step(run: Path) -> int:
    """How many steps over all stages were completed, saved or not."""
    return int((run / "steps").read_text().split()[0])


def series(run: Path) -> Series:
    """Every scalar of a run as TensorBoard's own reader sees it, nothing purged, nothing sampled."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def without_wall_clock(curves: Series) -> Series:
    """The tags whose values do not depend on the speed of the machine."""
    return {tag: points for tag, points in curves.items() if not any(name in tag for name in WALL_CLOCK_TAGS)}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint."""
    payload: dict[str, Any] = torch.load(path, weights_only=True)
    return payload


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested checkpoint by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    return {key: tensor for part, item in items for key, tensor in tensors(item, f"{name}.{part}").items()}


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, EMA, optimizer, scaler, counters and losses of two checkpoints are equal, bit for bit."""
    first, second = load(one), load(other)
    for key in ("epoch", "val_loss", "scaler_state_dict"):
        assert first[key] == second[key], key
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, such as {different[:3]}"
    counters = [
        {key: value for key, value in payload["resume"].items() if not isinstance(value, dict) and "seconds" not in key}
        for payload in (first, second)
    ]
    assert counters[0] == counters[1]


def assert_same_run(interrupted: Path, uninterrupted: Path) -> None:
    """Final, best and periodic checkpoints are bit-identical, and every curve has each step once with its value."""
    names = sorted(path.name for path in uninterrupted.glob("stage_*.pt") if "last" not in path.name)
    assert names
    for name in names:
        assert_same_state(interrupted / name, uninterrupted / name)
    expected, found = series(uninterrupted), series(interrupted)
    for tag, points in found.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    # When a save ends, the machine is read, or the run is interrupted, is no property of the run.
    expected, found = (
        {tag: curve[tag] for tag in curve if not tag.startswith(AT_ANY_STEP)} for curve in (expected, found)
    )
    assert found.keys() == expected.keys()
    for tag, points in found.items():
        steps = [step for step, _ in points]
        assert steps == [step for step, _ in expected[tag]], tag
    assert without_wall_clock(found) == without_wall_clock(expected)


def assert_close(found: Series, expected: Series) -> None:
    """The same tags and steps, each step once, and the same values but for rounding."""
    found, expected = without_wall_clock(found), without_wall_clock(expected)
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        for (step, value), (_, other) in zip(found[tag], points, strict=True):
            allowed = ATOL_DB if tag.endswith("_db") else 0.0
            assert value == pytest.approx(other, rel=RTOL, abs=allowed), f"{tag} at {step}"


def assert_close_state(one: Path, other: Path) -> None:
    """The same counters to the number, among them the optimizer's; weights, EMA and moments but for rounding."""
    first, second = load(one), load(other)
    assert first["epoch"] == second["epoch"]
    assert first["scaler_state_dict"] == second["scaler_state_dict"]
    for key in ("step", "epochs", "best_epochs", "precision", "fingerprint"):
        assert first["resume"][key] == second["resume"][key], key
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if name.endswith(".step"):
            assert torch.equal(tensor, right[name]), name
        # Where the gradient is rounding, Adam makes a step of it whose size is the learning rate, 1e-3.
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=5e-4, msg=lambda text, name=name: name + text)


def assert_same_curves(run: Path, alone: Path) -> None:
    """Of two `SHORT` runs: all curves, each step once, and the state at the end, but for rounding."""
    assert_close(series(run), series(alone))
    for stage in SHORT[1:]:
        assert_close_state(run / f"{stage}_final.pt", alone / f"{stage}_final.pt")


def has_step(run: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether a save of this step or a later one was committed."""
    return lambda: any(line["stage"] == stage and line["step"] >= step for line in manifest(run))


def has_kind(run: Path, stage: str, kind: str) -> Callable[[], bool]:
    """Whether a file of this kind was committed."""
    return lambda: any(line["stage"] == stage and line["kind"] == kind for line in manifest(run))


def refused(workspace: Path, code: int, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Train, expect this exit code and no traceback; the output."""
    found, output = train(workspace, *arguments, env=env)
    assert found == code, output
    assert "Traceback" not in output
    return output
