"""The record of three attempts: TensorBoard by both of its loaders, and Weights & Biases, offline, under one id."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.workspace import RunDir
from tests.integration.test_tensorboard import server, wait_for
from tests.runs import RUN, WALL_CLOCK_TAGS, has_step, series, start, train, wait_until
from tests.wandb_files import points_of, wandb_file

OFFLINE = {"WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody killed."""
    workspace = tmp_path_factory.mktemp("uninterrupted")
    code, output = train(workspace, env=OFFLINE)
    assert code == 0, output
    return workspace / RUN


@pytest.fixture(scope="module")
def three_attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The run folder of a run that was killed twice, and the ids at Weights & Biases of its attempts."""
    workspace = tmp_path_factory.mktemp("killed")
    run, ids = workspace / RUN, set()
    for stage, step in (("stage_8", 5), ("stage_16", 3)):
        process = start(workspace, "--set", "checkpoint.save_every_s=0.3", env=OFFLINE)
        wait_until(has_step(run, stage, step), process)
        process.kill()
        process.communicate()
        ids.add((run / "wandb/wandb_id").read_text())
    code, output = train(workspace, "--set", "checkpoint.save_every_s=0.3", env=OFFLINE)
    assert code == 0, output
    return run, ids | {(run / "wandb/wandb_id").read_text()}


def comparable(tag: str) -> bool:
    """Whether a tag's values are a property of the run."""
    return not any(name in tag for name in WALL_CLOCK_TAGS)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_tensorboard_shows_one_run(three_attempts: tuple[Path, set[str]], uninterrupted: Path, fast: bool) -> None:
    """A real server over the killed run: each step once, in order, with the quiet run's values."""
    expected = {tag: points for tag, points in series(uninterrupted).items() if comparable(tag)}
    with server(three_attempts[0], fast) as url:
        for tag, points in expected.items():
            shown = [(step, value) for _, step, value in wait_for(url, tag, [step for step, _ in points])]
            assert shown == [(step, pytest.approx(value)) for step, value in points], tag


def test_the_resumes_stand_in_the_record(three_attempts: tuple[Path, set[str]]) -> None:
    """Two interruptions, counted where the run went on, and the steps that they cost."""
    curves = series(three_attempts[0])
    assert [value for _, value in curves["ops/interruptions"]] == [1.0, 2.0]
    lost = [value for _, value in curves["ops/lost_steps"]]
    assert len(lost) == 2
    assert 0 <= lost[0] <= lost[1]


def test_weights_and_biases_shows_one_run(three_attempts: tuple[Path, set[str]], uninterrupted: Path) -> None:
    """One id over all attempts, one offline record, each step once, with the quiet run's values."""
    run, ids = three_attempts
    assert len(ids) == 1
    found, expected = (points_of(wandb_file(RunDir(folder))) for folder in (run, uninterrupted))
    assert next(iter(ids)).strip() in str(wandb_file(RunDir(run)))
    found, expected = ({tag: each[tag] for tag in each if comparable(tag)} for each in (found, expected))
    assert found == expected
