"""Checkpoint files: written whole, verified by content, damaged ones set aside with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import CheckpointError
from app.train.checkpoint import CheckpointFolder, Counters, kinds_at_epoch_end
from app.train.ema import tensors_hash
from app.train.listing import list_checkpoints
from app.train.resume import set_newest_aside
from app.workspace import RunDir, remove_temporary_files

STAGE = "stage_64"


def payload(step: int, epochs: int = 0) -> dict[str, Any]:
    """A small checkpoint with all keys."""
    return {
        "model_state_dict": {"weight": torch.full((256, 256), float(step))},
        "optimizer_state_dict": {},
        "scaler_state_dict": {"scale": 1.0},
        "epoch": epochs - 1,
        "val_loss": 0.5,
        "config": {},
        "resume": {"format": 1, "stage": STAGE, "step": step},
    }


def save(folder: CheckpointFolder, step: int, *kinds: str, epochs: int = 0) -> None:
    """Publish a state under some kinds."""
    folder.publish(STAGE, kinds or ("last",), payload(step, epochs), Counters(epochs, step))


def newest_step(folder: CheckpointFolder) -> int:
    """The step that would be resumed from."""
    found = folder.newest(STAGE)
    assert found is not None
    step: int = found[1]["resume"]["step"]
    return step


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """An empty run."""
    return CheckpointFolder(RunDir(tmp_path))


def test_a_published_file_is_a_plain_torch_file(folder: CheckpointFolder) -> None:
    """It loads with weights_only=True, and its sha256 stands in a committed manifest line."""
    save(folder, 7)
    path = folder.run_dir.checkpoint(STAGE, "last")
    assert torch.load(path, weights_only=True)["resume"]["step"] == 7
    lines = [json.loads(line) for line in folder.run_dir.manifest.read_text().splitlines()]
    assert [line["state"] for line in lines] == ["pending", "committed"]
    assert lines[0]["sha256"] == lines[1]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_furthest_state_wins_whatever_the_file_times_say(folder: CheckpointFolder) -> None:
    """Counters decide, not mtime: the older file is touched last and is not chosen."""
    save(folder, 10, "epoch_1", epochs=1)
    save(folder, 12, epochs=1)
    os.utime(folder.run_dir.checkpoint(STAGE, "epoch_1"), (2e9, 2e9))
    assert newest_step(folder) == 12


def test_the_last_state_but_one_stays(folder: CheckpointFolder) -> None:
    """A rolling save keeps its predecessor, so that one damaged file costs one interval."""
    save(folder, 1)
    save(folder, 2)
    folder.run_dir.checkpoint(STAGE, "last").write_bytes(b"")
    assert newest_step(folder) == 1


def flip_a_bit(path: Path) -> None:
    """In the middle of the tensor data."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """As a write without rename leaves it."""
    path.write_bytes(path.read_bytes()[:-1000])


def hole(path: Path) -> None:
    """As a lost block leaves it."""
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 65536] = bytes(65536)
    path.write_bytes(data)


def empty(path: Path) -> None:
    """As a lost inode leaves it."""
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    """Not a zip file at all."""
    path.write_bytes(os.urandom(300_000))


@pytest.mark.parametrize("manifest", ["kept", "lost"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, hole, empty, garbage])
def test_a_damaged_file_is_set_aside_and_the_one_before_is_taken(
    folder: CheckpointFolder, damage: Callable[[Path], None], manifest: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the manifest by sha256, without it by the CRCs of the file's own records."""
    save(folder, 5, "epoch_1", epochs=1)
    save(folder, 9, epochs=1)
    damage(folder.run_dir.checkpoint(STAGE, "last"))
    if manifest == "lost":
        folder.run_dir.manifest.unlink()
    assert newest_step(folder) == 5
    (kept,) = folder.run_dir.quarantine.glob("*_last.pt")
    assert kept.with_suffix(".txt").read_text().strip()
    assert "stage_64_last.pt is damaged and was moved to quarantine" in caplog.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(empty, "the file is empty"), (flip_a_bit, "its content is not what was written"), (truncate, "sha256")],
)
def test_the_reason_says_what_is_wrong(folder: CheckpointFolder, damage: Callable[[Path], None], reason: str) -> None:
    """The text beside a file in quarantine."""
    save(folder, 1)
    damage(folder.run_dir.checkpoint(STAGE, "last"))
    assert folder.newest(STAGE) is None
    (text,) = folder.run_dir.quarantine.glob("*.txt")
    assert reason in text.read_text()


def test_a_kill_between_rename_and_the_last_line_loses_nothing(folder: CheckpointFolder) -> None:
    """The pending line already knows the content."""
    save(folder, 1)
    save(folder, 2)
    lines = folder.run_dir.manifest.read_text().splitlines(keepends=True)
    folder.run_dir.manifest.write_text("".join(lines[:-1]))
    assert newest_step(folder) == 2


def test_a_torn_manifest_line_is_skipped_and_the_next_line_is_whole(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A kill in the middle of a line: reading goes on, and the next append starts on a line of its own."""
    save(folder, 1)
    with folder.run_dir.manifest.open("a") as file:
        file.write('{"file": "stage_64_la')
    save(folder, 2)
    assert newest_step(folder) == 2
    assert "manifest.jsonl:3 is torn and was skipped" in caplog.text


def test_a_lost_manifest_is_no_loss(folder: CheckpointFolder) -> None:
    """Whole files are found by their own CRCs and counters."""
    save(folder, 3, "epoch_1", epochs=1)
    save(folder, 4, epochs=1)
    folder.run_dir.manifest.unlink()
    assert newest_step(folder) == 4


def test_only_files_that_no_line_knows_are_entered_again(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The last state but one has the line of the time when it was the last; a copied-in file has none."""
    for step in (1, 2, 3):
        save(folder, step)
    before = folder.run_dir.manifest.read_bytes()
    folder.recover_manifest()
    assert (folder.run_dir.manifest.read_bytes(), caplog.messages) == (before, [])
    best = folder.run_dir.checkpoint(STAGE, "best")
    shutil.copyfile(folder.run_dir.checkpoint(STAGE, "last_previous"), best)
    folder.recover_manifest()
    assert caplog.messages == [f"{best.name} has lost its line in manifest.jsonl: it is whole and was entered again"]
    line = json.loads(folder.run_dir.manifest.read_text().splitlines()[-1])
    assert (line["file"], line["step"], line["state"]) == (best.name, 2, "found")


def test_a_pickle_that_would_run_code_is_refused(folder: CheckpointFolder, tmp_path: Path) -> None:
    """Only tensors and plain values are ever read; the code does not run and the file is set aside."""
    victim = tmp_path / "ran"

    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (victim,))

    torch.save({"model_state_dict": Malice()}, folder.run_dir.checkpoint(STAGE, "last"))
    assert folder.newest(STAGE) is None
    assert not victim.exists()
    (text,) = folder.run_dir.quarantine.glob("*.txt")
    assert "cannot be read as tensors and plain values" in text.read_text()


def test_an_old_style_pickle_is_refused(folder: CheckpointFolder) -> None:
    """A bare pickle is not a checkpoint."""
    folder.run_dir.checkpoint(STAGE, "last").write_bytes(pickle.dumps(payload(1)))
    assert folder.newest(STAGE) is None


def test_a_foreign_torch_file_is_named_with_what_it_lacks(folder: CheckpointFolder) -> None:
    """A bare state_dict has not the seed's keys."""
    torch.save({"weight": torch.zeros(2)}, folder.run_dir.checkpoint(STAGE, "last"))
    (entry,) = folder.entries()
    with pytest.raises(CheckpointError, match="not a checkpoint of this program, it lacks model_state_dict, optim"):
        folder.load(entry)


def test_another_format_is_refused_and_left_where_it_is(folder: CheckpointFolder) -> None:
    """A file of a newer program is not damaged: it must not be moved."""
    newer = payload(1)
    newer["resume"]["format"] = 2
    folder.publish(STAGE, ["last"], newer, Counters(0, 1))
    with pytest.raises(CheckpointError, match="written in format 2, expected 1; use the version of the program"):
        folder.newest(STAGE)
    assert folder.run_dir.checkpoint(STAGE, "last").exists()


def test_a_failed_write_leaves_the_old_file(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space: the error surfaces, the older state is whole, no temporary file stays."""
    save(folder, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 2)
    assert newest_step(folder) == 1
    assert not list(folder.run_dir.path.glob(".*"))


def test_retention_keeps_the_newest_periodic_files_only(folder: CheckpointFolder) -> None:
    """keep_last_n_checkpoints counts `_epoch_{N}.pt`; best, final and last never go."""
    for epochs in range(1, 12):
        save(folder, epochs * 10, "last", "best", f"epoch_{epochs}", epochs=epochs)
    save(folder, 110, "final", epochs=11)
    folder.retain(STAGE, 2)
    kinds = {entry.kind for entry in folder.entries()}
    assert kinds == {"last", "last_previous", "best", "final", "epoch_10", "epoch_11"}
    folder.retain(STAGE, None)
    assert {entry.kind for entry in folder.entries()} == kinds


def test_leftovers_of_a_killed_writer_are_removed(folder: CheckpointFolder) -> None:
    """Temporary files only; nothing that a user put there."""
    torn = folder.run_dir.path / ".stage_64_last.pt.0123abcd.tmp"
    mine = folder.run_dir.path / ".notes.tmp"
    torn.touch()
    mine.touch()
    remove_temporary_files(folder.run_dir.path)
    assert not torn.exists()
    assert mine.exists()


def test_the_table_names_damaged_files_and_the_resume_point_and_moves_nothing(folder: CheckpointFolder) -> None:
    """`checkpoints` is a question, not a repair."""
    save(folder, 5, "epoch_1", epochs=1)
    save(folder, 9, epochs=1)
    flip_a_bit(folder.run_dir.checkpoint(STAGE, "last"))
    listing = list_checkpoints(folder.run_dir)
    text, found = listing.table(), json.loads(listing.as_json())
    assert found["resume_point"] == "stage_64_epoch_1.pt"
    last, earlier = found["files"]
    assert (last["file"], earlier["file"], earlier["damage"]) == ("stage_64_last.pt", "stage_64_epoch_1.pt", None)
    assert last["damage"].startswith("its content is not what was written")
    assert "stage_64_last.pt" in text
    assert "DAMAGED: its content is not what was written" in text
    assert "resume point: stage_64_epoch_1.pt (stage_64, epoch 1, step 5)" in text
    assert folder.run_dir.checkpoint(STAGE, "last").exists()


def test_an_empty_run_has_no_checkpoints(folder: CheckpointFolder) -> None:
    """Said in words, with the folder's name."""
    listing = list_checkpoints(folder.run_dir)
    assert listing.resume_point is None
    assert json.loads(listing.as_json()) == {"files": [], "resume_point": None}
    assert listing.table() == f"no checkpoints in {folder.run_dir.path}"


def test_files_of_an_epoch_end() -> None:
    """Every 5th epoch, the best and the last epoch have files of their own; the rolling one is always first."""
    assert kinds_at_epoch_end(4, 20, 5, is_best=False) == ["last"]
    assert kinds_at_epoch_end(5, 20, 5, is_best=True) == ["last", "best", "epoch_5"]
    assert kinds_at_epoch_end(20, 20, 5, is_best=False) == ["last", "epoch_20", "final"]


def test_the_hash_of_tensors_sees_names_types_shapes_and_values() -> None:
    """Equal content has an equal hash, whatever the order; anything else has not."""
    a, b = torch.arange(6.0), torch.ones(2)
    same = tensors_hash({"a": a, "b": b})
    assert tensors_hash({"b": b.clone(), "a": a.clone()}) == same
    others = [{"a": a, "c": b}, {"a": a.double(), "b": b}, {"a": a.reshape(2, 3), "b": b}, {"a": a + 1e-7, "b": b}]
    assert same not in {tensors_hash(other) for other in others}


def test_checkpoints_are_readable_by_the_group_as_the_umask_says(folder: CheckpointFolder) -> None:
    """A checkpoint written by root in a container is not mode 600: the user at the desk reads it."""
    save(folder, 1)
    mode = stat.S_IMODE(folder.run_dir.checkpoint(STAGE, "last").stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def kinds_left(folder: CheckpointFolder) -> set[str]:
    """What is not in quarantine."""
    return {path.stem for _, _, path in folder.run_dir.checkpoints()}


def test_falling_back_sets_all_files_of_the_furthest_state_aside(folder: CheckpointFolder) -> None:
    """At the end of an epoch there are several; one that stayed would be the furthest again."""
    save(folder, 5, "last", "epoch_1", epochs=1)
    save(folder, 9, epochs=1)
    save(folder, 10, "last", "best", "epoch_2", epochs=2)
    older = set_newest_aside(folder, [STAGE, "stage_128"], "set aside for a reason")
    assert older is not None
    assert older.path.name == "stage_64_last_previous.pt"
    assert kinds_left(folder) == {"stage_64_last_previous", "stage_64_epoch_1"}
    assert newest_step(folder) == 9
    kept = sorted(folder.run_dir.quarantine.glob("*.pt"))
    assert [path.name.partition("_")[2] for path in kept] == [
        f"stage_64_{kind}.pt" for kind in ("best", "epoch_2", "last")
    ]
    assert {path.with_suffix(".txt").read_text() for path in kept} == {"set aside for a reason\n"}
    save(folder, 10, "last", "best", "epoch_2", epochs=2)
    assert newest_step(folder) == 10


def test_falling_back_passes_over_a_damaged_older_file(folder: CheckpointFolder) -> None:
    """It is checked before anything is moved."""
    save(folder, 5, "epoch_1", epochs=1)
    save(folder, 8, epochs=1)
    save(folder, 9, epochs=1)
    flip_a_bit(folder.run_dir.checkpoint(STAGE, "last_previous"))
    older = set_newest_aside(folder, [STAGE], "why")
    assert older is not None
    assert older.kind == "epoch_1"
    assert newest_step(folder) == 5


@pytest.mark.parametrize("older", ["none", "damaged"])
def test_the_only_state_is_not_set_aside(folder: CheckpointFolder, older: str) -> None:
    """A run that was left without a state would be refused; nothing is moved."""
    if older == "damaged":
        save(folder, 1)
    save(folder, 2)
    if older == "damaged":
        flip_a_bit(folder.run_dir.checkpoint(STAGE, "last_previous"))
    before = kinds_left(folder)
    assert set_newest_aside(folder, [STAGE], "why") is None
    assert kinds_left(folder) == before
    assert newest_step(folder) == 2


def test_a_finished_stage_is_not_set_aside(folder: CheckpointFolder) -> None:
    """The next stage is trained on it."""
    save(folder, 9, epochs=1)
    save(folder, 10, "last", "best", "final", epochs=2)
    before = kinds_left(folder)
    assert set_newest_aside(folder, [STAGE, "stage_128"], "why") is None
    assert kinds_left(folder) == before


@pytest.mark.parametrize("parent", ["whole", "damaged"])
def test_the_first_state_of_a_stage_falls_back_to_the_end_of_the_one_before(
    folder: CheckpointFolder, parent: str
) -> None:
    """Where that is whole, the stage begins anew; the finished stage keeps its files."""
    save(folder, 10, "last", "best", "final", epochs=2)
    if parent == "damaged":
        flip_a_bit(folder.run_dir.checkpoint(STAGE, "final"))
    folder.publish("stage_128", ["last"], payload(0), Counters(0, 0))
    older = set_newest_aside(folder, [STAGE, "stage_128"], "why")
    finished = {f"stage_64_{kind}" for kind in ("last", "best", "final")}
    if parent == "whole":
        assert older is not None
        assert older.path.name == "stage_64_final.pt"
        assert kinds_left(folder) == finished
    else:
        assert older is None
        assert kinds_left(folder) == finished | {"stage_128_last"}


def test_a_run_without_checkpoints_has_nothing_to_set_aside(folder: CheckpointFolder) -> None:
    """And leaves no trace, so that it may start."""
    assert set_newest_aside(folder, [STAGE], "why") is None
    assert not folder.any_trace()
