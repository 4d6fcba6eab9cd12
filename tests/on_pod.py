"""`python -m tests.on_pod JSON COMMAND ...`: the application with RunPod's API at another address, and less patience.

JSON is an object with `api`, and what else goes otherwise than by itself: `late` is a file that puts the clock of the
money guard forward by a thousand hours once it is there, `gpu_percent` the utilisation of a GPU that NVML tells of,
`grace_minutes` the default of the config key.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path

import pytest

import app.__main__
import app.config_pod
import app.ops.pod
import app.ops.supervise_trainer
from tests.nvml_library import Card, Library, install

THOUSAND_HOURS_S = 3.6e6


def arrange(
    api: str, late: str | None = None, gpu_percent: int | None = None, grace_minutes: float | None = None
) -> None:
    """Put everything in place."""
    app.ops.pod.API = api
    app.ops.pod.FIRST_PAUSE_S, app.ops.pod.LONGEST_PAUSE_S, app.ops.pod.STOP_AGAIN_S = 0.02, 0.05, 0.2
    if late is not None:
        guard = app.ops.supervise_trainer.MoneyGuard
        ahead = functools.partial(guard, clock=lambda: time.monotonic() + THOUSAND_HOURS_S * Path(late).exists())
        vars(app.ops.supervise_trainer)["MoneyGuard"] = ahead
    if gpu_percent is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        install(pytest.MonkeyPatch(), Library(Card("GPU-1", gpu_percent=gpu_percent)))
    if grace_minutes is not None:
        shorter = functools.partial(app.config_pod.PodConfig, grace_minutes=grace_minutes)
        for module in (app.config_pod, app.ops.supervise_trainer):
            vars(module)["PodConfig"] = shorter


if __name__ == "__main__":
    arrange(**json.loads(sys.argv.pop(1)))
    sys.exit(app.__main__.main())
