"""The findings for people, for programs, and for the log of a container's start."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from app.doctor.finding import Finding, Verdict, exit_code

log = logging.getLogger(__name__)

HEADINGS = ("check", "verdict", "found", "what to do")
WIDTHS = (9, 7, 48, 48)
"""118 characters with the blanks between them."""


def head() -> str:
    """Headings of the table."""
    return "\n".join(_line(cells) for cells in (HEADINGS, ["-" * width for width in WIDTHS]))


def row(finding: Finding) -> str:
    """One finding; as many lines as its longest cell needs."""
    columns = [[finding.name], [str(finding.verdict)], _wrapped(finding.found), _wrapped(finding.what_to_do)]
    return "\n".join(map(_line, zip_longest(*columns, fillvalue="")))


def as_json(findings: Sequence[Finding]) -> str:
    """All of it for programs."""
    rows = [
        {"name": each.name, "verdict": each.verdict, "found": each.found, "what_to_do": each.what_to_do}
        for each in findings
    ]
    return json.dumps({"exit_code": exit_code(findings), "findings": rows}, indent=1)


def tell(finding: Finding) -> None:
    """A line of the log where something is not as it should be."""
    level = {Verdict.PASS: logging.DEBUG, Verdict.WARN: logging.WARNING, Verdict.FAIL: logging.ERROR}[finding.verdict]
    log.log(level, "%s: %s. %s", finding.name, _one_line(finding.found), _one_line(finding.what_to_do))


def summary(findings: Sequence[Finding]) -> str:
    """Counts."""
    counts = {verdict: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    if counts[Verdict.PASS] == len(findings):
        return f"{len(findings)} checks, all passed"
    return f"{len(findings)} checks: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _wrapped(text: str) -> list[str]:
    return [piece for line in text.splitlines() for piece in textwrap.wrap(line, WIDTHS[-1])]


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
