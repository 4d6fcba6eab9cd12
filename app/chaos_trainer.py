"""A trainer that is started to be killed: its process, and the moments at which it dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.env import child_environment
from app.errors import Stopped
from app.train.protocols import Stop

TERM, KILL = "SIGTERM", "SIGKILL"
METHODS = {"kill": (KILL,), "term": (TERM,), "mixed": (KILL, TERM)}
GRACE_S = 5.0
"""From SIGTERM to SIGKILL on a RunPod spot pod."""
POLL_S = 0.05
TAIL_BYTES, TAIL_LINES = 8192, 12

STARTUP_EVERY = 6
"""One kill in so many hits a start: imports, preparation, loading, rewinding."""
PATIENCE = 5
"""Attempts in a row that may save nothing new before the next one gets more time."""
LARGEST_DOUBLING = 20
SAVES_PER_KILL = 2
"""Rolling saves in the mean time between two kills: with fewer, hardly an attempt would come further."""
SHORTEST_INTERVAL_S = 1.5
"""For building the model, and some steps."""


@dataclass(frozen=True)
class Attempt:
    """One start of the trainer and its end."""

    code: int
    """A negative one is the number of the signal that ended it."""
    began: float
    """Seconds since 1970."""
    wall_s: float
    sent: str | None
    """The signal that it was sent first; None where it ended by itself."""
    sent_after_s: float
    left_s: float
    """From the signal to the end."""
    overdue: bool
    """It was killed for not ending, which nobody had planned."""
    tail: str
    """The last lines that it printed."""


class Trainer:
    """`python -m app train` in a workspace of its own, in a process group that dies as a whole."""

    def __init__(self, arguments: Sequence[str], workspace: Path, stop: Stop) -> None:
        """Nothing is started yet; what the trainers print goes to `<workspace>.out`."""
        self._command = [sys.executable, "-m", "app", "train", *arguments]
        self._output = workspace.with_name(f"{workspace.name}.out")
        self._stop = stop
        inherited = child_environment({"WORKSPACE": str(workspace), "WANDB_MODE": "disabled", "NOTIFY_URL": ""})
        # A rehearsal must not be able to stop the pod that it runs on.
        self._environment = {name: value for name, value in inherited.items() if not name.startswith("RUNPOD_")}

    def run(self, kill_after_s: float | None = None, method: str = KILL, limit_s: float | None = None) -> Attempt:
        """Start it and wait for its end.

        Args:
            kill_after_s: seconds from the start to the signal; None lets it end by itself.
            method: SIGKILL, or SIGTERM with SIGKILL after `GRACE_S`.
            limit_s: an attempt that nobody kills must end in this time.

        Raises:
            Stopped: the rehearsal was asked to stop; the trainer is dead.
        """
        sent, left_s, until = None, 0.0, limit_s if kill_after_s is None else kill_after_s
        with self._output.open("ab") as output:
            offset, began, start = output.tell(), time.time(), time.monotonic()
            child = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if not self._ends_within(child, until, start):
                sent = KILL if kill_after_s is None else method
                sent_at = time.monotonic()
                if sent == TERM:
                    _signal_group(child, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(GRACE_S)
                _signal_group(child, signal.SIGKILL)
                child.wait()
                left_s = time.monotonic() - sent_at
            wall_s = time.monotonic() - start
        finally:
            # Its workers too, however it ended, and also where this process was asked to stop.
            _signal_group(child, signal.SIGKILL)
            child.wait()
        overdue = sent is not None and kill_after_s is None
        return Attempt(
            child.returncode, began, wall_s, sent, wall_s - left_s, left_s, overdue, _tail(self._output, offset)
        )

    def _ends_within(self, child: subprocess.Popen[bytes], seconds: float | None, start: float) -> bool:
        while child.poll() is None:
            if self._stop():
                raise Stopped("the rehearsal was stopped; its trainer was killed")
            left = POLL_S if seconds is None else start + seconds - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(min(POLL_S, left))
        return True


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # Some systems say "not permitted" of a group in which only the dead are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _tail(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(offset, end - TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


def shortest_interval_s(save_every_s: float) -> float:
    """Mean time between two kills that still lets a run come further."""
    return max(SAVES_PER_KILL * save_every_s, SHORTEST_INTERVAL_S)


class Moments:
    """Draws when and how each attempt dies: spread over the training, some in the start-up, never standing still.

    Args:
        seed: of the draws.
        how: a key of `METHODS`.
        shortest_s: see `shortest_interval_s`.
    """

    def __init__(self, seed: int, how: str, shortest_s: float) -> None:
        self._source = random.Random(seed)
        self._methods = METHODS[how]
        self._shortest_s = shortest_s
        self._share = 1.0
        self._deck: list[bool] = []

    def method(self) -> str:
        """SIGTERM or SIGKILL."""
        return self._source.choice(self._methods)

    def kills_in(self, training_s: float, kills: int) -> int:
        """How many of `kills` a run of `training_s` seconds takes."""
        return max(1, min(kills, int(training_s / self._shortest_s)))

    def seconds(self, startup_s: float, left_s: float, kills: int, stalled: int) -> float:
        """Seconds from the start of an attempt to its kill.

        Args:
            startup_s: how long a start takes until it trains.
            left_s: training that is left.
            kills: how many of them it still gets, this one among them: k moments at random in an interval of length 1
                are 1 / (k + 1) apart in the mean.
            stalled: attempts in a row until now that saved nothing new; beyond `PATIENCE` the time doubles with each,
                so that whatever the trainer needs for its next save, it gets.
        """
        interval_s = self._share * max(self._shortest_s, left_s / (max(1, kills) + 1))
        if stalled >= PATIENCE:
            doubled = 2.0 ** min(stalled - PATIENCE + 1, LARGEST_DOUBLING)
            return doubled * (startup_s + self._source.uniform(interval_s, 2 * interval_s))
        if self._hits_a_start():
            return self._source.uniform(0, startup_s)
        return startup_s + self._source.uniform(0, 2 * interval_s)

    def _hits_a_start(self) -> bool:
        # Dealt, not drawn: a rehearsal of a few kills has its share of these as well.
        if not self._deck:
            self._deck = [True] + [False] * (STARTUP_EVERY - 1)
            self._source.shuffle(self._deck)
        return self._deck.pop()

    def hurry(self) -> None:
        """Kill twice as early from now on: a whole run went by without a kill."""
        self._share /= 2
