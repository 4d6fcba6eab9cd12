"""Planted secrets and patients' names are in nothing that a run writes or prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from app.data.phantom import phantom_hu
from tests.dicom_files import write_series
from tests.runs import RUN, train
from tests.scans import write_scan
from tests.webhook import SECRET_PATH, webhook

SECRETS = {
    "WANDB_API_KEY": "f00dface" * 5,
    "RUNPOD_API_KEY": "rpa_PLANTEDKEY0123456789",
    "DASHBOARD_PASSWORD": "planted-password-4711",
}
NAMES = ("Mustermann", "Erika", "Doe^Jane", "Kowalski", "Nowak", "MRN-0815", "Smith_John")


def plant(data: Path) -> None:
    """Patients whose names stand in DICOM tags, folder names, file names, and in a file that is refused."""
    hu = phantom_hu(5, 0, 48, 384.0)
    tags = {(0x0010, 0x0010): ("PN", "Doe^Jane"), (0x0010, 0x0020): ("LO", "MRN-0815")}
    write_series(
        data / "Mustermann_Erika",
        hu.astype(np.int64) + 1024,
        step_mm=8.0,
        pixel_spacing=(8.0, 8.0),
        changes=tags,
    )
    write_scan(data / "Kowalski" / "Kowalski.nii.gz", 1)
    write_scan(data / "Nowak_1951.nrrd", 2)
    (data / "Smith_John.nii.gz").write_bytes(b"not a volume")


def test_nothing_planted_is_found(tmp_path: Path) -> None:
    """Logs, event files, checkpoints, cache, index, split, status, an offline W&B run, terminal and notifications."""
    data = tmp_path / "Mustermann_private"
    workspace = tmp_path / "workspace"
    plant(data)
    with webhook() as hook:
        settings = ("--set", "data.source=ct", "--set", f"data.path={data}")
        code, output = train(workspace, *settings, env={**SECRETS, "WANDB_MODE": "offline", "NOTIFY_URL": hook.url})
    assert code == 0, output
    assert hook.events[0] == "started"
    assert "3 cases of 3 patients are ready" in output
    written = [path for path in workspace.rglob("*") if path.is_file()]
    kinds = {"tfevents", ".pt", ".npy", "index", "split.json", "train.log", ".wandb", "status.json", "config.yaml"}
    assert [kind for kind in kinds if not any(kind in path.name for path in written)] == []
    planted = [*SECRETS.values(), SECRET_PATH, *NAMES]
    told = json.dumps(hook.posts)
    found = {
        place: [text for text in planted if text in said] for place, said in (("terminal", output), ("hook", told))
    }
    for path in written:
        place = f"{path.relative_to(workspace)}"
        content = path.read_bytes() + place.encode()
        found[place] = [text for text in planted if text.lower().encode() in content.lower()]
    assert {place: texts for place, texts in found.items() if texts} == {}


def test_the_search_would_find_them(tmp_path: Path) -> None:
    """The same search on the data folder finds every name: it can fail."""
    plant(tmp_path)
    everything = b"".join(
        str(path.relative_to(tmp_path)).encode() + (path.read_bytes() if path.is_file() else b"")
        for path in tmp_path.rglob("*")
    )
    assert all(name.encode() in everything for name in NAMES)
    assert not (tmp_path / RUN).exists()
