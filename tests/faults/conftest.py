"""What the tests that kill processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import RUN, SHORT, train
from tests.supervised import Container


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that trained `SHORT` and that nobody stopped."""
    workspace = tmp_path_factory.mktemp("alone")
    code, output = train(workspace, *SHORT)
    assert code == 0, output
    return workspace / RUN


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Container]]:
    """Containers, one after another on the same volume."""
    made: list[Container] = []

    def begin(*arguments: str, **options: Any) -> Container:
        made.append(Container(tmp_path, *arguments, **options))
        return made[-1]

    yield begin
    for container in made:
        container.close()
