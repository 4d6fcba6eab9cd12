"""The doctor inside the image: what Docker gives a container, and what it finds of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

TINY = ("--env", "CONFIG=/workspace/tiny.yaml")


def doctor(image: str, workspace: Path, *options: str, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and findings by name."""
    mounted = ["--volume", f"{workspace}:/workspace", *TINY]
    done = subprocess.run(
        ["docker", "run", "--rm", *mounted, *options, image, "doctor", "--json", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    findings = json.loads(done.stdout)["findings"]
    return done.returncode, {finding["name"]: finding for finding in findings}


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    """Of what is not as it should be."""
    return {name: finding["verdict"] for name, finding in found.items() if finding["verdict"] != "PASS"}


def test_a_container_with_a_volume_is_well(image: str, workspace: Path) -> None:
    """Nothing to complain about, and nothing of it is left in the workspace."""
    code, found = doctor(image, workspace)
    assert (code, verdicts(found)) == (0, {})
    assert "mounted at /workspace" in found["volume"]["found"]
    assert found["config"]["found"].startswith("/workspace/tiny.yaml: run tiny")
    assert [path.name for path in workspace.iterdir()] == ["tiny.yaml"]


def test_a_container_that_was_given_too_little(image: str, workspace: Path) -> None:
    """1 MiB of shared memory, 1 GiB of memory, no GPU, no network and no secret: a line each, and 69."""
    limits = ("--shm-size", "1m", "--memory", "1g", "--network", "none")
    pod = ("--env", "RUNPOD_POD_ID=abc", "--env", "RUNPOD_API_KEY=rpa_1", "--env", f"WANDB_API_KEY={40 * 'a'}")
    secret = ("--env", "HF_TOKEN={{ RUNPOD_SECRET_hf }}")
    changed = ("--set", "compute.device=cuda", "--set", "compute.workers=4")
    code, found = doctor(image, workspace, *limits, *pod, *secret, arguments=changed)
    assert (code, verdicts(found)) == (
        69,
        {
            "secrets": "WARN",
            "pod_disk": "WARN",
            "gpus": "FAIL",
            "shm": "FAIL",
            "ram": "FAIL",
            "wandb": "WARN",
            "runpod": "WARN",
        },
    )
