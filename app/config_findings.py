"""What is wrong with a configuration, in words for people: where, what was expected, what was found, what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from app.config_fields import field_at, item_in_words, keys, kind_in_words, limits_in_words, section_at
from app.config_yaml import Path

LONGEST_VALUE = 60


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    source: str
    """`file:line`, the override, or the variable that it comes from."""
    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.source}: {dotted(self.path)}: {self.text}" if self.path else f"{self.source}: {self.text}"


def report(origin: str, findings: Iterable[Finding]) -> str:
    """All findings, one a line, under a line that counts them."""
    lines = [str(finding) for finding in findings]
    return "\n  ".join([f"{origin}: {len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration", *lines])


def dotted(path: Path) -> str:
    """`('stages', 0, 'epochs')` as `stages.0.epochs`."""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value on one line, cut where it is long."""
    if value is None:
        return "nothing (null)"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def expected(path: Path) -> str:
    """What the schema wants at this path."""
    field = field_at(path)
    if field is None:
        return "nothing"
    if section_at(path):
        return "a section of keys"
    if path and isinstance(path[-1], int):
        return f"a {item_in_words(field.annotation)}"
    return _with_article(kind_in_words(field.annotation, limits_in_words(field)))


def unknown_key(path: Path) -> str:
    """The message for a key that the schema does not have: the nearest ones, and all that are valid there."""
    section = section_at(path[:-1])
    valid = list(section.model_fields) if section else []
    name = str(path[-1])
    near = get_close_matches(name, valid, n=1, cutoff=0.6)
    elsewhere = [key.name for key in keys() if key.path[-1] == name]
    hint = "."
    if near:
        hint = f"; did you mean {near[0]!r}?"
    elif elsewhere:
        hint = f"; did you mean {elsewhere[0]!r}?"
    return f"unknown key{hint} Valid keys here: {', '.join(valid)}"


def _with_article(kind: str) -> str:
    return kind if kind.startswith(("one of", "text", "true", "`")) else f"a {kind}"


def _wrong_type(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    wanted = expected(path)
    text = f"expected {wanted}, found {shown(found)}"
    if found is None and section_at(path):
        return f"{text}: indent its keys below it, or remove it"
    if isinstance(found, str) and wanted.startswith(("a number", "a whole number")):
        return f"{text}: write the number without quotes and units"
    if isinstance(found, int | float | bool) and wanted.startswith("text"):
        return f"{text}: put it in quotes"
    return text


def _not_one_of(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    field = field_at(path)
    choices = kind_in_words(field.annotation).split("`")[1::2] if field else []
    near = get_close_matches(str(found), choices, n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"expected {expected(path)}, found {shown(found)}{hint}"


def _missing(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    return f"is missing: expected {expected(path)}"


def _wrong_length(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    least = context.get("min_length")
    wanted = f"at least {least} item{'s' if least != 1 else ''}" if least else expected(path)
    return f"expected {wanted}, found {shown(found)}"


def _impossible(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    return str(context["error"])


def _unknown_key(path: Path, found: Any, context: Mapping[str, Any]) -> str:
    return unknown_key(path)


WORDING: dict[str, Callable[[Path, Any, Mapping[str, Any]], str]] = {
    "extra_forbidden": _unknown_key,
    "missing": _missing,
    "literal_error": _not_one_of,
    "too_short": _wrong_length,
    "too_long": _wrong_length,
    "value_error": _impossible,
    **dict.fromkeys(
        (
            "int_type",
            "int_from_float",
            "float_type",
            "string_type",
            "bool_type",
            "tuple_type",
            "model_type",
            "dict_type",
            "greater_than",
            "greater_than_equal",
            "less_than",
            "less_than_equal",
            "string_pattern_mismatch",
        ),
        _wrong_type,
    ),
}
"""Error types of pydantic that this schema can raise, each with its wording."""


def in_words(error: Mapping[str, Any]) -> tuple[Path, str]:
    """(path, message) of one of pydantic's errors."""
    path: Path = tuple(error["loc"])
    kind = error["type"]
    if kind == "missing" and path and isinstance(path[-1], int):
        # A list of fixed length that is too short: the list is at fault, not the item that is not there.
        return path[:-1], _wrong_length(path[:-1], error["input"], {})
    if kind != "extra_forbidden" and field_at(path) is None and field_at(path[:-1]) is not None:
        # A value of several types: pydantic names the type that it tried.
        path = path[:-1]
    return path, WORDING[kind](path, error["input"], error.get("ctx", {}))
