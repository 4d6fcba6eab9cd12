"""The image, built once, and workspaces for its containers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.container.engine import build_image


@pytest.fixture(scope="session")
def image() -> str:
    """The name of the image; every test needs it, since every container is made from it."""
    return build_image()


@pytest.fixture
def workspace(image: str, tmp_path: Path) -> Path:
    """A folder to mount at /workspace, with the tiny cascade's config as tiny.yaml."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    shutil.copyfile(TINY, folder / "tiny.yaml")
    return folder
