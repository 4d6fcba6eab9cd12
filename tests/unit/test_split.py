"""The split: by patient, the same everywhere, frozen with the run."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.config import Config
from app.data.split import Case, split_patients
from app.errors import CheckpointError, DataError
from app.workspace import RunDir, Workspace
from tests.conftest import tiny_config


@dataclass(frozen=True)
class Store:
    """Cases without files."""

    cases: tuple[Case, ...]
    preparation_key: str = "key1"


def cases_of(scans: dict[str, list[str]], prefix: str = "c") -> tuple[Case, ...]:
    """Cases from patient -> contents."""
    return tuple(
        Case(f"{prefix}-{content}", f"{prefix}-{patient}", content)
        for patient, contents in scans.items()
        for content in contents
    )


PATIENTS = {f"p{n}": [f"scan{n}"] for n in range(10)} | {"twice": ["a", "b"], "thrice": ["x", "y", "z"]}


def config(*overrides: str) -> Config:
    """A quarter of the patients is held out."""
    return tiny_config("data.validation_fraction=0.25", *overrides)


def run_dir(tmp_path: Path, name: str = "run") -> RunDir:
    """The folder of a run."""
    return Workspace(tmp_path).run_dir(name)


def test_all_scans_of_a_patient_are_on_one_side(tmp_path):
    """Over many seeds; and each side has its share of the patients."""
    for seed in range(20):
        split = split_patients(Store(cases_of(PATIENTS)), config(f"seed={seed}"), run_dir(tmp_path, f"s{seed}"))
        sides = [
            {next(p for p, own in PATIENTS.items() if c[2:] in own) for c in ids} for ids in (split.train, split.val)
        ]
        assert not sides[0] & sides[1]
        assert [len(side) for side in sides] == [9, 3]


def test_the_split_depends_on_contents_and_seed_alone(tmp_path):
    """Other pseudonyms and another order of the cases change nothing; another seed does."""
    first = split_patients(Store(cases_of(PATIENTS)), config(), run_dir(tmp_path, "a"))
    renamed = split_patients(Store(cases_of(PATIENTS, "k")[::-1]), config(), run_dir(tmp_path, "b"))
    assert [case[2:] for case in first.val] == [case[2:] for case in renamed.val]
    assert [case[2:] for case in first.train] == [case[2:] for case in renamed.train]
    assert first.fingerprint == renamed.fingerprint
    others = {
        split_patients(Store(cases_of(PATIENTS)), config(f"seed={s}"), run_dir(tmp_path, f"{s}")).val for s in range(9)
    }
    assert len(others) > 3


def test_at_least_one_patient_on_each_side(tmp_path):
    """Two patients are one and one, whatever the share."""
    two = Store(cases_of({"p1": ["a"], "p2": ["b"]}))
    for share in (0.01, 0.99):
        split = split_patients(
            two, config(f"data.validation_fraction={share}"), run_dir(tmp_path, str(int(share * 100)))
        )
        assert (len(split.train), len(split.val)) == (1, 1)


def test_one_patient_is_too_few(tmp_path):
    """Two scans of one patient cannot be split."""
    with pytest.raises(
        DataError, match="at least two patients are needed, one to train and one to validate: found 1 with 2"
    ):
        split_patients(Store(cases_of({"p": ["a", "b"]})), config(), run_dir(tmp_path))


def test_the_split_is_frozen(tmp_path):
    """A later call with another share and seed gives the first split again."""
    store = Store(cases_of(PATIENTS))
    first = split_patients(store, config(), run_dir(tmp_path))
    again = split_patients(store, tiny_config("data.validation_fraction=0.6", "seed=9"), run_dir(tmp_path))
    assert again == first


def test_a_cache_made_again_keeps_the_split(tmp_path):
    """New pseudonyms for the same contents: the same sides under the new ids."""
    first = split_patients(Store(cases_of(PATIENTS)), config(), run_dir(tmp_path))
    again = split_patients(Store(cases_of(PATIENTS, "k")), config(), run_dir(tmp_path))
    assert again.val == tuple("k" + case[1:] for case in first.val)
    assert again.fingerprint == first.fingerprint


def test_a_changed_set_of_cases_is_refused(tmp_path):
    """With the numbers of what came and went, and the way out."""
    split_patients(Store(cases_of(PATIENTS)), config(), run_dir(tmp_path))
    changed = {key: value for key, value in PATIENTS.items() if key != "thrice"} | {"new": ["n"]}
    with pytest.raises(
        CheckpointError, match=r"1 added, 3 removed since it began .*start a new run with another run_name"
    ):
        split_patients(Store(cases_of(changed)), config(), run_dir(tmp_path))


def test_other_preparation_is_refused(tmp_path):
    """The same scans cut into other cubes are other data."""
    split_patients(Store(cases_of(PATIENTS)), config(), run_dir(tmp_path))
    with pytest.raises(
        CheckpointError, match="prepared with other settings than those of this run: key key2, expected key1"
    ):
        split_patients(Store(cases_of(PATIENTS), "key2"), config(), run_dir(tmp_path))


def test_the_fingerprint_covers_sides_contents_and_preparation(tmp_path):
    """Any of them changes it."""
    prints = [
        split_patients(Store(cases_of(PATIENTS)), config(), run_dir(tmp_path, "a")).fingerprint,
        split_patients(Store(cases_of(PATIENTS)), config("seed=1"), run_dir(tmp_path, "b")).fingerprint,
        split_patients(Store(cases_of(PATIENTS), "key2"), config(), run_dir(tmp_path, "c")).fingerprint,
        split_patients(Store(cases_of(PATIENTS | {"q": ["q"]})), config(), run_dir(tmp_path, "d")).fingerprint,
    ]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("damage", ["", "{}", "[]", "swap"])
def test_a_damaged_split_is_refused(tmp_path, damage):
    """Empty, without its keys, or with two sides exchanged by hand."""
    run = run_dir(tmp_path)
    split_patients(Store(cases_of(PATIENTS)), config(), run)
    document = json.loads(run.split.read_text())
    document["train"], document["val"] = document["val"], document["train"]
    run.split.write_text(json.dumps(document) if damage == "swap" else damage)
    with pytest.raises(
        CheckpointError, match=r"the frozen split .*split.json cannot be used: .*Restore it from a copy"
    ):
        split_patients(Store(cases_of(PATIENTS)), config(), run)
