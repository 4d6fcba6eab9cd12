"""YAML as config files mean it: YAML 1.2 scalars, no duplicate keys, and the line of every key.

PyYAML's own rules are those of YAML 1.1, where `1e-4` is a string, `no` is False and `1:30` is 90.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.emitter import Emitter
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.representer import SafeRepresenter
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner
from yaml.serializer import Serializer

TAG = "tag:yaml.org,2002:"
Path = tuple[str | int, ...]


class CoreResolver(BaseResolver):
    """Which plain scalars are not strings: the core schema of YAML 1.2, section 10.3.2, and the merge key."""


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("merge", r"<<", "<"),
):
    first = [*_first, ""] if _name == "null" else list(_first)
    CoreResolver.add_implicit_resolver(TAG + _name, re.compile(rf"^(?:{_pattern})$"), first)


class _Loader(Reader, Scanner, Parser, Composer, CoreResolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        CoreResolver.__init__(self)


class _Dumper(Emitter, Serializer, SafeRepresenter, CoreResolver):
    def __init__(self, stream: Any, **options: Any) -> None:
        emitter = {key: options[key] for key in ("canonical", "indent", "width", "allow_unicode", "line_break")}
        Emitter.__init__(self, stream, **emitter)
        Serializer.__init__(self)
        SafeRepresenter.__init__(self, default_flow_style=False, sort_keys=False)
        CoreResolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> SequenceNode:
        scalars = all(not isinstance(item, list | dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=scalars)


def dump_yaml(data: Any) -> str:
    """YAML text that `read_yaml` reads back as the same value; lists of numbers on one line."""
    return yaml.dump(data, Dumper=_Dumper, width=110)


class YamlSyntaxError(Exception):
    """The text is not YAML; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


@dataclass
class Document:
    """A YAML document with the place of each value."""

    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    """Line, from 1, of the key or list item at each path."""
    problems: list[tuple[Path, int, str]] = field(default_factory=list)
    """(path, line, text) of what is YAML but not allowed here."""
    unread: set[Path] = field(default_factory=set)
    """Paths with a problem that left no value."""


def read_yaml(text: str) -> Document:
    """Parses one document.

    Raises:
        YamlSyntaxError: the text is not YAML.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(f"character #x{ord(text[error.position]):04x} is not allowed", line, 1) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.problem, error.context) if part]
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlSyntaxError(_hinted(", ".join(parts)), line, column) from error
    document = Document()
    if root is not None:
        document.data = _Builder(document).build(root, ())
    return document


def _hinted(message: str) -> str:
    if r"'\t'" in message:
        return f"{message}: indent with spaces, never with tabs"
    if "mapping values are not allowed here" in message:
        return f"{message}: put text that contains ': ' in quotes, and check the indentation"
    return message


class _Builder:
    """Turns nodes into plain values and writes down where each stood."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: set[int] = set()

    def build(self, node: Node, path: Path) -> Any:
        if id(node) in self.open:
            # The node stands at the anchor; what is wrong is the alias at this key.
            line = self.document.lines.get(path, node.start_mark.line + 1)
            self.document.problems.append((path, line, "an alias may not contain itself"))
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self.mapping(node, path)
            if isinstance(node, SequenceNode):
                return [self.item(item, (*path, index)) for index, item in enumerate(node.value)]
            return self.scalar(node, path)
        finally:
            self.open.discard(id(node))

    def problem(self, node: Node, path: Path, text: str) -> None:
        self.document.problems.append((path, node.start_mark.line + 1, text))

    def item(self, node: Node, path: Path) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        return self.build(node, path)

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == TAG + "merge":
                merged.update(self.merge(value_node, path, skip=merged))
                continue
            key = self.key(key_node, path)
            line = key_node.start_mark.line + 1
            if key in first:
                self.problem(key_node, (*path, key), f"duplicate key, first on line {first[key]}: keep one of them")
                continue
            first[key] = line
            self.document.lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key))
        return {**merged, **result}

    def merge(self, node: Node, path: Path, skip: dict[str, Any]) -> dict[str, Any]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        result: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, MappingNode):
                self.problem(node, path, "'<<' takes over the keys of a mapping, such as *anchor")
                continue
            keep = dict(self.document.lines)
            built = self.build(source, path)
            self.document.lines.update(keep)
            result = {**(built if isinstance(built, dict) else {}), **result}
        return {key: value for key, value in result.items() if key not in skip}

    def key(self, node: Node, path: Path) -> str:
        if isinstance(node, ScalarNode) and node.tag == TAG + "str":
            return str(node.value)
        shown = node.value if isinstance(node, ScalarNode) else "a list or a mapping"
        self.problem(node, path, f"expected text as key, found {shown}: put it in quotes if it is meant")
        return str(shown)

    def scalar(self, node: Node, path: Path) -> Any:
        text, kind = str(node.value), node.tag.removeprefix(TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text, 10)
        if kind == "float":
            return self.number(node, path, text)
        if kind not in ("str", "merge"):
            self.problem(node, path, f"the tag {node.tag!r} is not allowed in a config")
        return text

    def number(self, node: Node, path: Path, text: str) -> float | None:
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if math.isfinite(value):
            return value
        self.problem(node, path, f"expected a finite number, found {text}")
        self.document.unread.add(path)
        return None
