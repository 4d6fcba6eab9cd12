"""Log lines with UTC time, to the terminal and to a file, without secrets."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from app.env import Environment, Secret
from app.errors import MachineError

LOG_FILE = "train.log"
HIDDEN = "[hidden]"


class RedactingFormatter(logging.Formatter):
    """`2026-01-31T23:59:59Z INFO app.train: text`; secrets are hidden in the finished text, tracebacks included."""

    def __init__(self, secrets: Iterable[Secret], rank: int = 0) -> None:
        who = f"rank {rank} " if rank else ""
        super().__init__(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        return hide(super().format(record), self._secrets)


def hide(text: str, secrets: Iterable[Secret]) -> str:
    """`text` without the values of secrets."""
    for secret in secrets:
        text = text.replace(secret.reveal(), HIDDEN)
    return text


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes a line above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record, with the bars taken off the terminal meanwhile."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class LogFileHandler(logging.FileHandler):
    """A log file that a full or lost volume costs its lines, and the run nothing: the terminal has them too."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass over an error of the volume; anything else is a mistake in the program and shown as such."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def setup_logging(logs_dir: Path | None, env: Environment, rank: int = 0) -> None:
    """Sends the log of the whole process to stderr and, where a folder is given, to the end of `train.log` in it.

    Of several processes that train one run the first one speaks; from the others come warnings and errors alone, on
    stderr, with their rank.

    Raises:
        MachineError: the file cannot be opened.
    """
    handlers: list[logging.Handler] = [TerminalHandler(sys.stderr)]
    if logs_dir is not None and rank == 0:
        handlers.append(_file_handler(logs_dir / LOG_FILE))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(RedactingFormatter(env.secrets, rank))
        root.addHandler(handler)
    root.setLevel(env.log_level if rank == 0 else max(logging.WARNING, logging.getLevelName(env.log_level)))
    logging.captureWarnings(True)
    for text in env.warnings if rank == 0 else ():
        logging.getLogger(__name__).warning(text)


@contextmanager
def also_in_file(logs_dir: Path, env: Environment) -> Iterator[None]:
    """Within the block, lines reach `train.log` too, from a process whose log goes to the terminal alone."""
    try:
        handler = _file_handler(logs_dir / LOG_FILE)
    except MachineError:
        # What is said matters more than where.
        yield
        return
    handler.setFormatter(RedactingFormatter(env.secrets))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return LogFileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write the log file {path}: {error.strerror}") from error
