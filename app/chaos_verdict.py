"""What a rehearsal found: a line for each kill, a table, a verdict."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.chaos_trainer import TERM
from app.errors import Stopped

SHOWN = 10
"""Differences that the table lists."""
HASH_DIGITS = 12


@dataclass
class KillRecord:
    """One kill, and where the run went on after it."""

    number: int
    signal: str
    after_s: float
    left_s: float
    """From the signal to the end of the process."""
    code: int
    stage: str | None
    """Where it hit; None where the trainer did not train yet."""
    step: int
    resumed_stage: str | None = None
    resumed_step: int = 0
    lost_steps: int = 0

    def line(self, planned: int) -> str:
        """For the log."""
        parts = [f"kill {self.number} of {planned}: {self.signal} after {self.after_s:.1f} s"]
        parts.append("before it trained" if self.stage is None else f"in {self.stage} step {self.step}")
        if self.signal == TERM:
            parts.append(f"(exit code {self.code} in {self.left_s:.1f} s)")
        text = " ".join(parts)
        if self.resumed_stage is None:
            return text if self.stage is None else f"{text}; nothing was left to train"
        where = "" if self.resumed_stage == self.stage else f"{self.resumed_stage} "
        went_on = f"{text}; resumed at {where}step {self.resumed_step}"
        return went_on if self.stage is None else f"{went_on}, {count(self.lost_steps, 'step')} lost"


@dataclass
class Verdict:
    """The sum of all rounds."""

    config: str
    how: str
    seed: int
    planned: int
    finals: dict[str, str]
    """sha256 of the state in each `_final.pt` of the reference."""
    reference_s: float | None
    """Wall time of the run that nobody killed; None where it was given."""
    rounds: int = 0
    """Runs that were trained to their end through kills."""
    victims_s: float = 0.0
    """Wall time of all their attempts."""
    kills: list[KillRecord] = dataclasses.field(default_factory=list)
    unresumable: list[str] = dataclasses.field(default_factory=list)
    """Starts that did not go on: what happened instead."""
    checkpoints: int = 0
    """Files that were compared."""
    different_checkpoints: list[str] = dataclasses.field(default_factory=list)
    curves: int = 0
    """Tags that were compared."""
    different_curves: list[str] = dataclasses.field(default_factory=list)

    @property
    def term_kills(self) -> list[KillRecord]:
        """Those that were given time to save."""
        return [kill for kill in self.kills if kill.signal == TERM]

    @property
    def other_codes(self) -> dict[str, int]:
        """How often each other exit code than 143 followed a SIGTERM."""
        codes = Counter(kill.code for kill in self.term_kills if kill.code != Stopped.exit_code)
        return {str(code): number for code, number in sorted(codes.items())}

    @property
    def broken_promises(self) -> list[KillRecord]:
        """Ends with 143, which says that the state is saved, after which steps were lost."""
        return [kill for kill in self.term_kills if kill.code == Stopped.exit_code and kill.lost_steps]

    @property
    def lost(self) -> list[int]:
        """Lost steps of each kill."""
        return [kill.lost_steps for kill in self.kills]

    @property
    def lost_s(self) -> float | None:
        """Wall seconds beyond what the same runs take undisturbed."""
        return None if self.reference_s is None else self.victims_s - self.rounds * self.reference_s

    @property
    def problems(self) -> list[str]:
        """Why it failed, a sentence each; empty where it passed."""
        found = []
        if len(self.kills) < self.planned or not self.rounds:
            found.append(f"given up after {count(len(self.kills), 'kill')} of {self.planned}")
        if self.unresumable:
            found.append(f"{count(len(self.unresumable), 'start')} did not go on")
        if self.broken_promises:
            found.append(f"{count(len(self.broken_promises), 'kill')} lost steps after exit code 143")
        if self.different_checkpoints:
            found.append(f"{count(len(self.different_checkpoints), 'checkpoint')} not equal")
        if self.different_curves:
            found.append(f"{count(len(self.different_curves), 'curve')} not equal")
        return found

    @property
    def passed(self) -> bool:
        """Whether the killed runs cannot be told from the one that nobody killed."""
        return not self.problems

    def summary(self) -> str:
        """The verdict in one line."""
        if not self.passed:
            return f"FAIL: {'; '.join(self.problems)}"
        return (
            f"PASS: {count(len(self.kills), 'kill')}, {count(self.rounds, 'run')} resumed to the end, "
            "bit-identical to the run that nobody killed"
        )

    def table(self) -> str:
        """For people: figures aligned, what is wrong below, the verdict last."""
        rows = self._rows()
        label, figure = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"chaos: {self.config}, --kills {self.planned} --how {self.how} --seed {self.seed}", ""]
        lines += [f"  {a.ljust(label)}  {b.rjust(figure)}  {c}".rstrip() for a, b, c in rows]
        for findings in (self.unresumable, self.different_checkpoints, self.different_curves):
            lines += [f"  {text}" for text in findings[:SHOWN]]
            lines += [f"  ... and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
        return "\n".join([*lines, "", self.summary()])

    def _rows(self) -> Sequence[tuple[str, str, str]]:
        kills, terms, lost = len(self.kills), self.term_kills, self.lost
        saved = sum(kill.code == Stopped.exit_code for kill in terms)
        slowest = max((kill.left_s for kill in terms), default=0.0)
        starting = sum(kill.stage is None for kill in self.kills)
        others = ", ".join(f"{number} x {code}" for code, number in self.other_codes.items())
        after_term = sum(kill.lost_steps for kill in terms)
        rows = [
            ("kills", str(kills), f"{kills - len(terms)} SIGKILL, {len(terms)} SIGTERM; {starting} before it trained"),
            ("rounds", str(self.rounds), "runs trained to the end through these kills"),
            ("unresumable", str(len(self.unresumable)), "starts that did not go on"),
            ("saved on SIGTERM", f"{saved}/{len(terms)}", f"exit code 143; the slowest was gone in {slowest:.1f} s"),
            ("left with another code", str(len(terms) - saved), others),
            (
                "lost steps",
                str(sum(lost)),
                f"{sum(lost) / max(1, kills):.2f} per kill, at most {max(lost, default=0)}; {after_term} after SIGTERM",
            ),
            (
                "checkpoints equal",
                f"{self.checkpoints - len(self.different_checkpoints)}/{self.checkpoints}",
                "bit for bit",
            ),
            (
                "curves equal",
                f"{self.curves - len(self.different_curves)}/{self.curves}",
                "each step once, bit for bit",
            ),
            ("time lost", *self._time()),
        ]
        finals = [(name, value[:HASH_DIGITS], "sha256 of its state") for name, value in self.finals.items()]
        return [*rows, *finals]

    def _time(self) -> tuple[str, str]:
        if self.lost_s is None:
            return "-", "not known with --reference"
        if self.lost_s < 0:
            return "-", f"not known: this machine was slower for the undisturbed run, {self.reference_s:.1f} s"
        each = self.lost_s / max(1, len(self.kills))
        return f"{self.lost_s:.1f} s", f"{each:.1f} s per kill; undisturbed, a run takes {self.reference_s:.1f} s"

    def as_json(self) -> str:
        """Everything, for programs."""
        lost = self.lost
        fields: dict[str, Any] = {
            "verdict": "pass" if self.passed else "fail",
            "problems": self.problems,
            "config": self.config,
            "how": self.how,
            "seed": self.seed,
            "kills": len(self.kills),
            "kills_planned": self.planned,
            "rounds": self.rounds,
            "unresumable": len(self.unresumable),
            "unresumable_starts": self.unresumable,
            "term": {
                "kills": len(self.term_kills),
                "other_codes": self.other_codes,
                "slowest_s": max((kill.left_s for kill in self.term_kills), default=None),
                "lost_steps": sum(kill.lost_steps for kill in self.term_kills),
            },
            "lost_steps": {
                "total": sum(lost),
                "per_kill": sum(lost) / len(lost) if lost else None,
                "most": max(lost, default=None),
            },
            "checkpoints": {"compared": self.checkpoints, "different": self.different_checkpoints},
            "curves": {"compared": self.curves, "different": self.different_curves},
            "final_sha256": self.finals,
            "time": {
                "reference_s": self.reference_s,
                "victims_s": self.victims_s,
                "lost_s": self.lost_s,
                "lost_per_kill_s": None if self.lost_s is None or not lost else self.lost_s / len(lost),
            },
            "each_kill": [dataclasses.asdict(kill) for kill in self.kills],
        }
        return json.dumps(fields, indent=1)


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
