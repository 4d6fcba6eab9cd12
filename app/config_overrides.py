"""`--set a.b=c`: dotted paths into the values of a config file."""

from __future__ import annotations

from typing import Any

from app.config_fields import default_at
from app.config_findings import Finding, dotted
from app.config_yaml import Path, YamlSyntaxError, read_yaml


class _NotFound(Exception):
    """A part of the path leads nowhere."""


def apply_override(data: dict[str, Any], text: str, sources: dict[Path, str]) -> list[Finding]:
    """Writes one override into `data` and its source into `sources`.

    Parts of the path are keys, list indices, names of stages, and `*` for all items of a list.

    Returns:
        What is wrong with the override itself; the schema judges its key and value later.
    """
    source = f"--set {text}"
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        return [Finding(source, (), "expected KEY=VALUE, such as stages.0.epochs=3")]
    try:
        document = read_yaml(value_text)
    except YamlSyntaxError as error:
        return [Finding(source, (), f"the value is not valid YAML: {error}")]
    if document.problems:
        return [Finding(source, (), problem) for _, _, problem in document.problems]
    try:
        paths = _set(data, parts, document.data, ())
    except _NotFound as error:
        return [Finding(source, (), str(error))]
    for path in paths:
        sources.update(dict.fromkeys((known for known in list(sources) if known[: len(path)] == path), source))
        sources[path] = source
    return []


def _set(container: Any, parts: list[str], value: Any, path: Path) -> list[Path]:
    """Sets the value below `container`, which stands at `path`; returns the full paths that were set."""
    head, rest = parts[0], parts[1:]
    if isinstance(container, list):
        places: list[Any] = _indices(container, head, path)
    elif isinstance(container, dict):
        places = [head]
    else:
        raise _NotFound(f"{dotted(path)} is a single value and has no key {head!r}")
    done: list[Path] = []
    for place in places:
        here = (*path, place)
        if not rest:
            container[place] = value
            done.append(here)
            continue
        if isinstance(container, dict) and container.get(place) is None:
            default = default_at(here)
            container[place] = default if isinstance(default, list) else {}
        done += _set(container[place], rest, value, here)
    return done


def _indices(items: list[Any], part: str, path: Path) -> list[int]:
    if part == "*":
        return list(range(len(items)))
    if part.isdecimal():
        if int(part) < len(items):
            return [int(part)]
        raise _NotFound(f"{dotted(path)} has {len(items)} items, numbered from 0: there is no {part}")
    names = [f"stage_{item.get('resolution')}" if isinstance(item, dict) else "" for item in items]
    if part in names:
        return [names.index(part)]
    known = ", ".join(name for name in names if name)
    choices = f"one of {known}, an index or *" if known else "an index or *"
    raise _NotFound(f"{dotted(path)} is a list: expected {choices}, found {part!r}")
