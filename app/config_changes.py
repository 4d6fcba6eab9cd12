"""What changed in the config between two attempts of one run, and whether the run may go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import Config
from app.config_fields import operational_keys
from app.config_file import config_as_dict, config_from_checkpoint
from app.config_findings import shown

PRECISION = "compute.precision"


@dataclass(frozen=True)
class Difference:
    """One key with two values; `stages` are named, as in `stages.stage_64.epochs`."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)}"


def differences(old: Mapping[str, Any], new: Config, path: Path) -> tuple[list[Difference], list[Difference]]:
    """Compares the config of a checkpoint with the one of this start.

    Args:
        old: as `config_as_dict` made it; keys that it lacks have their defaults.
        new: the config of this start.
        path: the checkpoint, for messages.

    Returns:
        (scientific, operational) differences. The length of a stage is operational only where it grows under a
        constant learning rate without a physics loss; the precision always is, because a resumed run keeps the
        checkpoint's.

    Raises:
        CheckpointError: `old` does not fit the schema.
    """
    before = dict(_leaves(config_as_dict(config_from_checkpoint(old, path)), ()))
    after = dict(_leaves(config_as_dict(new), ()))
    found = [Difference(key, before[key], after[key]) for key in before if key in after and before[key] != after[key]]
    scientific = [difference for difference in found if not _is_operational(difference, new)]
    return scientific, [difference for difference in found if difference not in scientific]


def refusal(scientific: Sequence[Difference]) -> str:
    """The message for a resume with changed scientific settings."""
    rows = [("setting", "in the checkpoint", "now")]
    rows += [(item.key, shown(item.old), shown(item.new)) for item in scientific]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(
        [
            "this run was started with other scientific settings, and its curves would not continue:",
            *table,
            "put the old values back, or start a new run with another run_name (RUN_NAME=...)",
        ]
    )


def _is_operational(difference: Difference, new: Config) -> bool:
    parts = difference.key.split(".")
    if parts[0] == "stages" and len(parts) > 1:
        parts[1] = "*"
    if parts == ["stages", "*", "epochs"]:
        # The physics ramp is a share of the epochs: with it, another length is another weight in every epoch.
        same_start = new.optimizer.schedule == "constant" and new.physics.weight == 0
        return same_start and bool(difference.new > difference.old)
    key = ".".join(parts)
    return key == PRECISION or key in operational_keys()


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif path == ("stages",):
        yield "stages", [f"stage_{stage['resolution']}" for stage in value]
        for stage in value:
            yield from _leaves(stage, (*path, f"stage_{stage['resolution']}"))
    else:
        yield ".".join(path), value
