"""Pseudonyms: a secret key that only its owner reads, and names that do not come back."""

import os
import stat

import pytest

from app.data.pseudonym import Pseudonyms, load_key, without_names
from app.errors import MachineError


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_key_is_for_its_owner_alone(tmp_path, umask):
    """Mode 600 under any umask, 32 bytes, the same at the second call."""
    path = tmp_path / "pseudonym.key"
    before = os.umask(umask)
    try:
        key = load_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) == 32
    assert load_key(path) == key
    assert os.listdir(tmp_path) == ["pseudonym.key"]  # noqa: PTH208


def test_a_key_that_others_may_read_is_closed(tmp_path):
    """A copy made without care."""
    path = tmp_path / "pseudonym.key"
    load_key(path)
    path.chmod(0o644)
    load_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_key_is_refused(tmp_path):
    """New pseudonyms for old patients would mix up the split."""
    path = tmp_path / "pseudonym.key"
    path.write_bytes(b"short")
    with pytest.raises(
        MachineError, match="should hold the 32 bytes of the pseudonyms' key, found 5: restore it from a"
    ):
        load_key(path)


def test_pseudonyms_depend_on_the_key_and_on_nothing_else():
    """Patients, cases and sources of one name differ from each other, and from those of another key."""
    one, other = Pseudonyms(b"1" * 32), Pseudonyms(b"2" * 32)
    assert one.patient("Doe") == Pseudonyms(b"1" * 32).patient("Doe")
    assert one.patient("Doe") != other.patient("Doe")
    assert len({one.patient("x")[1:], one.case("x", "")[1:], one.source("x")[1:13]}) == 3
    assert one.case("ab", "c") != one.case("a", "bc")
    assert one.key_id != other.key_id


def test_names_are_replaced_in_texts_as_whole_words():
    """Longest first, in any case, and never inside another word or number."""
    text = "/data/Doe/Doe.nii: 1 file of DOE, 11 slices, Doerr stays"
    assert without_names(text, ["Doe", "/data/Doe/Doe.nii", "1"], "p0") == "p0: p0 file of p0, 11 slices, Doerr stays"
