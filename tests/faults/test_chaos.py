"""The rehearsal as a user runs it: it passes on a run that survives, and it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY
from tests.runs import RUN, command, train

SAVE_SOMETIMES = ("--set", "checkpoint.save_every_s=0.15")


def chaos(workspace: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """`python -m app chaos --json`: exit code, verdict, log."""
    finished = subprocess.run(
        [sys.executable, "-m", "app", "chaos", "--config", str(TINY), *SAVE_SOMETIMES, "--json", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "WORKSPACE": str(workspace), "TMPDIR": str(workspace)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.stdout, finished.stderr
    return finished.returncode, json.loads(finished.stdout), finished.stderr


def test_ten_kills_pass(tmp_path: Path) -> None:
    """Ten kills, TERM and KILL: each start goes on, every checkpoint and curve is equal, nothing is left behind."""
    code, verdict, log = chaos(tmp_path, "--kills", "10")
    assert code == 0, log
    assert verdict["verdict"] == "pass"
    assert verdict["kills"] == 10
    assert {kill["signal"] for kill in verdict["each_kill"]} == {"SIGKILL", "SIGTERM"}
    assert verdict["unresumable"] == 0
    assert verdict["checkpoints"]["compared"] == 13 * verdict["rounds"]
    assert verdict["checkpoints"]["different"] == verdict["curves"]["different"] == []
    assert verdict["term"]["lost_steps"] == 0
    assert len(verdict["final_sha256"]) == 3
    assert "kill 10 of 10: SIG" in log
    assert list(tmp_path.glob("chaos-*")) == [], "the scratch folder of a good rehearsal is deleted"
    assert not (tmp_path / "hybrid_vit_cascade").exists(), "the workspace of the user is not written in"


def test_another_run_as_reference_fails(tmp_path: Path) -> None:
    """A reference of another seed: exit code 1, the files that differ are named, the scratch folder stays."""
    workspace, scratch = tmp_path / "other", tmp_path / "scratch"
    code, output = train(workspace, "--set", "seed=1", "--stages", "stage_8")
    assert code == 0, output
    arguments = ("--kills", "1", "--how", "kill", "--stages", "stage_8", "--reference", str(workspace / RUN))
    code, verdict, log = chaos(tmp_path, *arguments, "--workspace", str(scratch))
    assert code == 1, log
    assert verdict["verdict"] == "fail"
    assert any("stage_8_final.pt: " in text for text in verdict["checkpoints"]["different"])
    assert any("stage_8/val_loss: " in text for text in verdict["curves"]["different"])
    assert verdict["unresumable"] == 0
    assert (scratch / "victim-1" / RUN / "stage_8_final.pt").exists()


def test_a_reference_that_does_not_finish_is_an_error(tmp_path: Path) -> None:
    """What the trainer said is passed on."""
    code = command(tmp_path, "chaos", "--config", str(TINY), "--stages", "stage_9", env={"TMPDIR": str(tmp_path)})
    assert code.returncode == 1
    assert "ended with exit code 78" in code.stdout
    assert "no such stage" in code.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--workspace", "."), 78, "expected an empty folder or none"),
        (("--reference", "docs"), 78, "found no stage_..._final.pt"),
        (("--set", "init_from=other"), 78, "Add --set init_from=null"),
        (("--kills", "0"), 2, "expected a whole number from 1, found '0'"),
        (("--how", "gently"), 2, "invalid choice: 'gently'"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: tuple[str, ...], code: int, text: str) -> None:
    """Before anything is trained."""
    finished = command(tmp_path, "chaos", "--config", str(TINY), *arguments)
    assert finished.returncode == code
    assert text in finished.stdout
    assert "Traceback" not in finished.stdout
