"""What the ledger of a run (`app.ops.ledger`) says: its attempts, how each ended at what cost, and the goodput."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from app.errors import AppError, Stopped

FINISHED, STOPPED, REFUSED, CRASHED = "finished", "stopped", "refused", "crashed"
"""What an attempt says of its own end."""
KILLED, HUNG, VANISHED = "killed", "hung", "vanished"
"""What others say of it: a supervisor saw a signal, its watchdog ended it, or nobody was there."""


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    kind: str
    code: int | None
    """Exit code; a negative one is the number of the signal that killed it; None where nobody saw it."""
    global_step: int | None
    """Completed steps of the run, saved or not."""
    time: float | None
    """Seconds since 1970; None where nobody saw it."""


@dataclass(frozen=True)
class Place:
    """Where an attempt goes on and on what."""

    device: str
    """Model of the GPU, or cpu."""
    stage: str
    epoch: int
    """Completed epochs of the stage."""
    step: int
    """Completed steps of the stage."""
    global_step: int
    """Completed steps of all stages."""
    run_seconds: float
    """Spent so far on the steps that count and their validations."""


@dataclass
class Attempt:
    """One attempt, by its lines."""

    number: int
    began: float
    """Start of its process; all times are seconds since 1970."""
    time: float
    """Of this line: the state is loaded."""
    host: str
    pod: str | None
    """At RunPod."""
    place: Place
    previous: End | None
    """End of the attempt before; None for the first one."""
    lost_steps: int
    """Completed by the attempt before and not saved; done again in this one."""
    repeated_s: float
    """Seconds that the attempt before had spent on them."""
    down_s: float
    """Seconds from its last sign of life to the start of this one's process."""
    usd_per_hour: float | None = None
    """Price of the machine; None where it was not known."""
    first_step: float | None = None
    """When the first step was completed."""
    end: End | None = None
    """By its own last line."""

    @property
    def startup_s(self) -> float | None:
        """Seconds from the start of the process, or of its turn, to the end of the first step; None before that."""
        return None if self.first_step is None else self.first_step - self.began

    @property
    def last_sign(self) -> float:
        """When its newest line was written."""
        return max(self.time, self.first_step or 0.0, (self.end and self.end.time) or 0.0)


@dataclass
class History:
    """All attempts of a run."""

    attempts: list[Attempt] = field(default_factory=list)
    turned_away: list[End] = field(default_factory=list)
    """Ends before it was known where to go on: bad data, a machine without a GPU."""
    torn: int = 0
    """Lines that cannot be read: a write was killed, or the volume was full."""

    def end_of(self, index: int) -> End | None:
        """How an attempt ended, by what the next one found or by its own word; None: it may still run."""
        found = self.attempts[index + 1].previous if index + 1 < len(self.attempts) else None
        return found or self.attempts[index].end

    def goodput(self, run_seconds: float, until: float) -> float | None:
        """Share of the time since the first start that went into steps that count and their validations.

        Args:
            run_seconds: spent on them so far.
            until: end of the time that is looked at, in seconds since 1970.

        Returns:
            A number in [0, 1]; None before the first start.
        """
        if not self.attempts or until <= self.attempts[0].began:
            return None
        first = self.attempts[0]
        return min(1.0, max(0.0, (run_seconds - first.place.run_seconds) / (until - first.began)))

    def spent_s(self, until: float) -> list[float]:
        """Seconds of each attempt, from the start of its process to its end or last sign of life.

        Args:
            until: where the last attempt is taken to end if it does not say itself, in seconds since 1970.
        """
        ends = [following.began - following.down_s for following in self.attempts[1:]]
        if self.attempts:
            last = self.attempts[-1]
            ends.append((last.end and last.end.time) or until)
        return [max(0.0, end - attempt.began) for attempt, end in zip(self.attempts, ends, strict=True)]

    def cost_usd(self, until: float, usd_per_hour: float | None = None) -> float | None:
        """What all attempts cost; None where no price is known.

        Args:
            until: see `spent_s`.
            usd_per_hour: of an attempt on a pod whose price was not known; at a desk such an attempt costs nothing.
        """
        prices = [attempt.usd_per_hour or (attempt.pod and usd_per_hour) or None for attempt in self.attempts]
        if not any(prices) and usd_per_hour is None:
            return None
        return sum(seconds / 3600 * (price or 0.0) for seconds, price in zip(self.spent_s(until), prices, strict=True))


def kind_of(code: int) -> str:
    """What an exit code says of an end."""
    if code < 0:
        return KILLED
    refusals = {error.exit_code for error in AppError.__subclasses__()} - {Stopped.exit_code}
    return {0: FINISHED, Stopped.exit_code: STOPPED}.get(code, REFUSED if code in refusals else CRASHED)


def read_history(path: Path) -> History:
    """The ledger; what is torn in it is counted.

    Raises:
        OSError: the volume does not answer.
    """
    history = History()
    by_number: dict[int, Attempt] = {}
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            event, number = line.pop("event"), line.pop("attempt", None)
            if event == "start":
                previous = line.pop("previous")
                place, end = Place(**line.pop("place")), None if previous is None else End(**previous)
                attempt = Attempt(**line, place=place, previous=end)
                by_number[attempt.number] = attempt
                history.attempts.append(attempt)
            elif event == "end" and number is None:
                history.turned_away.append(End(**line))
            elif event == "end" and number in by_number:
                by_number[number].end = End(**line)
            elif event == "step" and number in by_number:
                by_number[number].first_step = line["time"]
        except (ValueError, KeyError, TypeError, AttributeError):
            history.torn += 1
    return history
