"""Each stage at full size before the first step of a run: what it finds, and that the run is the same with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.cases import CaseStore
from app.data.prepare import prepare
from app.errors import MachineError, Stopped
from app.ops.status import RunStatus
from app.train.checkpoint import CheckpointFolder
from app.train.micro_batch import MicroBatches
from app.train.parallel import ALONE
from app.train.precision import Precision
from app.train.rehearsal import Rehearsal
from app.train.step import train_step
from app.workspace import RunDir, Workspace
from tests.conftest import tiny_config
from tests.runs import RUN, assert_same_run, train

CPU = torch.device("cpu")
ALWAYS = ("--set", "compute.rehearse=always")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the tiny cascade's cases."""
    workspace = Workspace(tmp_path_factory.mktemp("prepared"))
    workspace.ensure()
    prepare(tiny_config(), workspace, stop=lambda: False)
    return workspace


def rehearsal(workspace: Workspace, folder: Path, *overrides: str, stop: Any = lambda: False) -> Rehearsal:
    """Of the tiny cascade, with the run's folder in `folder`."""
    config = tiny_config("compute.rehearse=always", *overrides)
    store = CaseStore.open(config, workspace)
    run_dir = RunDir(folder)
    run_dir.ensure()
    return Rehearsal(
        config=config,
        store=store,
        train=store.cases[:4],
        val=store.cases[4:],
        device=CPU,
        precision=Precision("fp32", CPU),
        run_dir=run_dir,
        status=RunStatus(run_dir),
        micro_batches=MicroBatches(config, run_dir.micro_batches, CPU, "fp32", ALONE),
        stop=stop,
        ranks=ALONE,
    )


def test_the_run_is_the_same_with_it(finished: Path, tmp_path: Path) -> None:
    """Every checkpoint and curve, bit for bit; nothing of the rehearsal is left, and the next start has none."""
    code, output = train(tmp_path, *ALWAYS)
    assert code == 0, output
    assert_same_run(tmp_path / RUN, finished / RUN)
    for stage in ("stage_8", "stage_16", "stage_32"):
        assert output.count(f"rehearsed {stage} in") == 1
        assert output.index(f"rehearsed {stage} in") < output.index("M parameters")
    assert "rehearsed stage_8, stage_16, stage_32: their steps will take about" in output
    assert not (tmp_path / RUN / "rehearsal").exists()
    assert sorted(json.loads((tmp_path / RUN / "rehearsed.json").read_text())) == ["stage_16", "stage_32", "stage_8"]
    code, output = train(tmp_path, *ALWAYS)
    assert code == 0, output
    assert "rehears" not in output


def test_it_is_done_again_for_another_precision_or_stage(
    prepared: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two stages that were rehearsed only the changed one is due, and the status names it."""
    first = rehearsal(prepared, tmp_path)
    first.run(first.config.stages[:2])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = rehearsal(prepared, tmp_path, "stages.stage_16.micro_batch=1")
        again.run(again.config.stages[:2])
    assert [text.split()[1].rstrip(":") for text in caplog.messages if text.startswith("rehearsing")] == ["stage_16"]
    assert all("at a time" in text for text in caplog.messages if text.startswith("rehearsed stage_16 in"))
    told = json.loads(again.run_dir.status.read_text())
    assert (told["state"], told["stage"]) == ("rehearsing", "stage_16")


def test_a_stage_that_does_not_fit_is_found_before_the_first_step(
    prepared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one sample at 32^3 alone: the size is known when the rehearsal is over."""

    def step(state: Any, loader: Any, *rest: Any) -> Any:
        def checked() -> Any:
            for batch in loader:
                if batch.x_0.shape[-1] == 32 and len(batch.x_0) > 1:
                    state.model.backbone.register_forward_pre_hook(full)
                yield batch

        return train_step(state, checked(), *rest)

    def full(module: Any, inputs: Any) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("app.train.rehearsal.train_step", step)
    whole = rehearsal(prepared, tmp_path)
    whole.run(whole.config.stages)
    assert [whole.micro_batches.size(stage) for stage in whole.config.stages] == [2, 2, 1]
    assert json.loads((tmp_path / "micro_batches.json").read_text())["fits"] == {"stage_32": 1}


@pytest.mark.parametrize("place", [-2000, 5000])
def test_a_checkpoint_that_does_not_come_back_is_refused(
    prepared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """One bit turned on the volume: the run does not begin, and the file is gone."""
    publish = CheckpointFolder.publish

    def turned(self: CheckpointFolder, stage: str, *rest: Any) -> None:
        publish(self, stage, *rest)
        path = RunDir(tmp_path / "rehearsal").checkpoint(stage, "last")
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(CheckpointFolder, "publish", turned)
    broken = rehearsal(prepared, tmp_path)
    with pytest.raises(MachineError, match="stage_8 that was written as a trial was not the same") as caught:
        broken.run(broken.config.stages[:1])
    assert "use another one" in str(caught.value)
    assert not (tmp_path / "rehearsal").exists()
    assert not (tmp_path / "rehearsed.json").exists()


def test_a_volume_without_room_for_a_checkpoint_is_refused(
    prepared: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, with the folder and the system's words for it."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointFolder, "publish", full)
    broken = rehearsal(prepared, tmp_path)
    with pytest.raises(MachineError, match=r"does not take a checkpoint of stage_8.*No space left on device"):
        broken.run(broken.config.stages[:1])


def test_a_stop_ends_it_and_nothing_is_remembered(prepared: Workspace, tmp_path: Path) -> None:
    """Asked to stop in the first step."""
    stopped = rehearsal(prepared, tmp_path, stop=lambda: True)
    with pytest.raises(Stopped):
        stopped.run(stopped.config.stages[:1])
    assert not (tmp_path / "rehearsed.json").exists()


def test_without_a_gpu_it_is_not_done_unless_asked_for(prepared: Workspace, tmp_path: Path) -> None:
    """`auto` on a CPU, and `never`."""
    for wanted in ("auto", "never"):
        quiet = rehearsal(prepared, tmp_path, f"compute.rehearse={wanted}")
        quiet.run(quiet.config.stages)
        assert not quiet.run_dir.status.exists()
    assert not (tmp_path / "rehearsed.json").exists()


def test_what_a_killed_rehearsal_left_is_removed(prepared: Workspace, tmp_path: Path) -> None:
    """Even where nothing is left to rehearse."""
    (tmp_path / "rehearsal").mkdir()
    (tmp_path / "rehearsal" / "stage_8_last.pt").write_bytes(b"half")
    left = rehearsal(prepared, tmp_path, "compute.rehearse=never")
    left.run(left.config.stages)
    assert not (tmp_path / "rehearsal").exists()
