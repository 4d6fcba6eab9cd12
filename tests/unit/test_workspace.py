import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import MachineError
from app.workspace import RunDir, Workspace, atomic_file, atomic_write, epoch_kind, remove_temporary_files


def test_the_layout_is_the_documented_one():
    """Each path of the workspace, spelled out."""
    workspace = Workspace(Path("/w"))
    run = workspace.run_dir(None)
    named = workspace.run_dir("demo")
    assert [str(path) for path in (workspace.data, workspace.cache, workspace.checkpoints, workspace.logs)] == [
        "/w/data",
        "/w/cache",
        "/w/hybrid_vit_cascade/checkpoints",
        "/w/hybrid_vit_cascade/logs",
    ]
    assert workspace.pseudonym_key == Path("/w/hybrid_vit_cascade/pseudonym.key")
    assert run.path == workspace.checkpoints
    assert named.path == workspace.checkpoints / "demo"
    names = {getattr(named, name).name for name, kind in vars(RunDir).items() if isinstance(kind, property)}
    assert names == {
        *("config.yaml", "tensorboard", "wandb", "split.json", "manifest.jsonl", "run.lock"),
        *("status.json", "progress.png", "quarantine", "DONE", "REASON", "REASON.json", "attempts.jsonl"),
        *("steps", "ledger.jsonl", "wandb_id", "links", "sent"),
        *("micro_batches.json", "rehearsed.json", "rehearsal"),
    }


@pytest.mark.parametrize("kind", ["best", "last", "last_previous", "final", "epoch_15"])
def test_checkpoint_names_are_found_again(tmp_path, kind):
    """A checkpoint's name gives back its stage and its kind; other files are none."""
    run = RunDir(tmp_path)
    path = run.checkpoint("stage_128", kind)
    path.touch()
    (tmp_path / "stage_128_best.pt.bak").touch()
    (tmp_path / "stage_x_best.pt").touch()
    assert path.name == f"stage_128_{kind}.pt"
    assert run.checkpoints() == [("stage_128", kind, path)]


def test_a_kind_that_does_not_exist_is_a_mistake():
    """The names of the contract are the only ones."""
    assert epoch_kind(5) == "epoch_5"
    with pytest.raises(ValueError, match=r"not the name of a checkpoint: stage_64_newest\.pt"):
        RunDir(Path("/w")).checkpoint("stage_64", "newest")


def test_a_written_file_is_whole_and_has_its_mode(tmp_path):
    """The new content replaces the old one and nothing else stays in the folder."""
    path = tmp_path / "pseudonym.key"
    atomic_write(path, b"old")
    atomic_write(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """An exception while writing changes nothing under the name."""
    path = tmp_path / "a.pt"
    atomic_write(path, b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_a_temporary_one_that_is_found(tmp_path):
    """A real process that dies by SIGKILL between write and rename."""
    path = tmp_path / "a.pt"
    atomic_write(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from app.workspace import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"
    left = remove_temporary_files(tmp_path)
    assert len(left) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_ensure_makes_the_folders(tmp_path):
    """A fresh volume gets all folders, and no probe stays behind."""
    workspace = Workspace(tmp_path / "fresh")
    workspace.ensure()
    workspace.run_dir("demo").ensure()
    files = [path for path in workspace.root.rglob("*") if not path.is_dir()]
    assert workspace.run_dir("demo").path.is_dir()
    assert files == []


def test_a_workspace_that_cannot_be_written_is_named(tmp_path):
    """A file where the folder should be: the message says where and what to do."""
    blocked = tmp_path / "workspace"
    blocked.write_text("not a folder")
    with pytest.raises(MachineError) as caught:
        Workspace(blocked).ensure()
    assert str(caught.value) == (
        f"cannot write in {blocked / 'data'}: Not a directory. Mount a writable volume there, or set WORKSPACE to a "
        f"folder that this user (uid {os.getuid()}) may write"
    )
