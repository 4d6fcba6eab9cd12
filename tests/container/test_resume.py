"""Killed, stopped and replaced containers: the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, TINY
from tests.container.engine import Container, docker
from tests.runs import RUN, assert_same_run, command, has_kind, has_step, manifest

CONFIG = {"CONFIG": "/workspace/tiny.yaml"}
LONGER = ("train", "--set", "stages.*.samples_per_epoch=240", "--set", "checkpoint.save_every_s=0.3")
"""Epochs of 120 steps with some steps between two saves, so that a kill in the middle loses some."""
SHORT = Path("hybrid_vit_cascade/checkpoints/short")


@pytest.fixture(scope="module")
def uninterrupted(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a container run that nobody disturbed, and its log as log.txt."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copyfile(TINY, folder / "tiny.yaml")
    with Container(*LONGER, workspace=folder, env=CONFIG) as container:
        container.wait_for((folder / RUN / "DONE").exists, "DONE", limit_s=180)
        container.wait_for(lambda: container.state()["Health"]["Status"] == "healthy", "healthy")
        (folder / "log.txt").write_text(container.logs())
    return folder


def test_the_log_of_a_good_run_has_no_error(uninterrupted: Path) -> None:
    """From the first line to the finished run."""
    log = (uninterrupted / "log.txt").read_text()
    bad = [line for line in log.splitlines() if any(word in line for word in ("ERROR", "CRIT", "Traceback", "WARN"))]
    assert bad == []
    assert "fresh start" in log
    assert "finished: all stages are trained" in log


def test_a_killed_container_started_again_ends_with_the_same_run(workspace: Path, uninterrupted: Path) -> None:
    """SIGKILL in the middle of an epoch of the second stage, then `docker start`."""
    with Container(*LONGER, workspace=workspace, env=CONFIG) as container:
        container.wait_for(has_step(workspace / RUN, "stage_16", 130), "step 130 of stage_16", 120, every_s=0.02)
        container.kill()
        container.start()
        container.wait_for_log("resuming stage_16 at epoch 1, step ")
        container.wait_for((workspace / RUN / "DONE").exists, "DONE", limit_s=180)
    assert_same_run(workspace / RUN, uninterrupted / RUN)


def test_a_new_container_with_only_the_volume_goes_on(workspace: Path, uninterrupted: Path) -> None:
    """Another id, another hostname, and files of another umask."""
    entrypoint = "/opt/hybrid_vit_cascade/docker/entrypoint.sh"
    shell = ("-c", f'umask 077 && exec {entrypoint} "$@"', "bash")
    options = ("--hostname", "first", "--entrypoint", "bash")
    with Container(*shell, *LONGER, workspace=workspace, env=CONFIG, options=options) as container:
        container.wait_for(has_step(workspace / RUN, "stage_8", 130), "step 130 of stage_8", 120)
        container.stop(10)
    with Container(*LONGER, workspace=workspace, env=CONFIG, options=("--hostname", "second")) as container:
        container.wait_for_log("resuming stage_8 at epoch 1, step ")
        container.wait_for((workspace / RUN / "DONE").exists, "DONE", limit_s=180)
    assert_same_run(workspace / RUN, uninterrupted / RUN)


def short_demo() -> dict[str, Any]:
    """The demo with its own networks, fewer patients and a handful of steps in each stage."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    config["run_name"] = "short"
    config["data"]["phantoms"]["count"] = 8
    for stage in config["stages"]:
        stage |= {"epochs": 1, "samples_per_epoch": stage["batch"]}
    config["stages"][-1] |= {"epochs": 3, "samples_per_epoch": 3 * config["stages"][-1]["batch"]}
    config["checkpoint"] = {"save_every_s": 0.001, "save_every_n_epochs": 1}
    return config


@pytest.fixture(scope="module")
def at_stage_64(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose run of the short demo is about to begin stage_64."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "short.yaml").write_text(yaml.safe_dump(short_demo()))
    with Container(workspace=folder, env={"CONFIG": "/workspace/short.yaml"}) as container:
        container.wait_for(has_kind(folder / SHORT, "stage_32", "final"), "stage_32 finished", limit_s=300)
        container.stop(10)
    return folder


Moment = Callable[[Container, Path], None]


def during_a_step(container: Container, run: Path) -> None:
    """After the save of the first step of stage_64."""
    container.wait_for(has_step(run, "stage_64", 1), "step 1", 180, every_s=0.02)
    time.sleep(0.2)


def during_validation(container: Container, run: Path) -> None:
    """After the last step of the first epoch."""
    container.wait_for(has_step(run, "stage_64", 3), "the last step of the epoch", 180, every_s=0.02)
    time.sleep(0.3)


MOMENTS = [during_a_step, during_validation]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_container_is_gone_in_time_and_loses_at_most_a_step(
    at_stage_64: Path, tmp_path: Path, moment: Moment
) -> None:
    """`docker stop -t 5` at demo size: out by itself, and the log's step is the newest state, which verifies."""
    workspace = shutil.copytree(at_stage_64, tmp_path / "workspace")
    run = workspace / SHORT
    with Container(workspace=workspace, env={"CONFIG": "/workspace/short.yaml"}) as container:
        moment(container, run)
        assert container.stop(5) < 5.0
        log = container.logs()
        assert container.state()["ExitCode"] in (0, 143), log
    assert_saved(workspace, log)


def test_a_stop_during_a_checkpoint_leaves_whole_files(at_stage_64: Path, tmp_path: Path) -> None:
    """SIGTERM arrives while the trainer stands still in the middle of writing a file, then it goes on."""
    workspace = shutil.copytree(at_stage_64, tmp_path / "workspace")
    run = workspace / SHORT
    with Container(workspace=workspace, env={"CONFIG": "/workspace/short.yaml"}) as container:
        container.wait_for(has_step(run, "stage_64", 1), "step 1", 180)
        trainer = trainer_pid(container)
        for _ in range(100):
            container.wait_for(lambda: any(run.glob(".stage_64_*.tmp")), "a temporary file", every_s=0.0005)
            os.kill(trainer, signal.SIGSTOP)
            if any(run.glob(".stage_64_*.tmp")):
                break
            os.kill(trainer, signal.SIGCONT)
        else:
            raise AssertionError("the trainer was never caught in the middle of a file")
        started = time.monotonic()
        with subprocess.Popen(["docker", "stop", "--time", "5", container.name], stdout=subprocess.DEVNULL) as stop:
            time.sleep(0.3)
            os.kill(trainer, signal.SIGCONT)
        assert stop.returncode == 0
        assert time.monotonic() - started < 5.0
        log = container.logs()
        assert container.state()["ExitCode"] in (0, 143), log
    assert not any(run.glob(".stage_64_*.tmp"))
    assert_saved(workspace, log)


def trainer_pid(container: Container) -> int:
    """The host's number of the process that trains."""
    rows = [line.split(None, 1) for line in docker("top", container.name, "-eo", "pid,args").splitlines()[1:]]
    found = [int(pid) for pid, arguments in rows if "-m app train" in arguments]
    assert len(found) == 1, rows
    return found[0]


def assert_saved(workspace: Path, log: str) -> None:
    """The state that the log names is the newest of the manifest, and every file verifies."""
    newest = max(manifest(workspace / SHORT), key=lambda line: line["time"])
    assert f"stage_64: stopped at epoch {newest['epochs']}, step {newest['step']}; the state is saved" in log
    listing = command(workspace, "checkpoints", env={"RUN_NAME": "short"})
    assert listing.returncode == 0, listing.stdout
    assert "DAMAGED" not in listing.stdout
