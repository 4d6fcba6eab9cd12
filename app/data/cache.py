"""The cache of prepared cases: one folder per case, and an index that says what was accepted, what was refused and why.

    cache/<case>-<key>/ct_{N}.npy     (N, N, N) int16 HU, clipped to the window
    cache/<case>-<key>/xray_{N}.npy   (2, N, N) float32 line integrals
    cache/<case>-<key>/case.json      the case's entry in the index
    cache/index-<key>.json

`key` is a hash of everything in the config that shapes these arrays. Names, paths and headers of the data stay out.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.config import Config
from app.data import phantom
from app.errors import DataError
from app.physics.geometry import geometry_from_config
from app.workspace import atomic_write, sync_folder

logger = logging.getLogger(__name__)

FORMAT = 1
CASE_FILE = "case.json"
ABANDONED_S = 600.0
"""A temporary folder as old as this belongs to a process that was killed: a living one fills it in seconds."""
INDEX_PERIOD_S = 2.0

NamedArrays = Iterable[tuple[str, NDArray[Any]]]


@dataclass(frozen=True)
class CaseRecord:
    """What is known of a prepared case."""

    id: str
    patient: str
    content: str
    """sha256 of the files that it was made of."""
    voxels: str
    """sha256 of the finest cube: the same scan in another format is found by it."""
    source: str
    """Pseudonym of the path."""
    size: str
    """Voxels and spacing of the scan, for the table."""
    coverage: float | None
    """Share of the field of view inside the scan; None for phantoms."""
    lung_fraction: float | None
    """Share of the body; None for phantoms."""
    drr_difference: float | None
    """Relative L2 between given and rendered radiographs; None where none were given."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a source, so that its files are not read again while they stay as they are."""

    signature: tuple[int, int]
    """Total size in bytes and sum of the modification times in ns."""
    case: str | None = None
    """The case that was made of it, or with a reason, the case whose duplicate it is."""
    reason: str | None = None
    """Why it was refused."""
    limits: str = ""
    """The thresholds under which it was refused; other ones are another chance."""
    parts: tuple[str, ...] = ()
    """For a folder of DICOM files: the sources that were found in it."""


@dataclass
class Index:
    """All cases and outcomes of one preparation key."""

    key_id: str = ""
    """Which secret key made the pseudonyms; empty while there are none."""
    cases: dict[str, CaseRecord] = field(default_factory=dict)
    sources: dict[str, Outcome] = field(default_factory=dict)


def preparation_key(config: Config) -> str:
    """12 digits for everything that shapes the prepared arrays."""
    data = config.data
    shape = {
        "format": FORMAT,
        "source": data.source if data.source == "ct" else ["phantoms", data.phantoms.seed, phantom.REVISION],
        "hu_window": data.hu_window,
        "geometry": asdict(geometry_from_config(config)),
        "edges": stage_edges(config),
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


def stage_edges(config: Config) -> list[int]:
    """The cube edges of the stages, coarse to fine."""
    return [stage.resolution for stage in config.stages]


class Cache:
    """The prepared cases of one preparation key."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Opens the cache in `folder` for what `config` asks; reads the index, writes nothing."""
        self.folder = folder
        self.key = preparation_key(config)
        self.edges = stage_edges(config)
        self.index_path = folder / f"index-{self.key}.json"
        self.index = self._read_index()
        self._saved_at = time.monotonic()

    def case_folder(self, case_id: str) -> Path:
        """Where the arrays of a case lie."""
        return self.folder / f"{case_id}-{self.key}"

    def holds(self, case_id: str) -> bool:
        """Whether all files of a case are there."""
        folder = self.case_folder(case_id)
        names = [CASE_FILE, *(f"{kind}_{edge}.npy" for kind in ("ct", "xray") for edge in self.edges)]
        return case_id in self.index.cases and all((folder / name).is_file() for name in names)

    def recover(self) -> None:
        """Take finished cases that a killed process did not enter into the index; drop entries without files."""
        now = time.time()
        for folder in sorted(self.folder.glob(".*.tmp")):
            if folder.is_dir() and now - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
        for path in sorted(self.folder.glob(f"*-{self.key}/{CASE_FILE}")):
            if path.parent.name.split("-")[0] not in self.index.cases:
                self._adopt(path)
        for case_id in [case_id for case_id in self.index.cases if not self.holds(case_id)]:
            logger.warning("prepared case %s is incomplete in the cache and will be prepared again", case_id)
            self.forget(case_id)

    def write(self, record: CaseRecord, outcome: Outcome, key_id: str, arrays: NamedArrays) -> None:
        """Publish a case: all of its files or none."""
        target = self.case_folder(record.id)
        temporary = self.folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            for name, array in arrays:
                # Straight into a file, np.save reports a full disk without its error number.
                whole = io.BytesIO()
                np.save(whole, array)
                with (temporary / name).open("wb") as file:
                    file.write(whole.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            entry = {"key_id": key_id, "case": asdict(record), "outcome": asdict(outcome)}
            atomic_write(temporary / CASE_FILE, json.dumps(entry).encode())
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(self.folder)
        self._enter(record, outcome, key_id)
        self.save_index_sometimes()

    def forget(self, case_id: str) -> None:
        """Remove a case and the outcomes that name it."""
        self.index.cases.pop(case_id, None)
        self.index.sources = {key: value for key, value in self.index.sources.items() if value.case != case_id}
        shutil.rmtree(self.case_folder(case_id), ignore_errors=True)

    def save_index(self) -> None:
        """Write the index, atomically."""
        index = self.index
        document = {
            "format": FORMAT,
            "key_id": index.key_id,
            "cases": [asdict(record) for _, record in sorted(index.cases.items())],
            "sources": {key: asdict(outcome) for key, outcome in sorted(index.sources.items())},
        }
        atomic_write(self.index_path, json.dumps(document, indent=1).encode())
        self._saved_at = time.monotonic()

    def save_index_sometimes(self) -> None:
        """Write the index unless that was done a moment ago; each case's own entry is on disk already."""
        if time.monotonic() - self._saved_at > INDEX_PERIOD_S:
            self.save_index()

    def _enter(self, record: CaseRecord, outcome: Outcome, key_id: str) -> None:
        self.index.key_id = key_id
        self.index.cases[record.id] = record
        self.index.sources[record.source] = outcome

    def _adopt(self, path: Path) -> None:
        try:
            entry = json.loads(path.read_bytes())
            record, outcome = _record(entry["case"]), _outcome(entry["outcome"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} cannot be read: delete the folder {path.parent} and start again") from error
        self._enter(record, outcome, entry["key_id"])

    def _read_index(self) -> Index:
        if not self.index_path.exists():
            return Index()
        try:
            document = json.loads(self.index_path.read_bytes())
            records = [_record(entry) for entry in document["cases"]]
            sources = {key: _outcome(entry) for key, entry in document["sources"].items()}
            return Index(document["key_id"], {record.id: record for record in records}, sources)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"the index of the cache cannot be read: {self.index_path}. Delete this file and start again: "
                "it is made anew from the prepared cases"
            ) from error


def _record(entry: dict[str, Any]) -> CaseRecord:
    return CaseRecord(**{**entry, "notes": tuple(entry["notes"])})


def _outcome(entry: dict[str, Any]) -> Outcome:
    size, times = entry["signature"]
    return Outcome(**{**entry, "signature": (int(size), int(times)), "parts": tuple(entry["parts"])})
