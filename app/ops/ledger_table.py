"""The ledger of a run for people: a table for TensorBoard and the terminal, totals, and the same as JSON."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from app.ops.ledger_history import End, History

SHOWN = 20
"""Attempts in a table, the newest; the totals are of all."""
HEADER = ("#", "start (UTC)", "device", "goes on at", "end", "steps", "lost steps", "repeated", "down", "start-up")
"""`lost steps`, `repeated` and `down` are what the end of the attempt before had cost."""


def markdown(history: History, goodput: float | None) -> str:
    """Totals and a table in Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *_rows(history)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{totals(history)}; goodput {goodput_text(history, goodput)}\n\n{_earlier(history)}{table}\n"


def text_table(history: History) -> str:
    """The table with columns of equal width."""
    rows = [HEADER, *_rows(history)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return _earlier(history) + "\n".join(lines)


def totals(history: History) -> str:
    """How often, how, and at what cost the run was interrupted, in a line."""
    resumed = [attempt for attempt in history.attempts if attempt.previous is not None]
    kinds = Counter(attempt.previous.kind for attempt in resumed if attempt.previous is not None)
    how = f" ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})" if kinds else ""
    steps = sum(attempt.lost_steps for attempt in history.attempts)
    repeated = duration(sum(attempt.repeated_s for attempt in history.attempts))
    down = duration(sum(attempt.down_s for attempt in history.attempts))
    torn = f"; {_count(history.torn, 'torn line')} in the ledger" if history.torn else ""
    again = f"{_count(steps, 'step')} ({repeated}) done again"
    return f"{_count(len(resumed), 'interruption')}{how}: {again}, {down} down{torn}"


def goodput_text(history: History, goodput: float | None) -> str:
    """The share of the time that went into steps that count."""
    if goodput is None or not history.attempts:
        return "not known yet"
    return f"{100 * goodput:.1f} % of the time since {_moment(history.attempts[0].began)} UTC"


def as_json(history: History, goodput: float | None) -> dict[str, Any]:
    """Everything; times in seconds since 1970."""
    attempts = []
    for index, attempt in enumerate(history.attempts):
        end = history.end_of(index)
        attempts.append(
            {**asdict(attempt), "startup_s": attempt.startup_s, "end": None if end is None else asdict(end)}
        )
    turned_away = [asdict(end) for end in history.turned_away]
    return {"goodput": goodput, "attempts": attempts, "turned_away": turned_away, "torn_lines": history.torn}


def duration(seconds: float) -> str:
    """`3 h 05 min`, `5 min 03 s` or `3 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _rows(history: History) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for index in range(len(history.attempts))[-SHOWN:]:
        attempt, end = history.attempts[index], history.end_of(index)
        place, reached = attempt.place, None if end is None else end.global_step
        rows.append(
            (
                str(attempt.number),
                _moment(attempt.began),
                place.device,
                f"{place.stage} step {place.step}",
                _how(end),
                "" if reached is None else str(reached - place.global_step),
                str(attempt.lost_steps),
                duration(attempt.repeated_s),
                duration(attempt.down_s),
                "" if attempt.startup_s is None else duration(attempt.startup_s),
            )
        )
    return rows


def _how(end: End | None) -> str:
    if end is None:
        return ""
    return end.kind if end.code in (None, 0) else f"{end.kind} ({end.code})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _earlier(history: History) -> str:
    hidden = len(history.attempts) - SHOWN
    return f"{hidden} earlier attempts are not shown.\n\n" if hidden > 0 else ""
