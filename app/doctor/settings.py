"""Checks of what the run is told: config, variables, secrets, launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.config import Config
from app.doctor.finding import Finding, Verdict, passed, warned
from app.env import ClusterNode


def config_loaded(path: str, config: Config) -> Finding:
    """A valid config."""
    run = "without a name" if config.run_name is None else config.run_name
    return passed("config", f"{path}: run {run}, {', '.join(stage.name for stage in config.stages)}")


def config_refused(problem: str) -> Finding:
    """A config that is not valid, and why."""
    what = "Correct it: train refuses it, too (78). Checks that need it were left out"
    return Finding("config", Verdict.FAIL, problem, what, of_config=True)


def variables(problems: Sequence[str]) -> Finding:
    """Variables with values that they may not have."""
    if not problems:
        return passed("variables", "every variable has a value that it may have")
    what = "Correct them in the pod's or the container's settings: every other command refuses to start"
    return Finding("variables", Verdict.FAIL, "; ".join(problems), what, of_config=True)


def secrets(placeholders: Mapping[str, str]) -> Finding:
    """Placeholders that RunPod left in place of secrets that do not exist."""
    if not placeholders:
        return passed("secrets", "no unresolved {{ RUNPOD_SECRET_... }}")
    found = "; ".join(f"{name} holds the unresolved placeholder {text}" for name, text in placeholders.items())
    what = (
        "Create that secret in the RunPod console, or set the variable itself; one of ours counts as unset until then"
    )
    return warned("secrets", found, what)


def launch(preset: Mapping[str, str], node: ClusterNode | None) -> Finding:
    """Variables of a launcher that nobody launched with, or this machine's place in a cluster."""
    if node is not None:
        where = f"{node.address}:{node.port}"
        return passed("launch", f"machine {node.rank + 1} of {node.count} of a cluster, which meet at {where}")
    if not preset:
        return passed("launch", "a machine by itself")
    found = ", ".join(f"{name}={value}" for name, value in preset.items())
    if preset.get("WORLD_SIZE", "1") == "1":
        return passed("launch", f"{found}: preset, and one process is all of it")
    what = (
        "They are not believed: this machine trains by itself, on all of its GPUs. The machines of a cluster train "
        "together where NUM_NODES (more than 1), NODE_RANK, MASTER_ADDR and MASTER_PORT are set"
    )
    return warned("launch", f"{found} are preset, and no launcher started this process", what)
