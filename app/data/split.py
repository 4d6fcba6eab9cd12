"""The split of patients into training and validation, frozen with the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from app.config import Config
from app.errors import CheckpointError, DataError
from app.workspace import RunDir, atomic_write

FORMAT = 1


@dataclass(frozen=True)
class Case:
    """One prepared scan."""

    id: str
    """Pseudonym of the case."""
    patient: str
    """Pseudonym of the patient."""
    content: str
    """sha256 of what it was made of."""


class Store(Protocol):
    """What the split needs of a store of cases."""

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases."""

    @property
    def preparation_key(self) -> str:
        """Names how they were prepared."""


@dataclass(frozen=True)
class Split:
    """Case ids of each side; all cases of a patient are on one side."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    fingerprint: str
    """Hash of the cases' contents, their sides and how they were prepared."""


@dataclass(frozen=True)
class _Sides:
    train: tuple[Case, ...]
    val: tuple[Case, ...]


def split_patients(store: Store, config: Config, run_dir: RunDir) -> Split:
    """The run's split: drawn and written at the first call, read and checked later.

    Raises:
        DataError: fewer than two patients.
        CheckpointError: the prepared cases are not those that the run began with.
    """
    if run_dir.split.exists():
        sides = _frozen(store, run_dir)
    else:
        sides = _draw(store.cases, config)
        _freeze(sides, store.preparation_key, run_dir)
    return Split(
        tuple(case.id for case in sides.train),
        tuple(case.id for case in sides.val),
        _fingerprint(sides, store.preparation_key),
    )


def _draw(cases: Sequence[Case], config: Config) -> _Sides:
    """Sort patients by a hash of their content, which no machine and no secret key changes; take the first ones."""
    patients: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.content):
        patients.setdefault(case.patient, []).append(case)
    if len(patients) < 2:
        raise DataError(
            f"at least two patients are needed, one to train and one to validate: found {len(patients)} "
            f"with {len(cases)} usable scans. Add scans of other patients to the data folder"
        )
    ordered = sorted(patients.values(), key=lambda own: _hash(f"{config.seed}:{own[0].content}"))
    held_out = min(max(1, round(config.data.validation_fraction * len(ordered))), len(ordered) - 1)
    val = tuple(case for own in ordered[:held_out] for case in own)
    train = tuple(case for own in ordered[held_out:] for case in own)
    return _Sides(train, val)


def _freeze(sides: _Sides, preparation_key: str, run_dir: RunDir) -> None:
    document = {
        "format": FORMAT,
        "preparation_key": preparation_key,
        "fingerprint": _fingerprint(sides, preparation_key),
        "train": [asdict(case) for case in sides.train],
        "val": [asdict(case) for case in sides.val],
    }
    run_dir.ensure()
    atomic_write(run_dir.split, json.dumps(document, indent=1).encode())


def _frozen(store: Store, run_dir: RunDir) -> _Sides:
    """The sides in split.json with the store's own ids: a cache that was made again may have other pseudonyms."""
    document = _read(run_dir)
    now = {case.content: case for case in store.cases}
    then = [entry["content"] for side in ("train", "val") for entry in document[side]]
    added, removed = now.keys() - set(then), set(then) - now.keys()
    if added or removed:
        raise CheckpointError(
            f"the prepared cases are not those of this run: {len(added)} added, {len(removed)} removed since it began "
            f"({run_dir.split}). Restore the data as they were, or start a new run with another run_name"
        )
    if document["preparation_key"] != store.preparation_key:
        raise CheckpointError(
            f"the cases were prepared with other settings than those of this run: key {store.preparation_key}, "
            f"expected {document['preparation_key']} ({run_dir.split}). Restore field_of_view_mm, hu_window, geometry "
            "and stages as they were, or start a new run with another run_name"
        )
    train, val = (tuple(now[entry["content"]] for entry in document[side]) for side in ("train", "val"))
    return _Sides(train, val)


def _read(run_dir: RunDir) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(run_dir.split.read_bytes())
        sides = {side: [Case(**entry) for entry in document[side]] for side in ("train", "val")}
        expected = _fingerprint(_Sides(tuple(sides["train"]), tuple(sides["val"])), document["preparation_key"])
        if document["fingerprint"] != expected:
            raise ValueError("its fingerprint does not fit its cases")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"the frozen split {run_dir.split} cannot be used: {error}. Restore it from a copy, "
            "or start a new run with another run_name"
        ) from error
    return document


def _fingerprint(sides: _Sides, preparation_key: str) -> str:
    lines = sorted((*_lines(sides.train, "train"), *_lines(sides.val, "val")))
    return _hash("\n".join([preparation_key, *lines]))


def _lines(cases: Iterable[Case], side: str) -> list[str]:
    return [f"{case.content} {side}" for case in cases]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
