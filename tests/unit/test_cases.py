"""The cache of prepared cases, with phantoms: what is in it, what is never written again, what damage says."""

import numpy as np
import pytest

from app.data.cache import Cache, preparation_key
from app.data.cases import CaseStore, prepare, split_patients
from app.data.pooling import pool
from app.errors import DataError, Stopped
from app.workspace import Workspace
from tests.conftest import tiny_config
from tests.scans import file_times, workspace_in


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Workspace:
    """A workspace with the phantoms of the tiny cascade, not to be changed."""
    workspace = workspace_in(tmp_path_factory.mktemp("phantoms"))
    prepare(tiny_config(), workspace)
    return workspace


def test_a_loaded_case_has_the_stage_s_cube_and_radiographs(phantoms):
    """int16 HU in the window and float32 line integrals, in memory that may be written to."""
    store = CaseStore.open(tiny_config(), phantoms)
    assert len(store.cases) == 6
    for edge in (8, 16, 32):
        loaded = store.load(store.cases[0].id, edge)
        assert (loaded.hu.shape, loaded.hu.dtype) == ((edge,) * 3, np.int16)
        assert (loaded.xrays.shape, loaded.xrays.dtype) == ((2, edge, edge), np.float32)
        assert loaded.hu.flags.writeable
        assert -1000 <= loaded.hu.min() < loaded.hu.max() <= 1500
        assert 1 < loaded.xrays.max() < 12


def test_coarse_stages_are_averages_of_the_finest(phantoms):
    """Cubes to the rounding of HU, radiographs to that of float32."""
    store = CaseStore.open(tiny_config(), phantoms)
    fine, coarse = (store.load(store.cases[2].id, edge) for edge in (32, 8))
    assert np.abs(pool(fine.hu.astype(np.float32), 4, 3) - coarse.hu).max() <= 0.5
    np.testing.assert_allclose(pool(fine.xrays, 4, 2), coarse.xrays, rtol=1e-5)


def test_preparing_again_writes_nothing(phantoms):
    """The same arrays, untouched."""
    before = file_times(phantoms.cache)
    report = prepare(tiny_config(), phantoms)
    assert file_times(phantoms.cache) == before
    assert report.summary() == "6 cases of 6 patients are ready (0 new), 0 refused"


def test_more_phantoms_are_added_and_fewer_are_left_out(tmp_path):
    """The count chooses among the prepared ones."""
    workspace = workspace_in(tmp_path)
    prepare(tiny_config("data.phantoms.count=2"), workspace)
    before = file_times(workspace.cache)
    prepare(tiny_config("data.phantoms.count=3"), workspace)
    assert before.items() <= file_times(workspace.cache).items()
    counts = [len(CaseStore.open(tiny_config(f"data.phantoms.count={n}"), workspace).cases) for n in (2, 3)]
    assert counts == [2, 3]


def test_phantoms_are_split_alike_in_every_workspace(phantoms, tmp_path):
    """Ids and split do not depend on the machine or its secret key."""
    other = workspace_in(tmp_path)
    config = tiny_config("data.phantoms.count=3")
    prepare(config, other)
    splits = [
        split_patients(CaseStore.open(config, workspace), config, workspace.run_dir("a"))
        for workspace in (phantoms, other)
    ]
    assert splits[0] == splits[1]
    assert (len(splits[0].train), len(splits[0].val)) == (2, 1)


@pytest.mark.parametrize(
    "change",
    [
        "data.field_of_view_mm=300",
        "data.hu_window=[-1000, 1000]",
        "data.phantoms.seed=4",
        "geometry.preset=c_arm",
        "geometry.detector_mm=700",
        "data.source=ct",
    ],
)
def test_what_shapes_the_arrays_changes_the_key(change):
    """Another setting never meets these arrays."""
    assert preparation_key(tiny_config(change)) != preparation_key(tiny_config())


def test_what_does_not_shape_the_arrays_keeps_the_key():
    """Limits, seeds of the run and counts choose among prepared cases."""
    changes = ("seed=5", "data.min_coverage=0.9", "data.phantoms.count=9", "data.validation_fraction=0.5")
    assert preparation_key(tiny_config(*changes)) == preparation_key(tiny_config())


def test_stopping_keeps_what_is_finished(tmp_path):
    """Stopped after two cases: they stay, and the next call makes the rest."""
    workspace, polls = workspace_in(tmp_path), iter([False, False, True])
    with pytest.raises(Stopped, match="finished cases are kept and the next start goes on"):
        prepare(tiny_config("data.phantoms.count=3"), workspace, stop=lambda: next(polls))
    before = file_times(workspace.cache)
    assert len(before) == 12
    assert prepare(tiny_config("data.phantoms.count=3"), workspace).summary().endswith("are ready (1 new), 0 refused")
    assert before.items() <= file_times(workspace.cache).items()


def test_a_lost_index_is_made_from_the_cases(tmp_path):
    """Without rendering anything again."""
    workspace = workspace_in(tmp_path)
    prepare(tiny_config("data.phantoms.count=2"), workspace)
    before = file_times(workspace.cache)
    Cache(workspace.cache, tiny_config("data.phantoms.count=2")).index_path.unlink()
    assert prepare(tiny_config("data.phantoms.count=2"), workspace).summary().endswith("are ready (0 new), 0 refused")
    assert file_times(workspace.cache) == before


def test_a_damaged_index_is_an_error_with_a_way_out(tmp_path):
    """Truncated in the middle."""
    workspace = workspace_in(tmp_path)
    prepare(tiny_config("data.phantoms.count=2"), workspace)
    path = Cache(workspace.cache, tiny_config()).index_path
    path.write_bytes(path.read_bytes()[:99])
    message = "the index of the cache cannot be read: .*Delete this file and start again: it is made anew"
    with pytest.raises(DataError, match=message):
        CaseStore.open(tiny_config(), workspace)


def test_a_case_with_a_missing_file_is_prepared_again(tmp_path):
    """It alone."""
    workspace = workspace_in(tmp_path)
    prepare(tiny_config("data.phantoms.count=2"), workspace)
    next(workspace.cache.glob("*/xray_16.npy")).unlink()
    assert prepare(tiny_config("data.phantoms.count=2"), workspace).summary().endswith("are ready (1 new), 0 refused")


@pytest.mark.parametrize(("keep", "words"), [(200, "cannot be read"), (0, "cannot be read"), (None, "expected int16")])
def test_a_damaged_array_is_an_error_with_a_way_out(tmp_path, keep, words):
    """Truncated, empty, or of another shape."""
    workspace = workspace_in(tmp_path)
    prepare(tiny_config("data.phantoms.count=2"), workspace)
    store = CaseStore.open(tiny_config("data.phantoms.count=2"), workspace)
    path = workspace.cache / f"{store.cases[0].id}-{store.preparation_key}" / "ct_16.npy"
    if keep is None:
        np.save(path, np.zeros((4, 4, 4), np.int16))
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        DataError, match=f"prepared file .*{words}.*delete the folder .* and run `python -m app prepare`"
    ):
        store.load(store.cases[0].id, 16)


def test_opening_an_empty_cache_says_what_to_do(tmp_path):
    """Before anything was prepared."""
    with pytest.raises(
        DataError, match=r"no prepared case in .*: run `python -m app prepare` with the same config first"
    ):
        CaseStore.open(tiny_config(), workspace_in(tmp_path))
