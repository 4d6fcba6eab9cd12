"""Containers whose run cannot start, has finished, or loses its disk: they say so and stay, and never loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.container.engine import Container
from tests.runs import RUN
from tests.scans import write_scan

CONFIG = {"CONFIG": "/workspace/tiny.yaml"}
QUIET_S = 12.0
"""Longer than any pause between two starts of a trainer."""


def assert_parked(container: Container, starts: int) -> None:
    """The container runs on, the dashboard answers, and no further trainer is started."""
    container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
    log = container.logs()
    with pytest.raises(AssertionError, match="not within"):
        container.wait_for(lambda: len(trainer_starts(container.logs())) > starts, "another start", QUIET_S)
    assert container.state()["Running"]
    assert len(trainer_starts(container.logs())) == starts, log


def trainer_starts(log: str) -> list[str]:
    """The lines of a log that say that a trainer began to work."""
    return [line for line in log.splitlines() if "spawned: 'trainer'" in line]


def test_a_config_that_asks_for_a_gpu_parks_without_one(workspace: Path) -> None:
    """Exit code 69 once, never trained on the CPU; the reason is in the log and beside the checkpoints."""
    with Container("train", "--set", "compute.device=cuda", workspace=workspace, env=CONFIG) as container:
        container.wait_for((workspace / RUN / "REASON").exists, "REASON")
        assert_parked(container, starts=1)
        assert "exit status 69" in container.logs()
    assert "exit code 69" in (workspace / RUN / "REASON").read_text()
    assert not list((workspace / RUN).glob("*.pt"))


def test_a_bad_config_is_reported_once(workspace: Path) -> None:
    """All its findings are in `docker logs`, and the dashboard is up."""
    with Container("train", "--set", "stages.stage_8.epoch=3", workspace=workspace, env=CONFIG) as container:
        container.wait_for_log("stages.stage_8.epoch")
        assert_parked(container, starts=1)
        assert "exit status 78" in container.logs()
        container.stop(10)
        container.start()
        container.wait_for_log("stages.stage_8.epoch", count=2)
        assert_parked(container, starts=2)


def test_an_empty_data_folder_waits_for_cts(workspace: Path) -> None:
    """It says so, stays healthy, and trains by itself when scans arrive."""
    with Container("train", "--set", "data.source=ct", workspace=workspace, env=CONFIG) as container:
        container.wait_for_log("waiting")
        container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
        incoming = workspace.parent / "incoming"
        for index in range(3):
            write_scan(incoming / f"patient_{index}.nii.gz", index)
        for path in sorted(incoming.iterdir()):
            shutil.copyfile(path, workspace / "data" / path.name)
        container.wait_for((workspace / RUN / "DONE").exists, "DONE", limit_s=180)


def test_a_finished_run_does_not_train_again(workspace: Path) -> None:
    """Restarted: it says so and serves its curves."""
    with Container("train", "--stages", "stage_8", workspace=workspace, env=CONFIG) as container:
        container.wait_for_log("finished: --stages stage_8")
    with Container(workspace=workspace, env=CONFIG) as container:
        container.wait_for((workspace / RUN / "DONE").exists, "DONE", limit_s=180)
        before = times(workspace / RUN)
        container.stop(10)
        container.start()
        container.wait_for_log("finished", count=2)
        container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
        assert container.state()["Running"]
        assert times(workspace / RUN) == before


def times(run: Path) -> dict[str, int]:
    """When each checkpoint and event file was written."""
    paths = [*run.glob("*.pt"), *run.glob("tensorboard/*")]
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in paths}


def test_a_read_only_workspace_is_named(workspace: Path) -> None:
    """A message that says what to mount, exit code 69 once, and a container that stays."""
    with Container(env=CONFIG, options=("--volume", f"{workspace}:/workspace:ro")) as container:
        container.wait_for_log("Mount a writable volume there")
        assert_parked(container, starts=1)
        assert "cannot write in /workspace" in container.logs()
        assert "exit status 69" in container.logs()
    assert [path.name for path in workspace.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize("size", [400_000, 3_000_000], ids=["preparing", "training"])
def test_a_workspace_that_fills_up_leaves_whole_files(image: str, size: int) -> None:
    """On a small disk: a message that names the full disk, a container that stays, and every checkpoint verifies."""
    disk = ("--mount", f"type=tmpfs,destination=/workspace,tmpfs-size={size}", "--volume", f"{TINY}:/etc/tiny.yaml:ro")
    with Container(env={"CONFIG": "/etc/tiny.yaml"}, options=disk) as container:
        container.wait_for_log("No space left on device. The checkpoints so far are whole")
        assert_parked(container, starts=1)
        assert "exit status 69" in container.logs()
        listing = container.run("python", "-m", "app", "checkpoints", check=False)
        assert "DAMAGED" not in listing
