"""From a YAML file, overrides and RUN_NAME to a `Config`, and back; every finding is reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.config import Config
from app.config_findings import Finding, in_words, report
from app.config_overrides import apply_override
from app.config_yaml import Document, YamlSyntaxError, dump_yaml, read_yaml
from app.config_yaml import Path as KeyPath
from app.env import Environment
from app.errors import CheckpointError, ConfigError

SHIPPED_CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Sources:
    """Where each value came from: a line of the file, an override, or an environment variable."""

    def __init__(self, origin: str, lines: Mapping[KeyPath, int]) -> None:
        self.origin = origin
        self.lines = dict(lines)
        self.overrides: dict[KeyPath, str] = {}

    def of(self, path: KeyPath) -> str:
        """The source of the value at `path`, or of the nearest section around it."""
        inside = self._inside(path)
        if path not in self.lines and path and inside:
            return inside[0]
        for end in range(len(path), -1, -1):
            if path[:end] in self.overrides:
                return self.overrides[path[:end]]
            if path[:end] in self.lines:
                return f"{self.origin}:{self.lines[path[:end]]}{self._below(path)}"
        return self.origin + self._below(path)

    def line(self, path: KeyPath) -> int:
        """Line of the value at `path` or of the nearest section around it; 0 where there is none."""
        return next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), 0)

    def _inside(self, section: KeyPath) -> list[str]:
        found = (source for path, source in self.overrides.items() if path[: len(section)] == section)
        return list(dict.fromkeys(found))

    def _below(self, section: KeyPath) -> str:
        # One of the overrides inside a section may be what makes the whole impossible.
        inside = self._inside(section)
        return f" (with {', '.join(inside)})" if inside else ""


def load_config(path: str | Path, overrides: Sequence[str], env: Environment) -> Config:
    """The configuration of a run.

    Args:
        path: YAML file that says what the run changes.
        overrides: `a.b=c`, such as `stages.stage_64.epochs=3`, `stages.0.batch=4`, `stages.*.workers=2`.
        env: RUN_NAME, where set, replaces `run_name`.

    Raises:
        ConfigError: with every finding, each with file and line or the override.
    """
    path = Path(path)
    document, findings = _read(path)
    sources = Sources(str(path), document.lines)
    data = document.data
    for text in overrides:
        findings += apply_override(data, text, sources.overrides)
    if env.run_name is not None:
        data["run_name"] = env.run_name
        sources.overrides[("run_name",)] = "environment variable RUN_NAME"
    config, schema_findings = _validated(data, sources)
    findings += [finding for finding in schema_findings if finding.path not in document.unread]
    if config is None or findings:
        raise ConfigError(report(str(path), sorted(findings, key=lambda finding: sources.line(finding.path))))
    return config


def config_from_checkpoint(data: object, path: Path) -> Config:
    """The config that a checkpoint carries, through the same strict schema.

    Raises:
        CheckpointError: it does not fit this version's schema.
    """
    config, findings = _validated(data, Sources(f"config in {path}", {}))
    if config is None or findings:
        hint = "the checkpoint was written by another version of the application, or the file is not one of its own"
        raise CheckpointError(f"{report(str(path), findings)}\n{hint}")
    return config


def config_as_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists, numbers and text: what checkpoints carry."""
    return config.model_dump(mode="json")


def resolved_yaml(config: Config) -> str:
    """Every key with its value; loads back to the same config."""
    return dump_yaml(config_as_dict(config))


def _validated(data: object, sources: Sources) -> tuple[Config | None, list[Finding]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # pydantic counts only the valid items of a list, so a list with a bad item also "has too few".
    inner = {path[:end] for path in (tuple(item["loc"]) for item in errors) for end in range(len(path))}
    errors = [item for item in errors if item["type"] != "too_short" or tuple(item["loc"]) not in inner]
    found: dict[KeyPath, str] = {}
    for path, text in map(in_words, errors):
        # A value of several types has an error for each; all of them say the same.
        found.setdefault(path, text)
    return None, [Finding(sources.of(path), path, text) for path, text in found.items()]


def _read(path: Path) -> tuple[Document, list[Finding]]:
    text = _text(path)
    try:
        document = read_yaml(text)
    except YamlSyntaxError as error:
        raise ConfigError(f"{path}:{error.line}:{error.column}: not valid YAML: {error}") from error
    if document.data is None:
        raise ConfigError(f"{path}: is empty: expected keys such as run_name, data and stages")
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        raise ConfigError(f"{path}:1: expected keys with values at the top level, found {kind}")
    return document, [Finding(f"{path}:{line}", where, text) for where, line, text in document.problems]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(_no_such_file(path)) from error
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ConfigError(f"{path}: expected UTF-8 text, found {found}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _no_such_file(path: Path) -> str:
    folders = dict.fromkeys(folder.resolve() for folder in (path.parent, SHIPPED_CONFIGS) if folder.is_dir())
    files = [file for folder in folders for file in sorted(folder.glob("*.y*ml"))]
    there = [str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file) for file in files]
    near = get_close_matches(str(path), there, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{path}: no such file{hint} Configs that exist: {', '.join(there) or 'none'}"
