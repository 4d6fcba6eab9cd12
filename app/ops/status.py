"""How far the run is: `status.json` for `python -m app status` and probes, a bar on a terminal."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tqdm import tqdm

from app.config import Config
from app.workspace import RunDir, atomic_write

WRITE_EVERY_S = 5.0
SMOOTHING = 0.05
"""Weight of the newest step in the mean step time."""


class RunStatus:
    """Collects fields; writes the file at most every few seconds, and at once when the stage or epoch changes."""

    def __init__(self, run_dir: RunDir, config: Config) -> None:
        """Start with what an earlier attempt wrote."""
        self.path = run_dir.status
        self.config = config
        self.fields: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fields["started"] = time.time()
        self._written = 0.0
        self._step_seconds: float | None = None
        self._bar: tqdm[Any] | None = None

    def __call__(self, **fields: Any) -> None:
        """Merge fields; a change of anything but the step's own figures is written at once."""
        seconds = fields.pop("step_seconds", None)
        self.fields.update(fields)
        if seconds is not None:
            self._advance(seconds)
        if seconds is None or time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the file now."""
        self._written = time.monotonic()
        atomic_write(self.path, json.dumps({**self.fields, "time": time.time()}, indent=1).encode())

    def close(self, state: str) -> None:
        """The last word: finished, stopped or refused."""
        self._close_bar()
        self(state=state)

    def _advance(self, seconds: float) -> None:
        mean = self._step_seconds
        if mean is None or self._bar is None or self._bar.desc != self.fields["stage"]:
            mean = seconds
            self._open_bar()
        self._step_seconds = mean + SMOOTHING * (seconds - mean)
        left = self.fields["steps"] - self.fields["step"]
        self.fields["step_seconds"] = self._step_seconds
        self.fields["stage_eta_s"] = left * self._step_seconds
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {self.fields['epoch'] + 1} loss {self.fields['loss']:.4f}", refresh=False)
            self._bar.update(1)

    def _open_bar(self) -> None:
        self._close_bar()
        self._bar = tqdm(
            desc=self.fields["stage"],
            total=self.fields["steps"],
            initial=self.fields["step"] - 1,
            unit="step",
            disable=not sys.stderr.isatty(),
        )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
