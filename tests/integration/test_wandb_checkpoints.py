"""Checkpoints at Weights & Biases: on request, each once, whole, without a copy, and never in the trainer's way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.config import Config
from app.ops import wandb_checkpoints
from app.train.checkpoint import CheckpointFolder, Counters, file_sha256
from app.workspace import RunDir
from tests.wandb_files import records, start_log, wandb_file
from tests.wandb_server import Artifact, Server, serving, wandb_env

EPOCHS = 4
CONFIG = Config.model_validate({"wandb": {"checkpoints": True}, "stages": [{"resolution": 16, "epochs": EPOCHS}]})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run without a name."""
    run = RunDir(tmp_path / "checkpoints")
    run.ensure()
    return run


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A W&B server to which the environment points; the library's own folders are `tmp_path / "own"`."""
    with serving() as server:
        for name, value in wandb_env(server.address).items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            monkeypatch.setenv(name, str(tmp_path / "own"))
        yield server
        server.takes_files.set()


def publish(run: RunDir, epochs: int, *kinds: str) -> str:
    """Checkpoints after so many epochs; the sha256 of each."""
    payload = {"epoch": epochs - 1, "resume": {"step": 10 * epochs}, "x": torch.full((1000,), float(epochs))}
    CheckpointFolder(run).publish("stage_16", kinds, payload, Counters(epochs, 10 * epochs))
    return file_sha256(run.checkpoint("stage_16", kinds[-1]))


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it is true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def committed(server: Server) -> list[Artifact]:
    """Versions that the server has whole."""
    return [artifact for artifact in server.artifacts if artifact.committed]


def content(artifact: Artifact) -> tuple[set[str], str]:
    """The aliases of a version, and the sha256 of its file."""
    (data,) = artifact.files.values()
    sha256 = hashlib.sha256(data).hexdigest()
    assert artifact.metadata["sha256"] == sha256
    return artifact.aliases - {"latest"}, sha256


def links(run: RunDir) -> list[Path]:
    """Second names of checkpoints."""
    return sorted(run.wandb_links.iterdir()) if run.wandb_links.is_dir() else []


def test_each_checkpoint_is_sent_once_over_all_attempts(run: RunDir, online: Server, tmp_path: Path) -> None:
    """A best when it comes; the last epoch's, which is the final one too, as one version; nothing twice, no copies."""
    log = start_log(run, "online", CONFIG)
    first = publish(run, 1, "last", "best")
    wait_for(lambda: len(committed(online)) == 1)
    second = publish(run, EPOCHS, "last", "best", "epoch_4", "final")
    log.close()
    expected = [({"best"}, first), ({"best", "final"}, second)]
    assert [content(artifact) for artifact in committed(online)] == expected
    assert [list(artifact.files) for artifact in online.artifacts] == [["stage_16_best.pt"], ["stage_16_final.pt"]]
    assert online.artifacts[1].metadata == {"stage": "stage_16", "epochs": EPOCHS, "step": 40, "sha256": second}
    log = start_log(run, "online", CONFIG)
    log.close()
    assert [content(artifact) for artifact in online.artifacts] == expected
    assert run.wandb_sent.read_text().split() == [first, second]
    assert links(run) == []
    copies = [path for path in (tmp_path / "own").rglob("*") if path.is_file() and path.stat().st_size > 4000]
    assert copies == []
    assert str(run.path).encode() not in b"".join(online.requests)


def test_a_file_that_is_replaced_while_it_is_sent_arrives_whole(run: RunDir, online: Server) -> None:
    """Three bests: the first one is being sent when the others come; then the newest is next."""
    online.takes_files.clear()
    log = start_log(run, "online", CONFIG)
    first = publish(run, 1, "best")
    wait_for(lambda: bool(online.artifacts))
    publish(run, 2, "best")
    third = publish(run, 3, "best")
    online.takes_files.set()
    log.close()
    assert [content(artifact) for artifact in committed(online)] == [({"best"}, first), ({"best"}, third)]


def test_what_was_cut_off_is_sent_by_the_next_attempt(run: RunDir, online: Server) -> None:
    """The trainer ends in its own time beside a server that does not take the file."""
    online.takes_files.clear()
    log = start_log(run, "online", CONFIG)
    sha256 = publish(run, 1, "best")
    wait_for(lambda: bool(online.artifacts))
    began = time.monotonic()
    log.close(limit_s=0.5)
    assert time.monotonic() - began < 2
    assert not run.wandb_sent.exists()
    assert len(links(run)) == 1
    online.takes_files.set()
    log = start_log(run, "online", CONFIG)
    log.close()
    assert [content(artifact) for artifact in committed(online)][-1] == ({"best"}, sha256)
    assert run.wandb_sent.read_text().split() == [sha256]
    assert links(run) == []


def test_nothing_is_sent_that_nobody_asked_for(run: RunDir, online: Server) -> None:
    """By default the server never hears of a checkpoint."""
    log = start_log(run, "online", Config())
    publish(run, EPOCHS, "best", "final")
    log.close()
    assert online.artifacts == []
    assert links(run) == []


def recorded(run: RunDir) -> list[tuple[set[str], str, Path]]:
    """Aliases, file name and place of each artifact in the offline run."""
    return [
        (set(record.artifact.aliases) - {"latest"}, file.path, run.path / file.local_path)
        for record in records(wandb_file(run))
        if record.HasField("artifact")
        for file in record.artifact.manifest.contents
    ]


def test_an_offline_run_names_the_checkpoints_of_finished_stages(run: RunDir) -> None:
    """Each attempt's record names them once, by a second name of the very file, which takes no room."""
    log = start_log(run, config=CONFIG)
    publish(run, 3, "best")
    log.close()
    assert recorded(run) == []
    publish(run, EPOCHS, "final")
    for _ in range(2):
        log = start_log(run, config=CONFIG)
        log.close()
        found = sorted(recorded(run), key=lambda each: each[1])
        assert [each[:2] for each in found] == [({"best"}, "stage_16_best.pt"), ({"final"}, "stage_16_final.pt")]
        for _, name, link in found:
            assert link.samefile(run.path / name)
        assert links(run) == sorted(link for *_, link in found)


def test_the_bests_of_an_unfinished_stage_keep_no_room_offline(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is linked that the trainer is about to replace, and so nothing is kept that it deletes."""
    monkeypatch.setattr(wandb_checkpoints, "LOOK_EVERY_S", 0.01)
    nothing_to_log: Any = None
    sender = wandb_checkpoints.CheckpointSender(nothing_to_log, run, {"stage_16": EPOCHS}, offline=True)
    for epochs in (1, 2, EPOCHS):
        publish(run, epochs, "best")
        time.sleep(0.1)
    sender.finish(10)
    assert sender.needed() == set()
    assert links(run) == []


def test_a_damaged_checkpoint_is_not_sent(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    """The other one is; the log says which is not, and why."""
    publish(run, EPOCHS, "final")
    publish(run, 2, "best")
    with run.checkpoint("stage_16", "best").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    log = start_log(run, config=CONFIG)
    log.close()
    assert [each[0] for each in recorded(run)] == [{"final"}]
    said = "stage_16_best.pt is not sent to Weights & Biases: its sha256 does not stand in the manifest"
    assert said in capfd.readouterr().err
