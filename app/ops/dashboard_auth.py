"""Who may see the dashboard: the password, the sessions of browsers, and the delay of those who guess."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from app.env import Environment
from app.errors import MachineError
from app.workspace import atomic_write

log = logging.getLogger(__name__)

PASSWORD_FILE = "hybrid_vit_cascade.password"
GENERATED_BYTES, LONGEST_PASSWORD = 18, 4096
WEAK_PASSWORD = 12
"""Characters below which a password on a public address deserves a warning."""


def settle_password(env: Environment, runtime: Path) -> str | None:
    """The password to ask for; None where the dashboard is for this machine alone and none is set.

    Args:
        env: says what is set and whether the dashboard can be reached from other machines.
        runtime: folder that ends with the machine, for a generated password; where this user may not write there, the
            folder for temporary files is taken.

    Raises:
        MachineError: a password has to be generated and cannot be kept, or somebody else may know it.
    """
    if env.dashboard_password is not None:
        password = env.dashboard_password.reveal()
        if len(password) < WEAK_PASSWORD and not is_loopback(env.dashboard_host):
            log.warning("DASHBOARD_PASSWORD has fewer than %d characters; a public address needs more", WEAK_PASSWORD)
        return password
    if env.dashboard_auth == "none" or is_loopback(env.dashboard_host):
        return None
    if runtime.is_dir() and os.access(runtime, os.W_OK):
        return _generated_password(runtime / PASSWORD_FILE)
    return _generated_password(Path(tempfile.gettempdir()) / f"{os.getuid()}.{PASSWORD_FILE}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that is bound to `host`; False where that is not certain."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _generated_password(path: Path) -> str:
    password = _read_private(path)
    if password:
        log.info("the dashboard asks for the password that was generated at its first start; it stands in %s", path)
        return password
    password = secrets.token_urlsafe(GENERATED_BYTES)
    try:
        atomic_write(path, f"{password}\n".encode(), mode=0o600)
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror}; free some space, or set DASHBOARD_PASSWORD"
        ) from error
    log.info(
        "DASHBOARD_PASSWORD is not set: the dashboard asks for the generated password %s (any user name), or open "
        "/?token=%s once; it also stands in %s",
        password,
        password,
        path,
    )
    return password


def _read_private(path: Path) -> str:
    """The text of a file that this user alone may read; empty where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}; remove it, or set DASHBOARD_PASSWORD") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise MachineError(
                f"{path}: expected a file of this user (uid {os.getuid()}) with mode 600, found uid {found.st_uid} "
                f"with mode {stat.filemode(found.st_mode)}; remove it, or set DASHBOARD_PASSWORD"
            )
        return os.read(descriptor, LONGEST_PASSWORD).decode(errors="replace").strip()
    finally:
        os.close(descriptor)


class Sessions:
    """The cookies that this process gave out; a restart forgets them.

    Args:
        lifetime_s: seconds until a cookie is worth nothing.
        limit: how many are remembered; the oldest goes first.
        clock: monotonic seconds.
    """

    def __init__(
        self, lifetime_s: float = 7 * 86_400, limit: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime_s, self._limit, self._clock = lifetime_s, limit, clock
        self._ends: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def open(self) -> str:
        """The value of a new cookie."""
        value = secrets.token_urlsafe(32)
        with self._lock:
            self._ends[_digest(value)] = self._clock() + self._lifetime_s
            while len(self._ends) > self._limit:
                self._ends.popitem(last=False)
        return value

    def holds(self, value: str | None) -> bool:
        """Whether this is the value of a cookie that still counts."""
        if not value:
            return False
        with self._lock:
            # Looked up by digest: how long a lookup takes says nothing about the values.
            ends = self._ends.get(_digest(value))
        return ends is not None and self._clock() < ends


class Verdict(Enum):
    """What became of a password that somebody gave."""

    RIGHT = "right"
    WRONG = "wrong"
    NOT_TRIED = "not tried"


class PasswordGate:
    """Compares passwords in constant time and makes wrong ones wait, each in its own thread.

    While a client has `per_client` wrong answers waiting, or all clients `overall`, further attempts are not even
    compared: so guessing is bounded to `overall / delay_s` attempts a second, whatever the number of connections, and
    a client that guesses does not keep another one out.

    Args:
        password: the right one.
        delay_s: seconds that a wrong password waits for its answer.
        per_client: answers that may wait for one client.
        overall: answers that may wait in all.
        sleep: waits.
    """

    def __init__(
        self,
        password: str,
        delay_s: float = 2.0,
        per_client: int = 2,
        overall: int = 16,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._digest = _digest(password)
        self._delay_s, self._per_client, self._overall, self._sleep = delay_s, per_client, overall, sleep
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    def try_password(self, given: str, client: str) -> Verdict:
        """Whether `given` is right; a wrong one comes back after the delay."""
        with self._lock:
            if self._waiting[client] >= self._per_client or self._waiting.total() >= self._overall:
                return Verdict.NOT_TRIED
            if hmac.compare_digest(_digest(given), self._digest):
                return Verdict.RIGHT
            self._waiting[client] += 1
        try:
            self._sleep(self._delay_s)
        finally:
            with self._lock:
                self._waiting[client] -= 1
                self._waiting += Counter()  # Forgets the clients for which nothing waits.
        return Verdict.WRONG


def _digest(text: str) -> bytes:
    # Equal lengths, so that a comparison does not tell the length either.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
