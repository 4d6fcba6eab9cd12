"""How far the run is: `status.json` for `python -m app status` and probes, a bar on a terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from app.errors import MachineError
from app.ops.costs import cost_lines, spent_by
from app.ops.ledger_history import History, read_history
from app.ops.ledger_table import as_json, duration, goodput_text, text_table, totals
from app.ops.wandb_offline import sync_command
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

WRITE_EVERY_S = 5.0
SMOOTHING = 0.05
"""Weight of the newest step in the mean step time."""


class RunStatus:
    """Collects fields; writes the file at most every few seconds, and at once when the stage or epoch changes."""

    def __init__(self, run_dir: RunDir) -> None:
        """Start with what an earlier attempt wrote."""
        self.path = run_dir.status
        self.fields: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.fields["started"] = time.time()
        self._written = 0.0
        self._failed = False
        self._step_seconds = 0.0
        self._stage: str | None = None
        self._bar: tqdm[Any] | None = None

    def __call__(self, **fields: Any) -> None:
        """Merge fields; a change of anything but the step's own figures is written at once."""
        seconds = fields.pop("step_seconds", None)
        self.fields.update(fields)
        if seconds is not None:
            self._advance(seconds)
        if seconds is None or time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def note(self, **fields: Any) -> None:
        """Merge fields that the next write takes along; None removes one."""
        self.fields.update(fields)
        for name in [name for name in fields if fields[name] is None]:
            del self.fields[name]

    def write(self) -> None:
        """Write the file now."""
        self._written = time.monotonic()
        try:
            text = json.dumps({**self.fields, "time": time.time()}, indent=1)
            atomic_write(self.path, text.encode(), durable=False)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written: %s", self.path, error.strerror)
            self._failed = True

    def eta_s(self) -> float | None:
        """Seconds to the end of the stage under way; None before its first step."""
        eta: float | None = self.fields.get("stage_eta_s")
        return eta

    def close(self, state: str) -> None:
        """The last word: finished, stopped or refused."""
        self._close_bar()
        self(state=state)

    def _advance(self, seconds: float) -> None:
        if self._stage != self.fields["stage"]:
            self._stage, self._step_seconds = self.fields["stage"], seconds
            self._open_bar()
        self._step_seconds += SMOOTHING * (seconds - self._step_seconds)
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


def read_status(run_dir: RunDir) -> dict[str, Any]:
    """What the run wrote last.

    Raises:
        MachineError: there is no run, or the file cannot be read.
    """
    try:
        fields: dict[str, Any] = json.loads(run_dir.status.read_text())
    except FileNotFoundError as error:
        others = sorted(path.parent.name for path in run_dir.path.parent.glob("*/status.json"))
        hint = f"; runs here: {', '.join(others)} (--config or RUN_NAME chooses one)" if others else ""
        raise MachineError(f"{run_dir.status}: no run has started here{hint}") from error
    except (OSError, ValueError) as error:
        raise MachineError(f"{run_dir.status}: cannot be read: {error}") from error
    return fields


def status_text(run_dir: RunDir, fields: dict[str, Any]) -> str:
    """The status for people, a line per fact."""
    age = time.time() - fields["time"]
    lines = [("run", str(run_dir.path)), ("state", f"{fields.get('state', 'unknown')}, updated {duration(age)} ago")]
    if "step" in fields:
        lines += [
            ("stage", fields["stage"]),
            ("epoch", f"{fields['epoch']} of {fields['epochs']} completed"),
            ("step", f"{fields['step']} of {fields['steps']}"),
            ("loss", f"{fields['loss']:.5f} in the last step"),
        ]
    if "val_loss" in fields:
        lines.append(("validation", f"{fields['val_loss']:.5f}, best {fields['best_val_loss']:.5f}"))
    if "stage_eta_s" in fields and fields.get("state") == "training":
        lines.append(("stage ends in", duration(fields["stage_eta_s"])))
    if "checkpoint" in fields:
        lines.append(("checkpoint", f"{fields['checkpoint_file']} at step {fields['checkpoint']}"))
    if fields.get("memory"):
        lines.append(("memory", fields["memory"]))
    if fields.get("alarm"):
        lines.append(("ALARM", fields["alarm"]))
    if run_dir.reason.exists():
        lines.append(("REASON", run_dir.reason.read_text().strip()))
    if (command := sync_command(run_dir)) is not None:
        lines.append(("to W&B", command))
    history, goodput = _attempts(run_dir, fields)
    if history.attempts:
        lines += [("attempts", totals(history)), ("goodput", goodput_text(history, goodput))]
        lines += [("cost", text) for text in cost_lines(spent_by(history, run_dir), fields)]
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)
    return f"{text}\n\n{text_table(history)}" if history.attempts else text


def status_json(run_dir: RunDir, fields: dict[str, Any]) -> str:
    """The status for programs; with it the ledger, goodput, cost, and how an offline run is sent to W&B."""
    history, goodput = _attempts(run_dir, fields)
    ledger = {**as_json(history, goodput), "spent": asdict(spent_by(history, run_dir))}
    return json.dumps({**fields, "ledger": ledger, "wandb_sync": sync_command(run_dir)}, indent=1)


def _attempts(run_dir: RunDir, fields: dict[str, Any]) -> tuple[History, float | None]:
    """The ledger, and the goodput up to the newest sign of life."""
    try:
        history = read_history(run_dir.ledger)
    except OSError as error:
        raise MachineError(f"{run_dir.ledger}: cannot be read: {error.strerror}") from error
    newest = max([fields["time"], *(attempt.last_sign for attempt in history.attempts)])
    return history, history.goodput(fields.get("run_seconds", 0.0), newest)
