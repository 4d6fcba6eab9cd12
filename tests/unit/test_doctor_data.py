"""The doctor's look at the data: real scans, real damage, and no name of a patient in what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.data.cases import prepare
from app.doctor.data import data
from app.doctor.finding import Finding, Verdict
from app.workspace import Workspace
from tests.conftest import tiny_config
from tests.dicom_files import stored_values, write_series
from tests.scans import ct_config, workspace_in, write_scan

NAME = "Mustermann_Erika"


def examined(workspace: Workspace) -> Finding:
    """The check with a config that wants scans; nothing is made by it."""
    before = sorted(workspace.root.rglob("*"))
    finding = data(ct_config(), workspace)
    assert sorted(workspace.root.rglob("*")) == before
    assert NAME not in finding.found + finding.what_to_do
    return finding


def test_an_empty_data_folder_is_waited_for(tmp_path: Path) -> None:
    """As the trainer does; phantoms need none."""
    finding = examined(Workspace(tmp_path / "none"))
    assert (finding.verdict, "waits for the first one" in finding.what_to_do) == (Verdict.WARN, True)
    assert examined(workspace_in(tmp_path)).verdict is Verdict.WARN
    phantoms = data(tiny_config(), workspace_in(tmp_path))
    assert (phantoms.verdict, phantoms.found) == (Verdict.PASS, "6 phantoms, made at the first start")


def test_one_scan_is_really_read(tmp_path: Path) -> None:
    """A readable one is; a single patient cannot be split into training and validation."""
    workspace = workspace_in(tmp_path)
    write_scan(workspace.data / f"{NAME}.nii.gz", 0)
    alone = examined(workspace)
    assert (alone.verdict, "a single patient" in alone.found) == (Verdict.FAIL, True)
    write_scan(workspace.data / "other.mha", 1)
    both = examined(workspace)
    assert (both.verdict, both.found) == (Verdict.PASS, "2 scans and 0 folders of DICOM files; one scan was read")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "truncated or damaged"),
        (lambda path: path.write_bytes(b"no scan"), "a scan: "),
    ],
)
def test_a_scan_that_cannot_be_read(tmp_path: Path, damage: object, reason: str) -> None:
    """The reason stands there, the name does not, and how to find out which one it is."""
    workspace = workspace_in(tmp_path)
    for index, name in enumerate((NAME, "zz_other")):
        write_scan(workspace.data / f"{name}.nii.gz", index)
    assert callable(damage)
    damage(workspace.data / f"{NAME}.nii.gz")
    finding = examined(workspace)
    assert (finding.verdict, reason in finding.found) == (Verdict.FAIL, True), finding.found
    assert "--show-names" in finding.what_to_do


def test_files_that_are_no_scans(tmp_path: Path) -> None:
    """Something is there, and nothing of it can be used."""
    workspace = workspace_in(tmp_path)
    (workspace.data / f"{NAME}.docx").write_text("a letter")
    finding = examined(workspace)
    assert (finding.verdict, "none is a usable CT" in finding.found) == (Verdict.FAIL, True)


def test_a_series_of_dicom_files(tmp_path: Path) -> None:
    """The first one is read; a broken one is a failure."""
    workspace = workspace_in(tmp_path)
    files = write_series(workspace.data / NAME, stored_values(0, (20, 16, 16)))
    good = examined(workspace)
    assert (good.verdict, "1 folders of DICOM files; one scan was read" in good.found) == (Verdict.PASS, True)
    for file in files[2:]:
        file.unlink()
    assert examined(workspace).verdict is Verdict.FAIL


def test_prepared_cases_are_enough(tmp_path: Path) -> None:
    """Without a data folder; every resolution of one of them is read, and a damaged array is found."""
    workspace = workspace_in(tmp_path)
    for index in range(3):
        write_scan(workspace.data / f"{NAME}_{index}.nii.gz", index)
    prepare(ct_config(), workspace, progress=False)
    for path in workspace.data.iterdir():
        path.unlink()
    good = examined(workspace)
    assert (good.verdict, good.found) == (
        Verdict.PASS,
        "3 prepared cases of 3 patients; one was read at every resolution",
    )
    for path in workspace.cache.glob("*/ct_16.npy"):
        path.write_bytes(b"")
    damaged = examined(workspace)
    assert (damaged.verdict, "ct_16.npy cannot be read" in damaged.found) == (Verdict.FAIL, True)
