"""Check of the data: whether prepared cases or scans are there, and whether one of them can really be read."""

from __future__ import annotations

from pathlib import Path

from app.config import Config
from app.data.cache import Cache
from app.data.cases import CaseStore
from app.data.ct import read_ct, read_series
from app.data.dicom import DicomSeries, discover
from app.data.pseudonym import without_names
from app.data.sources import Found, Source, find_sources, path_texts
from app.doctor.finding import Finding, failed, passed, warned
from app.errors import DataError
from app.workspace import Workspace

WHICH = "`python -m app prepare --show-names` says which files cannot be used and why"


def data(config: Config, workspace: Workspace) -> Finding:
    """Prepared cases first, which are enough to train; else the data folder.

    No text of it names a file: names of files may be names of patients.
    """
    if Cache(workspace.cache, config).index.cases:
        return _prepared(config, workspace)
    if config.data.source == "phantoms":
        return passed("data", f"{config.data.phantoms.count} phantoms, made at the first start")
    return _scans(config, workspace.data if config.data.path is None else Path(config.data.path))


def _prepared(config: Config, workspace: Workspace) -> Finding:
    try:
        store = CaseStore.open(config, workspace)
        for edge in (stage.resolution for stage in config.stages):
            store.load(store.cases[0].id, edge)
    except DataError as error:
        return failed("data", str(error), f"Do as it says; {WHICH}")
    patients = len({case.patient for case in store.cases})
    found = f"{len(store.cases)} prepared cases of {patients} patients; one was read at every resolution"
    return _enough(patients, found)


def _scans(config: Config, root: Path) -> Finding:
    found = find_sources(root) if root.is_dir() else Found()
    sources = [*found.sources, *_first_series(found, root, config)]
    count = f"{len(found.sources)} scans and {len(found.dicom)} folders of DICOM files"
    if not sources:
        if not (found.dicom or found.refused):
            what = "Copy CTs there (rsync); the trainer waits for the first one and starts by itself"
            return warned("data", f"no CT in {root} yet, and no prepared case", what)
        return failed("data", f"{count} in the data folder, and none is a usable CT", WHICH)
    source = sources[0]
    try:
        _read(source, config)
    except (DataError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        names = [*source.secret_texts(root), *path_texts(root, [root])]
        return failed("data", f"the first of {count}: {without_names(str(text), names, 'a scan')}", WHICH)
    if found.dicom:
        # How many patients are in them takes reading every file.
        return passed("data", f"{count}; one scan was read")
    return _enough(len({each.patient for each in found.sources}), f"{count}; one scan was read")


def _first_series(found: Found, root: Path, config: Config) -> list[Source]:
    """A scan of the first DICOM folder, where there is nothing that is found more quickly."""
    if found.sources or not found.dicom:
        return []
    series = discover(found.dicom[0], root=root, max_gib=config.data.max_file_gib).series
    return [Source("", each.patient_id or "", each) for each in series[:1]]


def _read(source: Source, config: Config) -> None:
    limit = config.data.max_file_gib
    if isinstance(source.volume, DicomSeries):
        read_series(source.volume, max_gib=limit)
    else:
        read_ct(source.volume, max_gib=limit)


def _enough(patients: int, found: str) -> Finding:
    if patients < 2:
        what = "Add scans of another patient: one is held out for validation, and train refuses with one (65)"
        return failed("data", f"{found}; a single patient", what)
    return passed("data", found)
