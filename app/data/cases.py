"""Prepared cases for training: the store that loads them, with `prepare` and `split_patients` beside it.

Shapes: N cube edge of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.config import Config
from app.data.acceptance import refusal_by_limits
from app.data.cache import Cache, CaseRecord
from app.data.prepare import prepare
from app.data.report import NothingUsable, PrepareReport
from app.data.split import Case, Split, split_patients
from app.errors import DataError, MachineError
from app.workspace import Workspace

__all__ = ["Case", "CaseStore", "LoadedCase", "NothingUsable", "PrepareReport", "Split", "prepare", "split_patients"]

REPAIR = "delete the folder {} and run `python -m app prepare` again"

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class LoadedCase:
    """The arrays of a case at one resolution, in memory of their own."""

    hu: NDArray[np.int16]
    """(N, N, N) in HU, clipped to the window."""
    xrays: NDArray[np.float32]
    """(2, N, N) line integrals, frontal and lateral."""


@dataclass(frozen=True)
class CaseStore:
    """The cases of the cache that the config accepts."""

    cases: tuple[Case, ...]
    preparation_key: str
    folder: Path

    @classmethod
    def open(cls, config: Config, workspace: Workspace) -> Self:
        """The prepared cases, in an order that does not depend on the machine.

        Raises:
            DataError: nothing was prepared for this config.
        """
        cache = Cache(workspace.cache, config)
        records = [record for record in cache.index.cases.values() if _is_wanted(record, config)]
        if not records:
            raise DataError(
                f"no prepared case in {workspace.cache} for this config (key {cache.key}): "
                "run `python -m app prepare` with the same config first"
            )
        cases = (Case(record.id, record.patient, record.content) for record in records)
        return cls(tuple(sorted(cases, key=lambda case: case.content)), cache.key, workspace.cache)

    def seen_from(self, cache: Path) -> Self:
        """The same cases on another machine, where the workspace's cache is at `cache`.

        Raises:
            MachineError: they are not there.
        """
        here = replace(self, folder=cache)
        missing = [case.id for case in self.cases if not here._folder(case.id).is_dir()]
        if missing:
            raise MachineError(
                f"{cache}: {len(missing)} of {len(self.cases)} cases that the first machine has prepared are not here. "
                "Every machine of a run must see the same volume at its WORKSPACE, if only to read its cache"
            )
        return here

    def load(self, case_id: str, edge: int) -> LoadedCase:
        """A case at the resolution of a stage.

        Raises:
            DataError: the files are missing or not what they should be.
        """
        folder = self._folder(case_id)
        hu = _read(folder / f"ct_{edge}.npy", (edge, edge, edge), np.dtype(np.int16))
        xrays = _read(folder / f"xray_{edge}.npy", (2, edge, edge), np.dtype(np.float32))
        return LoadedCase(hu, xrays)

    def _folder(self, case_id: str) -> Path:
        return self.folder / f"{case_id}-{self.preparation_key}"


def _is_wanted(record: CaseRecord, config: Config) -> bool:
    if config.data.source == "phantoms":
        return int(record.patient.removeprefix("phantom-")) < config.data.phantoms.count
    return refusal_by_limits(record, config) is None


def _read(path: Path, shape: tuple[int, ...], dtype: np.dtype[Scalar]) -> NDArray[Scalar]:
    """A copy of the array in `path`, which must have this shape and type."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"prepared file {path} cannot be read ({error}): {REPAIR.format(path.parent)}") from error
    if mapped.shape != shape or mapped.dtype != dtype:
        raise DataError(
            f"prepared file {path}: expected {dtype} {shape}, found {mapped.dtype} {mapped.shape}: "
            f"{REPAIR.format(path.parent)}"
        )
    return np.array(mapped)
