"""An offline run of the trainer, and the command that sends it, typed as it is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from app.ops.wandb_offline import sync_command
from app.tags import axis, is_axis
from app.train.checkpoint import file_sha256
from app.workspace import RunDir
from tests.conftest import TINY
from tests.runs import RUN, command, train
from tests.wandb_files import tensorboard_points
from tests.wandb_server import Server, serving, wandb_env

ASKED = (
    *("--stages", "stage_8", "--set", "stages.stage_8.epochs=2"),
    *("--set", "wandb.checkpoints=true", "--set", "wandb.images=true"),
)


def scalars(server: Server) -> dict[str, list[tuple[int, float]]]:
    """What the server has, by tag."""
    found = defaultdict(list)
    for row in server.history:
        for tag, value in row.items():
            if not is_axis(tag) and axis(tag) in row and isinstance(value, int | float):
                found[tag].append((row[axis(tag)], float(value)))
    return dict(found)


def test_the_printed_command_sends_the_whole_run(tmp_path: Path) -> None:
    """Log and status print it; the server gets curves, bests, config, pictures and checkpoints, and no path."""
    code, output = train(tmp_path, *ASKED, env={"WANDB_MODE": "offline"})
    assert code == 0, output
    (printed,) = re.findall(r"this run is sent to Weights & Biases by: (.*)", output)
    status = ("status", "--config", str(TINY))
    assert f"to W&B      {printed}\n" in command(tmp_path, *status).stdout
    assert json.loads(command(tmp_path, *status, "--json").stdout)["wandb_sync"] == printed
    with serving() as server:
        # As in a shell that does not have the trainer's variables.
        env = {"PATH": os.defpath, "HOME": str(tmp_path / "home"), **wandb_env(server.address)}
        done = subprocess.run(printed, shell=True, env=env, capture_output=True, text=True, check=False, timeout=120)  # noqa: S602
        assert done.returncode == 0, done.stderr
        assert "Finished syncing" in done.stderr
    run = RunDir(tmp_path / RUN)
    points = tensorboard_points(run.tensorboard)
    assert scalars(server) == {tag: [(step, pytest.approx(value)) for step, value in points[tag]] for tag in points}
    trained = {
        tag: [value for epoch, value in points[f"stage_8/{tag}"] if epoch] for tag in ("val_loss", "val_psnr_db")
    }
    assert server.summary["stage_8/best_val_loss"] == pytest.approx(min(trained["val_loss"]))
    assert server.summary["stage_8/best_val_psnr_db"] == pytest.approx(max(trained["val_psnr_db"]))
    assert server.config["wandb"]["value"]["checkpoints"] is True
    sent = {name: file_sha256(run.checkpoint("stage_8", name)) for name in ("best", "final")}
    aliases = {alias: artifact for artifact in server.artifacts for alias in artifact.aliases if artifact.committed}
    assert {alias: aliases[alias].metadata["sha256"] for alias in sent} == sent
    requests = b"".join(server.requests)
    assert b"stage_8/held_out_1" in requests
    assert str(tmp_path).encode() not in requests
    assert sync_command(run) is None
    assert "to W&B" not in command(tmp_path, *status).stdout


def test_only_an_offline_run_that_was_not_sent_needs_a_command(tmp_path: Path) -> None:
    """The newest one counts, a folder with a blank is quoted, and a run that grew after it was sent is sent again."""
    run = RunDir(tmp_path / "my runs")
    assert sync_command(run) is None
    for name in ("offline-run-20260131_235959-abcd1234", "offline-run-20260201_000001-abcd1234"):
        (run.wandb / name).mkdir(parents=True)
        (run.wandb / name / "run-abcd1234.wandb").touch()
    found = sync_command(run)
    assert found is not None
    assert found.startswith(f"cd '{tmp_path}/my runs' && ")
    assert found.endswith("/wandb sync --include-synced wandb/offline-run-20260201_000001-abcd1234")
    record = run.wandb / "offline-run-20260201_000001-abcd1234/run-abcd1234.wandb"
    record.with_name("run-abcd1234.wandb.synced").touch()
    os.utime(record, (1e9, 1e9))
    assert sync_command(run) is None
    os.utime(record, (4e9, 4e9))
    assert sync_command(run) == found
