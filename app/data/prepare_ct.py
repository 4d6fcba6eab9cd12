"""Preparing the scans of the data folder: each is read once, accepted or refused, and remembered under a pseudonym."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from app.config import Config
from app.data.acceptance import limits_key, refusal_by_limits
from app.data.build import Renderer, stage_arrays, voxel_hash
from app.data.build_ct import build_case, content_hash
from app.data.cache import Cache, CaseRecord, Outcome
from app.data.dicom import DicomSeries, discover
from app.data.limits import check_file_size, inside
from app.data.pseudonym import Pseudonyms, load_key, without_names
from app.data.report import Entry, NothingUsable, PrepareReport
from app.data.sources import EXPECTED, Found, Source, files_below, find_sources, path_texts, signature
from app.data.watch import Watch
from app.errors import DataError
from app.workspace import Workspace

logger = logging.getLogger(__name__)

REASONS_SHOWN = 10
KEPT = "from the cache: its files are no longer in the data folder"


class Duplicate(DataError):
    """The scan is in the cache already, from another file."""

    def __init__(self, case_id: str) -> None:
        super().__init__(f"the same scan as case {case_id}, which is used")
        self.case_id = case_id


class CtPreparation:
    """One call of `prepare` on a data folder."""

    def __init__(self, config: Config, workspace: Workspace, cache: Cache) -> None:
        self._config = config
        self._cache = cache
        self._index = cache.index
        self._key_path = workspace.pseudonym_key
        self._root = Path(config.data.path) if config.data.path else workspace.data
        self._render = Renderer(config)
        self._limits = limits_key(config)
        self._live: set[str] = set()
        """Pseudonyms of the sources that are in the data folder now."""

    def run(self, watch: Watch) -> list[Entry]:
        """Every case and every refusal.

        Raises:
            NothingUsable: no case at all.
        """
        found = find_sources(self._root) if self._root.is_dir() else Found()
        entries: list[Entry] = []
        if found.sources or found.dicom or found.refused:
            entries = self._read(found, watch)
        entries += self._kept({entry.record.id for entry in entries if entry.record})
        if not any(entry.reason is None for entry in entries):
            raise NothingUsable(self._nothing_usable(entries), PrepareReport(tuple(entries)))
        return entries

    def _read(self, found: Found, watch: Watch) -> list[Entry]:
        self._names = Pseudonyms(load_key(self._key_path))
        self._check_key()
        entries = [self._refused_path(path, reason) for path, reason in found.refused]
        sources = list(found.sources)
        for folder in watch.over(found.dicom, "DICOM folder"):
            more, known = self._list_dicom(folder, watch)
            sources += more
            entries += known
        self._live |= {self._names.source(source.name) for source in sources}
        for number, source in enumerate(watch.over(sources, "scan"), start=1):
            entry = self._one(source)
            entries.append(entry)
            if entry.fresh:
                verdict = "refused: " + entry.reason if entry.reason else "prepared"
                logger.info("scan %d of %d, %s: %s", number, len(sources), entry.label, verdict)
        return entries

    def _one(self, source: Source) -> Entry:
        key = self._names.source(source.name)
        try:
            now = signature(source.files)
            known = self._index.sources.get(key)
            if known is not None and known.signature == now:
                entry = self._known(key, source.name, known)
                if entry is not None:
                    return entry
            return self._new(source, key, now)
        except OSError as error:
            # Not remembered: the disk may answer the next time.
            return Entry(key, source.name, reason=f"cannot be read: {error.strerror}", fresh=True)

    def _known(self, key: str, name: str, outcome: Outcome) -> Entry | None:
        """The remembered outcome of a source that has not changed, or None where it must be read again."""
        if outcome.reason is not None:
            return Entry(key, name, reason=outcome.reason) if outcome.limits == self._limits else None
        if outcome.case is None or not self._cache.holds(outcome.case):
            return None
        record = self._index.cases[outcome.case]
        return Entry(record.id, name, record, refusal_by_limits(record, self._config))

    def _new(self, source: Source, key: str, now: tuple[int, int]) -> Entry:
        """Read a source that is new or has changed."""
        before = self._index.sources.get(key)
        stale = before.case if before is not None and before.reason is None else None
        try:
            for path in source.files:
                inside(path, self._root)
                check_file_size(path, self._config.data.max_file_gib)
            content = content_hash(source)
            case_id = self._names.case(source.patient, content)
            if stale == case_id and self._cache.holds(case_id):
                self._index.sources[key] = Outcome(now, case=case_id)
                entry = self._known(key, source.name, self._index.sources[key])
                if entry is not None:
                    return entry
            self._check_duplicate(key, "content", content)
            record = self._build(source, key, case_id, content, now)
            if stale not in (None, case_id):
                self._cache.forget(str(stale))
            return Entry(record.id, source.name, record, fresh=True)
        except DataError as error:
            if stale is not None:
                self._cache.forget(stale)
            reason = self._without_names(str(error), key, source.secret_texts(self._root))
            twin = error.case_id if isinstance(error, Duplicate) else None
            self._index.sources[key] = Outcome(now, case=twin, reason=reason, limits=self._limits)
            self._cache.save_index_sometimes()
            return Entry(key, source.name, reason=reason, fresh=True)

    def _build(self, source: Source, key: str, case_id: str, content: str, now: tuple[int, int]) -> CaseRecord:
        built = build_case(source, self._config, self._render)
        voxels = voxel_hash(built.cube)
        self._check_duplicate(key, "voxels", voxels)
        record = CaseRecord(
            id=case_id,
            patient=self._names.patient(source.patient),
            content=content,
            voxels=voxels,
            source=key,
            size=built.size,
            coverage=built.coverage,
            lung_fraction=built.lung_fraction,
            drr_difference=built.drr_difference,
            notes=tuple(built.notes),
        )
        arrays = stage_arrays(built.cube, built.xrays, self._cache.edges)
        self._cache.write(record, Outcome(now, case=case_id), self._names.key_id, arrays)
        return record

    def _check_duplicate(self, key: str, kind: str, value: str) -> None:
        """Refuse what another source gave; where that source is gone, this is its new place and the old case goes."""
        for record in list(self._index.cases.values()):
            if getattr(record, kind) == value and record.source != key:
                if record.source in self._live:
                    raise Duplicate(record.id)
                self._cache.forget(record.id)

    def _list_dicom(self, folder: Path, watch: Watch) -> tuple[list[Source], list[Entry]]:
        """The series below a folder, or what is known of them where no file has changed; headers are slow to read."""
        name = folder.relative_to(self._root).as_posix()
        key = self._names.source(f"{name}#")
        now = signature(files_below(folder))
        known = self._index.sources.get(key)
        if known is not None and known.signature == now and known.limits == self._limits:
            parts = [(part, self._index.sources.get(part)) for part in known.parts]
            entries = [outcome and self._known(part, name, outcome) for part, outcome in parts]
            if all(entries):
                self._live |= set(known.parts)
                return [], [entry for entry in entries if entry]
        return self._read_headers(folder, name, key, now, watch)

    def _read_headers(
        self, folder: Path, name: str, key: str, now: tuple[int, int], watch: Watch
    ) -> tuple[list[Source], list[Entry]]:
        findings = discover(folder, root=self._root, max_gib=self._config.data.max_file_gib, tick=watch.check)
        sources = [self._dicom_source(series) for series in findings.series]
        refused = [*findings.refused, *(refusal for series in findings.series for refusal in series.refused)]
        entries = [self._refused_path(refusal.path, refusal.reason) for refusal in refused]
        if not sources and not entries:
            entries = [self._refused_path(folder, f"no CT in this folder: {EXPECTED}")]
        for entry in entries:
            self._index.sources[entry.label] = Outcome(now, reason=entry.reason, limits=self._limits)
        parts = (*(self._names.source(source.name) for source in sources), *(entry.label for entry in entries))
        self._index.sources[key] = Outcome(now, limits=self._limits, parts=parts)
        return sources, entries

    def _dicom_source(self, series: DicomSeries) -> Source:
        """A series as a source; without a PatientID the patient is the folder at the top."""
        below = series.folder.relative_to(self._root)
        patient = series.patient_id or (below.parts[0] if below.parts else series.study_uid)
        return Source(f"{below.as_posix()}#{series.series_uid}", patient, series)

    def _refused_path(self, path: Path, reason: str) -> Entry:
        name = path.relative_to(self._root).as_posix()
        # The reason is part of the label: one file can begin two refused series.
        label = self._names.source(f"{name}#{reason}")
        return Entry(label, name, reason=self._without_names(reason, label, path_texts(self._root, [path])))

    def _without_names(self, text: str, pseudonym: str, names: Iterable[str]) -> str:
        text = without_names(text, names, pseudonym).removeprefix(f"{pseudonym}: ")
        return without_names(text, [str(self._root), str(self._root.resolve())], "the data folder")

    def _kept(self, listed: set[str]) -> list[Entry]:
        """Cases whose files are gone; they are trained on all the same."""
        records = [record for record in self._index.cases.values() if record.id not in listed]
        if records:
            logger.info("%d cases are taken from the cache alone: their files are not in the data folder", len(records))
        return [Entry(record.id, KEPT, record, refusal_by_limits(record, self._config)) for record in records]

    def _check_key(self) -> None:
        if self._index.key_id not in ("", self._names.key_id):
            raise DataError(
                f"the cache was prepared with another pseudonym key than {self._key_path}, so new scans of its "
                "patients could not be told from new patients. Copy that key here too, or leave the data "
                f"folder empty to train from the cache alone, or delete {self._cache.folder} to prepare all again"
            )

    def _nothing_usable(self, entries: list[Entry]) -> str:
        if not entries:
            return (
                f"no CT found in {self._root}: {EXPECTED}. Put them there, set data.path, "
                "or set data.source to phantoms to see the system at work"
            )
        reasons = [f"  {entry.label}: {entry.reason}" for entry in entries[:REASONS_SHOWN]]
        more = [f"  and {len(entries) - REASONS_SHOWN} more"] if len(entries) > REASONS_SHOWN else []
        lines = "\n".join([*reasons, *more])
        return (
            f"none of the {len(entries)} scans in {self._root} can be used:\n{lines}\n"
            "Replace them, or change the limits in the config; `python -m app prepare --show-names` says which is which"
        )
