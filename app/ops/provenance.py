"""What a run is made with, for its record: versions, device, and the revision of the code."""

from __future__ import annotations

import logging
import platform
import re
from pathlib import Path
from typing import Any

import torch

import app

log = logging.getLogger(__name__)

ROOT = Path(app.__file__).resolve().parents[1]
REVISION_FILE = "REVISION"
"""Written where the image is built, which has no `.git`."""
REVISION = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def provenance(device: str) -> dict[str, Any]:
    """Versions of the program and of what computes; `device` is what a run trains on."""
    return {
        "app": app.__version__,
        "revision": revision(ROOT),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device,
    }


def revision(root: Path) -> str | None:
    """The git revision of the code in `root`, by its files: the program needs no git. None where there is none.

    Changes that are not committed do not show.
    """
    try:
        found = _of_repository(root / ".git") if (root / ".git").exists() else _line(root / REVISION_FILE)
    except OSError as error:
        log.warning("the revision of the code is not known: %s: %s", error.filename, error.strerror)
        return None
    return found if found is not None and REVISION.fullmatch(found) else None


def _of_repository(git: Path) -> str | None:
    if git.is_file():
        # A worktree or submodule: the file says where the folder is.
        git = git.parent / (_line(git) or "").removeprefix("gitdir: ")
    head = _line(git / "HEAD")
    if head is None or not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = git / (_line(git / "commondir") or ".")
    return _line(common / name) or _packed(common / "packed-refs", name)


def _packed(path: Path, name: str) -> str | None:
    rows = [line.split(" ") for line in path.read_text(errors="replace").splitlines()] if path.exists() else []
    return next((row[0] for row in rows if row[1:] == [name]), None)


def _line(path: Path) -> str | None:
    return path.read_text(errors="replace").strip() if path.exists() else None
