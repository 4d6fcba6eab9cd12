"""Claims about what a run says it was made with."""

import logging
import tomllib
from pathlib import Path

import pytest
import torch

import app
from app.ops.provenance import provenance, revision

ROOT = Path(__file__).parents[2]
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def write(path, text):
    """A file of a repository, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_version_is_the_project_s():
    """One number in two places, because the image has no pyproject.toml."""
    assert app.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_record_has_versions_and_device():
    """Those of what runs here."""
    found = provenance("NVIDIA H100 80GB HBM3 x 2")
    assert found["torch"] == torch.__version__
    assert found["cuda"] == torch.version.cuda
    assert (found["app"], found["device"]) == (app.__version__, "NVIDIA H100 80GB HBM3 x 2")
    assert found["revision"] == revision(ROOT)


def test_a_branch_is_followed_to_its_commit(tmp_path):
    """The ref's own file wins over an older line in packed-refs."""
    write(tmp_path / ".git/HEAD", "ref: refs/heads/a/b\n")
    write(tmp_path / ".git/packed-refs", f"# pack-refs with: peeled\n{OTHER} refs/heads/a\n{COMMIT} refs/heads/a/b\n")
    assert revision(tmp_path) == COMMIT
    write(tmp_path / ".git/refs/heads/a/b", f"{OTHER}\n")
    assert revision(tmp_path) == OTHER


def test_a_detached_head_is_a_commit(tmp_path):
    """HEAD itself has it."""
    write(tmp_path / ".git/HEAD", f"{COMMIT}\n")
    assert revision(tmp_path) == COMMIT


def test_a_worktree_has_its_refs_elsewhere(tmp_path):
    """`.git` is a file there, and the branches lie in the repository's own folder."""
    write(tmp_path / "tree/.git", f"gitdir: {tmp_path}/main/.git/worktrees/tree\n")
    write(tmp_path / "main/.git/worktrees/tree/HEAD", "ref: refs/heads/side\n")
    write(tmp_path / "main/.git/worktrees/tree/commondir", "../..\n")
    write(tmp_path / "main/.git/refs/heads/side", f"{COMMIT}\n")
    assert revision(tmp_path / "tree") == COMMIT


def test_an_image_has_a_file(tmp_path):
    """What the build was told; an empty file is none."""
    write(tmp_path / "REVISION", f"{COMMIT}\n")
    assert revision(tmp_path) == COMMIT
    write(tmp_path / "REVISION", "\n")
    assert revision(tmp_path) is None


@pytest.mark.parametrize("head", ["ref: refs/heads/unborn", "not a commit", ""])
def test_a_repository_without_a_commit_has_no_revision(tmp_path, head):
    """Nor does a folder without a repository."""
    assert revision(tmp_path) is None
    write(tmp_path / ".git/HEAD", head)
    assert revision(tmp_path) is None


def test_a_revision_that_cannot_be_read_is_told(tmp_path, caplog):
    """And costs the run nothing."""
    (tmp_path / ".git/HEAD").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert revision(tmp_path) is None
    assert caplog.messages == [
        f"the revision of the code is not known: {tmp_path}/.git/HEAD: Is a directory",
    ]
