"""What `prepare` found, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.data.cache import CaseRecord
from app.errors import DataError

HEADINGS = ("case", "patient", "size, spacing", "coverage", "lungs", "DRR difference", "verdict", "reason or notes")


@dataclass(frozen=True)
class Entry:
    """One line: a prepared case, or a source that was refused."""

    label: str
    """Pseudonym of the case, or of the refused path."""
    name: str = field(repr=False)
    """Path below the data folder; it may hold a patient's name."""
    record: CaseRecord | None = None
    reason: str | None = None
    fresh: bool = False
    """Whether it was read in this call."""

    def cells(self) -> tuple[str, ...]:
        """The line's cells."""
        if self.record is None:
            return (self.label, "-", "-", "-", "-", "-", "refused", self.reason or "")
        record = self.record
        coverage, lungs = _percent(record.coverage, 0), _percent(record.lung_fraction, 1)
        drr = "-" if record.drr_difference is None else f"{record.drr_difference:.3f}"
        verdict = "accepted" if self.reason is None else "refused"
        text = "; ".join([*([self.reason] if self.reason else []), *record.notes])
        return (record.id, record.patient, record.size, coverage, lungs, drr, verdict, text)


@dataclass(frozen=True)
class PrepareReport:
    """Everything that was accepted and refused."""

    entries: tuple[Entry, ...]

    @property
    def accepted(self) -> tuple[Entry, ...]:
        """Entries that can be trained on."""
        return tuple(entry for entry in self.entries if entry.reason is None)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """Entries that cannot."""
        return tuple(entry for entry in self.entries if entry.reason is not None)

    def summary(self) -> str:
        """One line of counts."""
        patients = {entry.record.patient for entry in self.accepted if entry.record}
        fresh = sum(entry.fresh for entry in self.accepted)
        cases = f"{len(self.accepted)} cases of {len(patients)} patients are ready"
        return f"{cases} ({fresh} new), {len(self.refused)} refused"

    def table(self, show_names: bool = False) -> str:
        """A text table; `show_names` adds the paths, which may name patients, and is for the user's own terminal."""
        headings: tuple[str, ...] = (*HEADINGS, "path") if show_names else HEADINGS
        rows: list[tuple[str, ...]] = [headings]
        rows += [entry.cells() + ((entry.name,) if show_names else ()) for entry in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


class NothingUsable(DataError):
    """Everything was refused; the report says which and why, with names where they may be shown."""

    def __init__(self, message: str, report: PrepareReport) -> None:
        super().__init__(message)
        self.report = report


def _percent(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{share:.{digits}%}"
