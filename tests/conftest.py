"""What all tests share: the tiny cascade, and the folder of real CTs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from app.config import Config
from app.config_file import load_config
from app.env import Environment

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
CT_DIR = Path(os.environ.get("CT_DIR", ROOT.parent / "shared" / "ct"))


def tiny_config(*overrides: str) -> Config:
    """The tiny cascade with some keys changed."""
    return load_config(TINY, overrides, Environment.read({}))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors: a second thread costs more than it brings, and far more on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def ct_dir() -> Path:
    """Real CT volumes; a missing folder is a failure, not a skip."""
    assert CT_DIR.is_dir(), f"no real CTs in {CT_DIR}: set CT_DIR"
    return CT_DIR
