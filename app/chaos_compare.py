"""Whether an interrupted run is the uninterrupted one: states bit for bit, curves point for point."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.ops.event_files import EventReader
from app.tags import GLOBAL_GROUPS, NO_AXIS, axis
from app.train.checkpoint import UNREADABLE_PAYLOAD
from app.train.ema import tensors_hash
from app.workspace import RunDir

ROLLING = ("last", "last_previous")
"""Kinds that hold whatever moment was saved last, which differs between two runs."""
NAMED = 3
"""Steps or tensors that a message names."""

Curves = dict[str, list[tuple[int, bytes]]]
"""(step, value) of each tag in the order of the files; the value as bytes, so that equal means equal to the bit."""


@dataclass(frozen=True)
class State:
    """What of a checkpoint must not depend on interruptions: all but the config and the clock's readings."""

    tensors: dict[str, Tensor]
    """By path, such as `optimizer_state_dict.state.0.exp_avg`."""
    values: dict[str, str]
    """Counters, losses, scaler, the optimizer's settings: as text, by path."""

    @property
    def sha256(self) -> str:
        """Over names and bits of everything."""
        text = tensors_hash(self.tensors) + json.dumps(self.values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_state(path: Path) -> State:
    """The state in a checkpoint file; raises one of `UNREADABLE_PAYLOAD`."""
    payload = torch.load(path, map_location="cpu", weights_only=True)
    leaves = dict(_leaves({key: value for key, value in payload.items() if key != "config"}, ""))
    return State(
        {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)},
        {name: repr(leaf) for name, leaf in leaves.items() if not isinstance(leaf, Tensor)},
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if "seconds" not in str(key):
                yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def lasting_checkpoints(run_dir: RunDir) -> dict[str, Path]:
    """`_best`, `_epoch_{N}` and `_final` of all stages by name."""
    return {path.name: path for _, kind, path in run_dir.checkpoints() if kind not in ROLLING}


def read_curves(folder: Path) -> Curves:
    """Every point of a run's event files, but for those that stand on no axis, such as the config's text."""
    curves: Curves = {}
    for event in EventReader(folder).poll():
        for value in event.summary.value:
            if axis(value.tag) != NO_AXIS:
                curves.setdefault(value.tag, []).append((event.step, _bits(value)))
    return curves


def _bits(value: Any) -> bytes:
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return struct.pack("<f", value.simple_value)
    return bytes(getattr(value, kind).SerializeToString(deterministic=True)) if kind else b""


def by_the_clock(tag: str) -> bool:
    """Whether a tag's values are times, or what the machine did."""
    return tag.endswith("/epoch_time") or tag.partition("/")[0] in GLOBAL_GROUPS


class Reference:
    """The uninterrupted run, read once, that others are compared with."""

    def __init__(self, run_dir: RunDir) -> None:
        self._files = lasting_checkpoints(run_dir)
        self.hashes = {name: read_state(path).sha256 for name, path in self._files.items()}
        self.curves = read_curves(run_dir.tensorboard)

    def different_checkpoints(self, run_dir: RunDir) -> list[str]:
        """One sentence for each checkpoint that is not the reference's."""
        files = lasting_checkpoints(run_dir)
        found = [f"{name} is not in the reference" for name in sorted(files.keys() - self._files.keys())]
        for name, path in sorted(self._files.items()):
            if name not in files:
                found.append(f"{name} is missing")
                continue
            try:
                state = read_state(files[name])
            except UNREADABLE_PAYLOAD as error:
                found.append(f"{name} cannot be read: {' '.join(str(error).split())[:120]}")
                continue
            if state.sha256 != self.hashes[name]:
                found.append(f"{name}: {different_state(state, read_state(path))}")
        return found

    def different_curves(self, run_dir: RunDir) -> list[str]:
        """One sentence for each tag that is not the reference's."""
        curves = read_curves(run_dir.tensorboard)
        tags = sorted(curves.keys() | self.curves.keys())
        compared = ((tag, different_points(tag, curves.get(tag), self.curves.get(tag))) for tag in tags)
        return [f"{tag}: {problem}" for tag, problem in compared if problem]


def different_state(found: State, expected: State) -> str:
    """What differs between two states, in words."""
    parts = []
    names = found.tensors.keys() | expected.tensors.keys()
    tensors = [name for name in sorted(names) if _tensor_hash(found, name) != _tensor_hash(expected, name)]
    if tensors:
        parts.append(f"{len(tensors)} of {len(names)} tensors differ, such as {', '.join(tensors[:NAMED])}")
    values = found.values.keys() | expected.values.keys()
    for name in [name for name in sorted(values) if found.values.get(name) != expected.values.get(name)][:NAMED]:
        parts.append(f"{name} is {found.values.get(name)}, in the reference {expected.values.get(name)}")
    return "; ".join(parts)


def _tensor_hash(state: State, name: str) -> str | None:
    return tensors_hash({name: state.tensors[name]}) if name in state.tensors else None


def different_points(
    tag: str, found: Sequence[tuple[int, bytes]] | None, expected: Sequence[tuple[int, bytes]] | None
) -> str | None:
    """What is wrong with a tag, in words, or None; where it goes by the clock, only its order is looked at."""
    steps = [step for step, _ in found or ()]
    twice = sorted(step for step, count in Counter(steps).items() if count > 1)
    if twice:
        return f"{_steps(twice)} more than once"
    if steps != sorted(steps):
        return "its steps are not in ascending order"
    if by_the_clock(tag):
        return None
    if found is None or expected is None:
        return "is missing" if found is None else "is not in the reference"
    now, then = dict(found), dict(expected)
    if missing := sorted(then.keys() - now.keys()):
        return f"{_steps(missing)} missing"
    if added := sorted(now.keys() - then.keys()):
        return f"{_steps(added)} not in the reference"
    different = [step for step in steps if now[step] != then[step]]
    if different:
        first = different[0]
        values = f"{_number(now[first])}, in the reference {_number(then[first])}"
        return f"{len(different)} of {len(steps)} values differ, the first at step {first}: {values}"
    return None


def _steps(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - NAMED} more" if len(steps) > NAMED else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps[:NAMED]))}{more}"


def _number(bits: bytes) -> str:
    if len(bits) != struct.calcsize("<f"):
        return f"{hashlib.sha256(bits).hexdigest()[:12]} (sha256 of the picture)"
    return f"{struct.unpack('<f', bits)[0]:.9g}"
