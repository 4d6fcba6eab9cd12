"""What lies in the data folder: volume files, patient folders, folders of DICOM files.

    data/<id>.nii.gz                                     a volume file
    data/.../<id>/<id>.nii.gz  <id>_pa_drr.png ...       a patient folder: volume files, perhaps with radiographs
    data/.../any depth/*.dcm                             DICOM: any folder without volume files in or below it

Nothing is opened here except that loose files are asked whether they are DICOM.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from app.data.ct import VOLUME_SUFFIXES, volume_suffix
from app.data.dicom import DicomSeries
from app.data.limits import inside
from app.data.radiograph import IMAGE_SUFFIXES
from app.errors import DataError
from app.physics.geometry import VIEWS

VIEW_NAMES = {"frontal": ("pa_drr", "frontal"), "lateral": ("lat_drr", "lateral")}
READ_ME = ("readme", "license", "licence")
EXPECTED = "expected a volume file (.nii.gz, .nii, .nrrd, .mha, .npy), a patient folder or DICOM files"


@dataclass(frozen=True)
class Source:
    """One scan, with its radiographs where they are given."""

    name: str = field(repr=False)
    """Path below the data folder; for DICOM, followed by # and the series."""
    patient: str = field(repr=False)
    """The patient's own id."""
    volume: Path | DicomSeries = field(repr=False)
    radiographs: dict[str, Path] = field(default_factory=dict, repr=False)
    """By view."""
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it is made of."""
        if isinstance(self.volume, DicomSeries):
            return self.volume.files
        sidecar = self.volume.with_suffix(".json")
        sidecars = (sidecar,) if volume_suffix(self.volume) == ".npy" and sidecar.is_file() else ()
        return (self.volume, *sidecars, *(self.radiographs[view] for view in VIEWS if view in self.radiographs))

    def secret_texts(self, root: Path) -> list[str]:
        """Texts that may name the patient: paths, names of folders and files, the id."""
        texts = {self.name, self.patient, *path_texts(root, self.files)}
        if isinstance(self.volume, DicomSeries):
            texts |= {self.volume.study_uid, self.volume.series_uid, *path_texts(root, [self.volume.folder])}
        return sorted(texts)


@dataclass
class Found:
    """The content of the data folder."""

    sources: list[Source] = field(default_factory=list)
    dicom: list[Path] = field(default_factory=list)
    """Folders to be searched for DICOM series."""
    refused: list[tuple[Path, str]] = field(default_factory=list)
    """Paths that cannot be used, and why."""


def find_sources(root: Path) -> Found:
    """Everything in the data folder, in a fixed order."""
    found = Found()
    loose = False
    for path in _visible(root, root, found):
        if path.is_dir():
            _classify(path, root, found, set())
        elif volume_suffix(path):
            found.sources.append(Source(path.name, _stem(path), path))
        elif _is_dicom(path):
            loose = True
        elif not _is_companion(path):
            found.refused.append((path, f"not a CT volume: {EXPECTED}"))
    if loose:
        # DICOM files may belong to series in the folders beside them.
        found.dicom = [root]
    return found


def signature(files: Iterable[Path]) -> tuple[int, int]:
    """Total size and sum of modification times in ns: changes when any file does."""
    size = times = 0
    for path in files:
        state = path.stat()
        size, times = size + state.st_size, (times + state.st_mtime_ns) % 2**63
    return size, times


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`, links to files included."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for path in (Path(parent) / name for name in sorted(names)) if path.is_file())


def path_texts(root: Path, paths: Iterable[Path]) -> set[str]:
    """Whatever of these paths may name a patient: the paths, the names of folders below `root` and of files."""
    texts = set()
    for path in paths:
        texts |= {str(path), str(path.resolve()), path.name, path.name.split(".")[0]}
        if path.is_relative_to(root):
            below = path.relative_to(root)
            texts |= {str(below), *below.parts}
    return texts


def _visible(folder: Path, root: Path, found: Found) -> Iterator[Path]:
    """Entries that are not hidden, are files or folders, and do not lead out of the data folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower().split(".")[0] in READ_ME:
            continue
        try:
            inside(path, root)
        except DataError as error:
            found.refused.append((path, str(error)))
            continue
        if not (path.is_dir() or path.is_file()):
            found.refused.append((path, "neither a file nor a folder" if path.exists() else "a link to nothing"))
            continue
        yield path


def _classify(folder: Path, root: Path, found: Found, seen: set[Path]) -> None:
    """Enter a folder as patient folder or DICOM folder, or look into its folders one by one."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    entries = list(_visible(folder, root, found))
    if any(_is_volume(path) and path.is_file() for path in entries):
        _patient_folder(folder, [path for path in entries if path.is_file()], root, found)
    elif _holds_volumes(folder):
        for path in entries:
            if path.is_dir():
                _classify(path, root, found, seen)
    else:
        found.dicom.append(folder)


def _holds_volumes(folder: Path) -> bool:
    return any(_is_volume(Path(name)) and not name.startswith(".") for _, _, names in os.walk(folder) for name in names)


def _is_volume(path: Path) -> bool:
    """Whether a name alone says that this is a volume; `.img` does not, because DICOM files are called so as well."""
    return volume_suffix(path) in VOLUME_SUFFIXES


def _patient_folder(folder: Path, files: list[Path], root: Path, found: Found) -> None:
    """One source for `<id>.<suffix>`, or where there is none, one for each volume file."""
    patient = folder.name
    images: dict[str, list[Path]] = {view: [] for view in VIEWS}
    volumes = []
    for path in files:
        view = _view_of(path, patient)
        if view:
            images[view].append(path)
        elif volume_suffix(path):
            volumes.append(path)
    named = sorted((path for path in volumes if _stem(path) == patient), key=_preference)
    chosen = named[:1] or volumes
    if not chosen:
        found.refused.append((folder, "radiographs without a CT volume"))
    several = [view for view in VIEWS if len(images[view]) > 1]
    for path in chosen:
        name = path.relative_to(root).as_posix()
        if several:
            found.refused.append((path, f"more than one {several[0]} radiograph: keep one file per view"))
            continue
        pair = {view: paths[0] for view, paths in images.items() if paths} if len(chosen) == 1 else {}
        others = len(volumes) - 1 if named else 0
        notes = (f"{others} other volume files in its folder are not used",) if others else ()
        found.sources.append(Source(name, patient, path, pair, notes))


def _view_of(path: Path, patient: str) -> str | None:
    """The view that a file named `<id>_<view>.<image suffix>` shows."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return None
    stem = path.name[: -len(path.suffix)].lower()
    return next((view for view in VIEWS if stem in [f"{patient.lower()}_{end}" for end in VIEW_NAMES[view]]), None)


def _preference(path: Path) -> tuple[int, str]:
    suffix = volume_suffix(path)
    return (VOLUME_SUFFIXES.index(suffix) if suffix in VOLUME_SUFFIXES else len(VOLUME_SUFFIXES), path.name)


def _stem(path: Path) -> str:
    return path.name[: -len(volume_suffix(path) or "")]


def _is_dicom(path: Path) -> bool:
    """Whether the mark of a DICOM file stands behind its preamble of 128 bytes."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _is_companion(path: Path) -> bool:
    """Whether a file says the spacing of a .npy volume beside it."""
    return path.suffix == ".json" and path.with_suffix(".npy").exists()
