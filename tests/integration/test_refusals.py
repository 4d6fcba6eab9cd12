"""Runs that are refused or stopped before they have a finished stage, each with its exit code and its sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.runs import RUN, command, load, refused, start, train
from tests.scans import write_scan

CONFIG = ("--config", "tests/tiny.yaml")


def test_a_gpu_config_never_trains_on_a_cpu(tmp_path: Path) -> None:
    """Exit 69, whatever the machine: the GPU is hidden from the process."""
    output = refused(tmp_path, 69, "--set", "compute.device=cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert "compute.device is cuda and torch finds no GPU here" in output


def test_a_loss_that_explodes_stops_before_the_weights_move(tmp_path: Path) -> None:
    """Exit 70; the newest checkpoint holds finite weights."""
    output = refused(tmp_path, 70, "--set", "stages.*.learning_rate=1e30", "--set", "optimizer.warmup_steps=0")
    assert "not finite" in output
    assert "Lower the stage's learning_rate" in output
    checkpoint = load(tmp_path / RUN / "stage_8_last.pt")
    assert all(tensor.isfinite().all() for tensor in checkpoint["model_state_dict"].values())


def test_a_step_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    """A single sample: 69 at once and not 71 after five crashes, with predicted GiB; the newest state is saved."""
    process = start(tmp_path, "--set", "stages.*.micro_batch=1", fault="out_of_memory:3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 69, output
    assert "stage_8 did not fit into the device's" in output
    assert "lower stages.stage_8.micro_batch" in output
    assert re.search(r"micro_batch +plain +checkpointed\n +1 +0\.\d +0\.\d", output), output
    assert load(tmp_path / RUN / "stage_8_last.pt")["epoch"] == -1


def test_a_stage_without_its_predecessor_is_refused(tmp_path: Path) -> None:
    """Exit 78 with what to do."""
    output = refused(tmp_path, 78, "--stages", "stage_16")
    assert "--stages stage_16: stage_8 comes before it and is not finished. Train it first, or take it over" in output


CONSTANT = ("--set", "optimizer.schedule=constant", "--set", "physics.weight=0")


def test_a_stage_may_be_prolonged_until_the_next_one_was_trained_on_it(tmp_path: Path) -> None:
    """Under a constant rate without physics loss: 1 epoch, then 2; refused once stage_16 exists."""
    code, output = train(tmp_path, *CONSTANT, "--set", "stages.stage_8.epochs=1", "--stages", "stage_8")
    assert code == 0, output
    code, output = train(tmp_path, *CONSTANT, "--set", "stages.stage_8.epochs=2", "--stages", "stage_8", "stage_16")
    assert code == 0, output
    assert "changed since the last attempt: stages.stage_8.epochs: 1 -> 2" in output
    assert load(tmp_path / RUN / "stage_8_final.pt")["epoch"] == 1
    output = refused(tmp_path, 74, *CONSTANT)
    assert "stage_8 is finished and stage_16 is trained on its outputs, so it cannot be prolonged" in output


def test_init_from_other_settings_or_other_cases_is_refused(tmp_path: Path) -> None:
    """A finished stage is taken over only where its own settings, its cases and its split are the same."""
    for index in range(3):
        write_scan(tmp_path / "data" / f"scan{index}.nii.gz", index)
    ct = ("--set", "data.source=ct", "--set", "stages.stage_8.epochs=1")
    code, output = train(tmp_path, *ct, "--stages", "stage_8")
    assert code == 0, output
    second = (*ct, "--set", "run_name=second", "--set", "init_from=tiny")
    output = refused(tmp_path, 74, *second, "--set", "optimizer.weight_decay=0.5")
    assert re.search(
        r"init_from: tiny, stage_8_best.pt: this run was started with other.*weight_decay", output, re.DOTALL
    )
    write_scan(tmp_path / "data" / "scan3.nii.gz", 3)
    output = refused(tmp_path, 74, *ct, "--set", "run_name=third", "--set", "init_from=tiny")
    assert "init_from: tiny, stage_8_best.pt: trained on another set of cases or another split" in output


def test_a_volume_that_refuses_to_be_written_is_named(tmp_path: Path) -> None:
    """Exit 69: the file size limit of the process stands for a full disk; no torn file stays."""
    process = subprocess.run(
        ["bash", "-c", f"ulimit -f 1000; exec {sys.executable} -m app train {' '.join(CONFIG)}"],
        cwd=ROOT,
        env={**os.environ, "WORKSPACE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 69, process.stderr
    assert "does not take a test file of 16 MiB: File too large. The checkpoints so far are whole" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list((tmp_path / RUN).glob("stage_*"))


def test_commands_on_a_run_without_checkpoints_say_so(tmp_path: Path) -> None:
    """`checkpoints` and `export` exit with 74, `status` with 69, each with the folder's name."""
    listing, export, status = (
        command(tmp_path, *words, *CONFIG) for words in (["checkpoints"], ["export", "--out", "x.pt"], ["status"])
    )
    assert (listing.returncode, export.returncode, status.returncode) == (74, 74, 69)
    assert f"no checkpoints in {tmp_path / RUN}" in listing.stdout
    assert "no stage is finished (no _final.pt with its _best.pt); train first" in export.stdout
    assert "status.json: no run has started here" in status.stdout


def test_an_unreadable_status_is_named(tmp_path: Path) -> None:
    """A torn file is not a traceback."""
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "status.json").write_text("{")
    result = command(tmp_path, "status", *CONFIG)
    assert result.returncode == 69
    assert "status.json: cannot be read: Expecting" in result.stdout


def test_without_a_config_the_message_says_where_they_are(tmp_path: Path) -> None:
    """Exit 78."""
    result = command(tmp_path, "train")
    assert result.returncode == 78
    assert "no config: give --config FILE or set CONFIG; the shipped ones are in configs/" in result.stdout
