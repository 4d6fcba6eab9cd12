"""The HTTP server of the dashboard: werkzeug's, bound at once, bounded, and silent about requests."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from app.errors import MachineError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger(__name__)

CONNECTIONS = 256
"""Connections that are served at a time; the training beside them must not run out of memory."""
IDLE_S = 30.0
"""Seconds without a byte after which a connection is dropped."""
BACKLOG = 128


class Server(ThreadedWSGIServer):
    """Serves `application` on a socket that listens when the constructor returns.

    Raises:
        MachineError: the port is taken, or the address is not one of this machine.
    """

    def __init__(self, host: str, port: int, application: WSGIApplication) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        with _listen(host, port) as listener:
            super().__init__(host, port, application, RequestHandler, fd=listener.fileno())

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the request, or none where all are busy."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The request, then its place is free again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's error; others are named without their text, which may hold a query."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("a connection ended by %s", type(error).__name__)

    def log(self, type: str, message: str, *args: Any) -> None:
        """Werkzeug's messages may hold the query: that something broke is logged, not what."""
        if type == "error":
            log.error("a page broke while it was sent")


class RequestHandler(WSGIRequestHandler):
    """Says neither what it is nor what it was asked."""

    timeout = IDLE_S

    def version_string(self) -> str:
        """Value of the header Server."""
        return "dashboard"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Request lines hold queries: never logged."""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"port {port} of {host} is taken: stop what listens there, or choose another one with PORT"
            ) from error
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise MachineError(
            f"cannot listen on port {port} of {host}: {reason}. DASHBOARD_HOST must be an address of this "
            "machine, such as 127.0.0.1 or 0.0.0.0"
        ) from error
