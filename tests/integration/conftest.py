"""What several files of integration tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished tiny run; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = train(folder)
    assert code == 0, output
    assert "finished: all stages are trained" in output
    return folder
