"""Preparing the data folder: what is found, what is refused and why, what is never read again, what never leaves."""

import gzip
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from app.data.cases import CaseStore, NothingUsable, PrepareReport, prepare, split_patients
from app.errors import DataError
from app.workspace import Workspace
from tests.dicom_files import PATIENT_ID, PATIENT_NAME, write_series
from tests.scans import (
    FIELD_OF_VIEW_MM,
    ct_config,
    file_times,
    reasons,
    refusals,
    workspace_in,
    write_scan,
)

NAMES = ("Doe_Jane", "Mueller", "Smith", PATIENT_ID, PATIENT_NAME, "Roe_Richard", "Poe", "visit_of_May")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Workspace, PrepareReport]:
    """A data folder with everything in it, prepared once, not to be changed."""
    workspace = workspace_in(tmp_path_factory.mktemp("mixed"))
    data = workspace.data
    hu = write_scan(data / "Doe_Jane.nii.gz", 0)
    write_scan(data / "clinic" / "Mueller" / "Mueller.nrrd", 1)
    write_scan(data / "clinic" / "Mueller" / "visit_of_May.mha", 2)
    write_scan(data / "Smith" / "first.mha", 3)
    write_scan(data / "Smith" / "second.nii", 4)
    stored = np.flip(write_scan(workspace.root / "scratch.nii", 5), 0)[::-1].astype(int) + 1024
    changes = {(0x10, 0x10): ("PN", PATIENT_NAME)}
    spacing = FIELD_OF_VIEW_MM / 48
    write_series(data / "pacs" / "x" / "y", stored, step_mm=spacing, pixel_spacing=(spacing,) * 2, changes=changes)
    write_series(data / "pacs" / "x" / "scout", stored[:3], series="1.2.3.5", study="1.2.9")
    shutil.copy(data / "Doe_Jane.nii.gz", data / "Roe_Richard.nii.gz")
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing([spacing] * 3)
    sitk.WriteImage(image, str(data / "Poe.mha"))
    whole = (data / "Doe_Jane.nii.gz").read_bytes()
    (data / "Cut_Off.nii.gz").write_bytes(whole[: len(whole) // 2])
    (data / "Away.nii.gz").symlink_to(workspace.root / "scratch.nii")
    (data / "Gone.nii.gz").symlink_to(data / "nowhere.nii.gz")
    os.mkfifo(data / "Pipe.nii.gz")
    (data / "notes.txt").write_text("about Doe_Jane")
    (data / "README.md").write_text("about Doe_Jane")
    (data / ".hidden.nii.gz").write_bytes(b"")
    (data / "empty").mkdir()
    return workspace, prepare(ct_config(), workspace)


def test_every_kind_of_source_is_found(mixed):
    """Files, patient folders at any depth, DICOM folders; one volume per patient folder where it is named so."""
    _, report = mixed
    assert sorted(entry.name.split("#")[0] for entry in report.accepted) == [
        "Doe_Jane.nii.gz",
        "Smith/first.mha",
        "Smith/second.nii",
        "clinic/Mueller/Mueller.nrrd",
        "pacs/x/y",
    ]
    notes = {entry.name: entry.record.notes for entry in report.accepted if entry.record}
    assert notes["clinic/Mueller/Mueller.nrrd"] == ("1 other volume files in its folder are not used",)


def test_scans_of_a_folder_are_scans_of_one_patient(mixed):
    """Five cases of four patients, under pseudonyms."""
    workspace, report = mixed
    cases = CaseStore.open(ct_config(), workspace).cases
    assert (len({case.id for case in cases}), len({case.patient for case in cases})) == (5, 4)
    assert all(len(case.id) == len(case.patient) == 13 for case in cases)
    assert all(case.id[0] == "c" and case.patient[0] == "p" for case in cases)
    assert report.summary() == "5 cases of 4 patients are ready (5 new), 9 refused"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Roe_Richard.nii.gz", "the same scan as case c"),
        ("Poe.mha", "the same scan as case c"),
        ("Cut_Off.nii.gz", "not a complete gzip file (truncated or damaged); copy it again"),
        ("Away.nii.gz", "found a link that leaves it; copy the data into the folder"),
        ("Gone.nii.gz", "a link to nothing"),
        ("Pipe.nii.gz", "neither a file nor a folder"),
        ("notes.txt", "not a CT volume: expected a volume file (.nii.gz, .nii, .nrrd, .mha, .npy)"),
        ("pacs/x/scout/0000", "3 files: only 3 slices, expected at least 16"),
        ("empty", "no CT in this folder: expected a volume file"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(mixed, name, reason):
    """Duplicates by file and by voxels, damage, links, other things."""
    assert reason in reasons(mixed[1])[name]


def test_hidden_files_and_readmes_are_not_mentioned(mixed):
    """They are nobody's mistake."""
    assert not [entry for entry in mixed[1].entries if "README" in entry.name or ".hidden" in entry.name]


def test_no_name_leaves_the_data_folder(mixed):
    """Neither bytes nor file names in cache and project folder, nor the table, hold a name, a path or an id."""
    workspace, report = mixed
    texts = [report.table().encode(), report.summary().encode(), repr(report).encode()]
    for folder in (workspace.cache, workspace.root / "hybrid_vit_cascade"):
        texts += [str(path.relative_to(folder)).encode() for path in folder.rglob("*")]
        texts += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    joined = b"\0".join(texts).lower()
    for name in (*NAMES, "cut_off", "1.2.3.4", str(workspace.data)):
        assert name.lower().encode() not in joined


def test_the_table_shows_names_on_request_only(mixed):
    """The user's own terminal may show which scan is which."""
    table = mixed[1].table(show_names=True)
    line = next(line for line in table.splitlines() if line.endswith("Doe_Jane.nii.gz"))
    assert "48x48x48, 8x8x8 mm" in line
    assert "accepted" in line


def test_logs_hold_no_names(mixed, tmp_path, caplog):
    """The same folder, prepared with the log open."""
    caplog.set_level("DEBUG")
    workspace = workspace_in(tmp_path)
    shutil.copy(mixed[0].data / "Doe_Jane.nii.gz", workspace.data / "Doe_Jane.nii.gz")
    shutil.copy(mixed[0].data / "Cut_Off.nii.gz", workspace.data / "Roe_Richard.nii.gz")
    prepare(ct_config(), workspace)
    assert "not a complete gzip file" in caplog.text
    assert not [name for name in NAMES if name in caplog.text]


def test_a_start_reads_nothing_again(mixed, tmp_path):
    """Files overwritten with zeros under their old time and size are not noticed: nobody looked inside."""
    workspace = workspace_in(tmp_path / "copy")
    shutil.copytree(mixed[0].cache, workspace.cache, dirs_exist_ok=True)
    shutil.copytree(mixed[0].root / "hybrid_vit_cascade", workspace.root / "hybrid_vit_cascade", dirs_exist_ok=True)
    for path in sorted(mixed[0].data.rglob("*")):
        target = workspace.data / path.relative_to(mixed[0].data)
        if path.is_file() and not path.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"\0" * path.stat().st_size)
            os.utime(target, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    before = file_times(workspace.cache)
    report = prepare(ct_config(), workspace)
    assert report.summary().startswith("5 cases of 4 patients are ready (0 new)")
    assert "the same scan as case c" in reasons(report)["Poe.mha"]
    assert file_times(workspace.cache) == before


def test_the_cache_alone_is_enough_to_train(mixed, tmp_path):
    """Copied without data and key: the same cases, the same arrays, the same split."""
    workspace = workspace_in(tmp_path)
    shutil.copytree(mixed[0].cache, workspace.cache, dirs_exist_ok=True)
    report = prepare(ct_config(), workspace)
    assert report.summary() == "5 cases of 4 patients are ready (0 new), 0 refused"
    assert not workspace.pseudonym_key.exists()
    stores = [CaseStore.open(ct_config(), each) for each in (mixed[0], workspace)]
    assert stores[0].cases == stores[1].cases
    case = stores[0].cases[0].id
    np.testing.assert_array_equal(stores[0].load(case, 32).hu, stores[1].load(case, 32).hu)
    splits = [split_patients(store, ct_config(), workspace.run_dir(str(n))) for n, store in enumerate(stores)]
    assert splits[0] == splits[1]


def test_new_scans_under_another_key_are_refused(mixed, tmp_path):
    """A patient of the cache could come in again as a stranger."""
    workspace = workspace_in(tmp_path)
    shutil.copytree(mixed[0].cache, workspace.cache, dirs_exist_ok=True)
    shutil.copy(mixed[0].data / "Doe_Jane.nii.gz", workspace.data / "Doe_Jane.nii.gz")
    assert "the cache was prepared with another pseudonym key than" in refusals(ct_config(), workspace)


@pytest.fixture
def single(tmp_path) -> Workspace:
    """A workspace with one prepared scan, Doe_Jane.nii."""
    workspace = workspace_in(tmp_path)
    write_scan(workspace.data / "Doe_Jane.nii", 0)
    prepare(ct_config(), workspace)
    return workspace


def test_a_touched_file_is_not_prepared_again(single):
    """Another time, the same bytes."""
    before = file_times(single.cache)
    os.utime(single.data / "Doe_Jane.nii", ns=(1, 1))
    assert prepare(ct_config(), single).summary().endswith("(0 new), 0 refused")
    assert file_times(single.cache) == before


def test_a_replaced_file_replaces_its_case(single):
    """The old scan is not trained on any more."""
    (old,) = CaseStore.open(ct_config(), single).cases
    write_scan(single.data / "Doe_Jane.nii", 1)
    prepare(ct_config(), single)
    (new,) = CaseStore.open(ct_config(), single).cases
    assert (old.id != new.id, old.patient == new.patient) == (True, True)
    assert not list(single.cache.glob(f"{old.id}-*"))


def test_a_renamed_file_moves_its_case(single):
    """No duplicate of a file that is gone; the patient is the new name's."""
    (old,) = CaseStore.open(ct_config(), single).cases
    (single.data / "Doe_Jane.nii").rename(single.data / "Smith.nii")
    report = prepare(ct_config(), single)
    (new,) = CaseStore.open(ct_config(), single).cases
    assert report.summary() == "1 cases of 1 patients are ready (1 new), 0 refused"
    assert (old.content == new.content, old.patient != new.patient) == (True, True)


def test_other_limits_are_another_chance(single):
    """A scan refused by one limit is read again under another; one accepted is judged by its remembered figures."""
    assert "lungs fill" in refusals(ct_config("data.min_lung_fraction=0.9"), single)
    write_scan(single.data / "Smith.nii", 1)
    assert len(prepare(ct_config("data.min_lung_fraction=0.9", "data.min_lung_fraction=0.01"), single).accepted) == 2
    with pytest.raises(DataError, match="no prepared case"):
        CaseStore.open(ct_config("data.min_lung_fraction=0.9"), single)


def test_a_scan_that_is_no_thorax_is_refused_with_figures(tmp_path):
    """A ball of water, and a scan of a corner of the cube."""
    workspace = workspace_in(tmp_path)
    z, y, x = np.indices((40, 40, 40)) - 19.5
    ball = np.where(z**2 + y**2 + x**2 < 15**2, 40, -1000).astype(np.int16)
    for name, spacing in (("ball.mha", 8.0), ("small.mha", 3.0)):
        image = sitk.GetImageFromArray(ball)
        image.SetSpacing([spacing] * 3)
        sitk.WriteImage(image, str(workspace.data / name))
    with pytest.raises(NothingUsable) as caught:
        prepare(ct_config(), workspace)
    message = str(caught.value)
    assert "ball.mha" in caught.value.report.table(show_names=True)
    assert "ball.mha" not in message + caught.value.report.table()
    assert message.startswith(f"none of the 2 scans in {workspace.data} can be used:\n  s")
    assert "not a thorax: lungs fill 0.0% of the body, at least 3.0% is needed (data.min_lung_fraction)" in message
    assert "the scan covers 3% of the field of view of 384 mm, at least 30% is needed (data.min_coverage)" in message
    assert "`python -m app prepare --show-names` says which is which" in message


def test_a_gzip_bomb_is_refused(tmp_path):
    """A few KB that expand beyond the limit."""
    workspace = workspace_in(tmp_path)
    write_scan(workspace.root / "whole.nii", 0)
    (workspace.data / "bomb.nii.gz").write_bytes(
        gzip.compress((workspace.root / "whole.nii").read_bytes() + b"\0" * 20_000_000)
    )
    assert "expands to more than 0.01 GiB, the limit data.max_file_gib" in refusals(
        ct_config("data.max_file_gib=0.01"), workspace
    )


def test_no_data_at_all_says_what_to_do(tmp_path):
    """An empty folder, and one that does not exist."""
    workspace = workspace_in(tmp_path)
    assert refusals(ct_config(), workspace).startswith(f"no CT found in {workspace.data}: expected a volume file (")
    missing = ct_config(f"data.path={tmp_path / 'missing'}")
    assert refusals(missing, workspace).startswith(f"no CT found in {tmp_path / 'missing'}: expected a volume file (")
