"""Pseudonyms: outside the data folder a patient appears only under a keyed hash."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from app.errors import MachineError
from app.workspace import sync_folder

KEY_BYTES = 32
DIGITS = 12


class Pseudonyms:
    """HMAC-SHA256 of names under the workspace's secret key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def key_id(self) -> str:
        """Says which key made a pseudonym, without telling the key."""
        return hashlib.sha256(b"pseudonym key" + self._key).hexdigest()[:DIGITS]

    def patient(self, name: str) -> str:
        """`p` and 12 digits for a patient's id."""
        return "p" + self._digest("patient", name)[:DIGITS]

    def case(self, patient_name: str, content: str) -> str:
        """`c` and 12 digits for one scan of a patient."""
        return "c" + self._digest("case", patient_name, content)[:DIGITS]

    def source(self, relative: str) -> str:
        """`s` and 16 digits for a path below the data folder."""
        return "s" + self._digest("source", relative)[:16]

    def _digest(self, *parts: str) -> str:
        message = b"\0".join(part.encode("utf-8", "surrogateescape") for part in parts)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()


def load_key(path: Path) -> bytes:
    """The key at `path`, made where there is none; only its owner may read it."""
    try:
        if not path.exists():
            _create_key(path)
        key = path.read_bytes()
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise MachineError(f"cannot use the key of the pseudonyms, {path}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise MachineError(
            f"{path} should hold the {KEY_BYTES} bytes of the pseudonyms' key, found {len(key)}: restore it from a "
            "copy, or delete it together with the cache to start with new pseudonyms"
        )
    return key


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, secrets.token_bytes(KEY_BYTES))
        os.fsync(descriptor)
        # A link appears whole and never replaces the key of a process that was faster.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        os.close(descriptor)
        temporary.unlink()
    sync_folder(path.parent)


def without_names(text: str, names: Iterable[str], pseudonym: str) -> str:
    """`text` with each of `names` (paths, file names, ids) replaced by the pseudonym, the longest first."""
    for name in sorted({name for name in names if name}, key=lambda name: (-len(name), name)):
        # Only whole words: a patient called "1" must not take the digits out of a size.
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: pseudonym, text, flags=re.IGNORECASE)
    return text
