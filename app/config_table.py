"""The README's tables of config keys and environment variables, made from the code that they describe."""

from __future__ import annotations

import json
from typing import Any

from app.config_fields import Key, keys
from app.env_variables import CLUSTER_VARIABLES, VARIABLES


def config_table() -> str:
    """Markdown table of every key: type and limits, default, whether a resumed run may change it, meaning."""
    head = ["| key | type | default | on resume | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(_row, keys())])


def environment_table() -> str:
    """Markdown table of every environment variable that the application reads."""
    head = ["| variable | default | meaning |", "|---|---|---|"]
    rows = [
        f"| `{item.name}` | {f'`{item.default}`' if item.default else ''} | {item.meaning} |"
        for item in (*VARIABLES, *CLUSTER_VARIABLES)
    ]
    return "\n".join([*head, *rows])


def _value(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def _row(key: Key) -> str:
    default = "required" if key.default is ... else "null" if key.default is None else f"`{_value(key.default)}`"
    if key.name == "stages.*.epochs":
        resume = "may grow if the schedule is constant"
    elif key.name == "compute.precision":
        resume = "the checkpoint's stays"
    else:
        resume = "may change" if key.operational else "fixed"
    return f"| `{key.name}` | {key.kind} | {default} | {resume} | {key.meaning} |"
