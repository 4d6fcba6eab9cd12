"""What the schema says about each of its keys: the source for messages, for resume and for the README's table."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from app.config import Config
from app.config_section import OPERATIONAL, Section
from app.config_yaml import Path

LIMITS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    path: tuple[str, ...]
    """Dotted path in parts; `*` stands for any stage."""
    kind: str
    """The type and its limits in words."""
    default: Any
    """As a plain YAML value; `...` where there is none."""
    operational: bool
    meaning: str

    @property
    def name(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


@cache
def keys() -> tuple[Key, ...]:
    """Every leaf of the schema, in its order."""
    return tuple(_keys(Config, ()))


@cache
def operational_keys() -> frozenset[str]:
    """Names of the keys that may change on resume."""
    return frozenset(key.name for key in keys() if key.operational)


def section_at(path: Path) -> type[Section] | None:
    """The section at this path, or None where there is a leaf or nothing."""
    section: type[Section] = Config
    parts = list(path)
    while parts:
        field = section.model_fields.get(str(parts.pop(0)))
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            return None
        if _is_list(field.annotation if field else None):
            if not parts:
                return None
            parts.pop(0)
        section = inner
    return section


def field_at(path: Path) -> FieldInfo | None:
    """The field at this path; for an item of a list of values, the list's field."""
    parent, name = path[:-1], path[-1] if path else None
    if isinstance(name, int):
        return field_at(parent)
    section = section_at(parent)
    return section.model_fields.get(str(name)) if section else None


def default_at(path: Path) -> Any:
    """The default at this path as a plain value; None where there is none."""
    field = field_at(path)
    if field is None or field.is_required():
        return None
    return plain(field.get_default())


def plain(value: Any) -> Any:
    """Sections as dicts and tuples as lists, as YAML and checkpoints hold them."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def kind_in_words(annotation: Any, limits: str = "") -> str:
    """The type in words: 'whole number', 'one of `a`, `b`', 'list of whole numbers'; with its limits and 'or null'."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        own = next((limits_in_words(note) for note in notes if isinstance(note, FieldInfo)), "")
        return kind_in_words(inner, own or limits)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(kind_in_words(inner, limits) for inner in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        choices = [f"`{choice}`" for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(annotation) is tuple:
        return _tuple_in_words(get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return f"{NAMES[annotation]} {limits}".strip()


def item_in_words(annotation: Any) -> str:
    """The type of one item of a list."""
    return item_in_words(get_args(annotation)[0]) if _is_list(annotation) else kind_in_words(annotation)


def _tuple_in_words(inner: tuple[Any, ...]) -> str:
    word = kind_in_words(inner[0])
    return f"list of {word}s" if inner[-1] is Ellipsis else f"list of {len(inner)} {word}s"


def limits_in_words(field: FieldInfo) -> str:
    """Such as '>= 1, <= 8'; empty where there are none."""
    found = []
    for item in field.metadata:
        found += [f"{sign} {getattr(item, name):g}" for name, sign in LIMITS if getattr(item, name, None) is not None]
        if getattr(item, "pattern", None):
            found.append(f"matching `{item.pattern}`")
    return ", ".join(found)


def _keys(section: type[Section], path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _keys(inner, (*path, name, "*") if _is_list(field.annotation) else (*path, name))
            continue
        yield Key(
            path=(*path, name),
            kind=kind_in_words(field.annotation, limits_in_words(field)),
            default=... if field.is_required() else plain(field.get_default()),
            operational=field.json_schema_extra == OPERATIONAL,
            meaning=" ".join((field.description or "").split()),
        )


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_list(get_args(annotation)[0])
    return get_origin(annotation) is tuple


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class in an annotation: the section itself, or the item of a list of sections."""
    if get_origin(annotation) in (Annotated, tuple):
        return _section_of(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None
