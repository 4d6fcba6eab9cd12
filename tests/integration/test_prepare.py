"""Preparing with real scans, and with a real kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from app.data.cases import CaseStore, prepare, split_patients
from app.workspace import Workspace
from tests.scans import ct_config, write_scan

ROOT = Path(__file__).resolve().parents[2]
SCANS = 6


def test_the_real_scans_are_accepted_and_refused_as_they_should_be(ct_dir, tmp_path):
    """Four thoraces in, the abdomen and the lung crop out; a second call reads nothing; the split works."""
    config, workspace = ct_config(f"data.path={ct_dir}"), Workspace(tmp_path)
    report = prepare(config, workspace)
    assert sorted(entry.name for entry in report.accepted) == [
        "thorax_lidc_idri_0001.nii.gz",
        "thorax_pyradiomics_lung1.nrrd",
        "thorax_pyradiomics_lung2.nrrd",
        "thorax_totalsegmentator_aorta.nii.gz",
    ]
    reasons = {entry.name: str(entry.reason) for entry in report.refused}
    assert "not a thorax: lungs fill 0." in reasons.pop("abdomen_totalsegmentator_example.nii.gz")
    assert "the scan covers 19% of the field of view" in reasons.pop("lung_elastix.mha")
    assert not reasons
    for record in (entry.record for entry in report.accepted):
        assert record is not None
        assert record.lung_fraction is not None
        assert record.lung_fraction > 0.15
    started = time.monotonic()
    assert prepare(config, workspace).summary() == "4 cases of 4 patients are ready (0 new), 2 refused"
    assert time.monotonic() - started < 1
    store = CaseStore.open(config, workspace)
    split = split_patients(store, config, workspace.run_dir(None))
    assert (len(split.train), len(split.val)) == (3, 1)
    assert 4 < store.load(split.val[0], 32).xrays.max() < 12


def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    """SIGKILL after the second case: finished cases keep their very files, the rest follows, no remains are used."""
    config, workspace = ct_config(), Workspace(tmp_path)
    workspace.ensure()
    for index in range(SCANS):
        write_scan(workspace.data / f"patient{index}.nii.gz", index)
    code = (
        "import sys; from pathlib import Path; from app.data.cases import prepare; "
        "from app.workspace import Workspace; from tests.scans import ct_config; "
        "prepare(ct_config(), Workspace(Path(sys.argv[1])))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(list(workspace.cache.glob("c*/case.json"))) < 2:
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    before = {path: path.stat().st_mtime_ns for path in workspace.cache.glob("c*/*.npy")}
    finished = len({path.parent for path in before})
    assert 2 <= finished < SCANS
    report = prepare(config, workspace)
    assert report.summary() == f"{SCANS} cases of {SCANS} patients are ready ({SCANS - finished} new), 0 refused"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(CaseStore.open(config, workspace).cases) == SCANS
