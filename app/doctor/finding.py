"""What a check finds, and how checks are run: each within its deadline, none able to end the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from threading import Thread

from app.env import Secret
from app.errors import AppError, ConfigError, MachineError
from app.log import hide

LOCAL_S = 20.0
"""For what reads files: of a volume that hangs nobody hears at all."""


class Verdict(StrEnum):
    """PASS: as it should be. WARN: it trains, and something is lost. FAIL: it cannot train, or will break off."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    name: str
    verdict: Verdict
    found: str
    what_to_do: str = ""
    of_config: bool = False
    """Whether a FAIL is put right in config or variables, not at the machine."""

    def without(self, secrets: Sequence[Secret]) -> Finding:
        """The same without the values of secrets."""
        return replace(self, found=hide(self.found, secrets), what_to_do=hide(self.what_to_do, secrets))


def passed(name: str, found: str) -> Finding:
    """As it should be."""
    return Finding(name, Verdict.PASS, found)


def warned(name: str, found: str, what_to_do: str) -> Finding:
    """It trains, and something is lost."""
    return Finding(name, Verdict.WARN, found, what_to_do)


def failed(name: str, found: str, what_to_do: str) -> Finding:
    """It cannot train, or will break off."""
    return Finding(name, Verdict.FAIL, found, what_to_do)


@dataclass(frozen=True)
class Check:
    """A question to the machine."""

    name: str
    ask: Callable[[], Finding | None]
    """None where the question does not arise."""
    deadline_s: float = LOCAL_S
    late: Verdict = Verdict.FAIL
    """What no answer within the deadline means."""
    late_advice: str = "Look at the volume: it does not answer. Another machine, or another volume"
    remote: bool = False
    """It waits for a server, beside the other checks."""


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """The findings, in the order of the checks but for remote ones, which come last.

    One after the other, so that none measures the work of another; remote ones meanwhile. A check that raises is a
    FAIL, and one that hangs is left behind with its thread.
    """
    remote = [_Asked(check) for check in checks if check.remote]
    for check in checks:
        if not check.remote:
            yield from _Asked(check).answers()
    for asked in remote:
        yield from asked.answers()


class _Asked:
    """A check under way in a thread of its own."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._answer: Finding | None = None
        self._until = time.monotonic() + check.deadline_s
        self._thread = Thread(target=self._ask, name=check.name, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self._answer = _answer(self._check)

    def answers(self) -> Iterator[Finding]:
        """Wait for it."""
        check = self._check
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if self._thread.is_alive():
            yield Finding(check.name, check.late, f"no answer within {check.deadline_s:g} s", check.late_advice)
        elif self._answer is not None:
            yield self._answer


def _answer(check: Check) -> Finding | None:
    try:
        return check.ask()
    except AppError as error:
        return Finding(check.name, Verdict.FAIL, str(error), "See what was found", isinstance(error, ConfigError))
    except Exception as error:  # noqa: BLE001 - whatever a check meets, the others are still to be made
        found = f"the check broke off with {type(error).__name__}: {error}"
        return failed(check.name, found, "What the error names is not as any machine should have it; look there first")


def exit_code(findings: Sequence[Finding]) -> int:
    """Of the command: 0, or of the worst: the configuration's comes first, as it is put right first."""
    fails = [finding for finding in findings if finding.verdict is Verdict.FAIL]
    if any(finding.of_config for finding in fails):
        return ConfigError.exit_code
    return MachineError.exit_code if fails else 0
