"""`python -m app dashboard`: TensorBoard in this process, over all runs of the workspace, behind the guard."""

from __future__ import annotations

import logging
import mimetypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from werkzeug.test import Client

from app.env import Environment
from app.errors import MachineError
from app.ops.dashboard_auth import settle_password
from app.ops.dashboard_guard import Guard
from app.ops.dashboard_server import Server
from app.ops.dashboard_status import StatusPages
from app.workspace import Workspace

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger(__name__)

RELOAD_S = 5.0
SAMPLES = {"images": 100, "scalars": 10_000}
"""Points that TensorBoard keeps of each tag; by its own choice 10 pictures and 1000 points."""
PROBE_S = 2.0
UNHEALTHY_S = 30.0
LOST_S = 90.0
"""Seconds without an answer of TensorBoard after which `/healthz` says so, and after which this process ends."""


def serve(workspace: Workspace, env: Environment, runtime: Path, stop: Callable[[], bool]) -> None:
    """Serves the dashboard until `stop`; the port listens before TensorBoard is loaded.

    Args:
        workspace: all its runs are shown.
        env: address, port and password.
        runtime: folder that ends with the machine, where a generated password is kept.
        stop: asked many times a second.

    Raises:
        MachineError: the port is taken, TensorBoard does not start, or it answers no more.
    """
    _quieten_tensorboard()
    guard = Guard(settle_password(env, runtime), StatusPages(workspace))
    with Server(env.dashboard_host, env.port, guard) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
        log.info("dashboard on port %d of %s", env.port, env.dashboard_host)
        board = Board(workspace, guard)
        board.start()
        while not stop():
            board.check()
            time.sleep(0.1)
        server.shutdown()


def _quieten_tensorboard() -> None:
    """It tells at INFO what it does with each of its files, in part through the root logger itself."""
    logging.getLogger("tensorboard").setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger().addFilter(lambda record: record.levelno >= logging.WARNING)


class Board(threading.Thread):
    """Loads TensorBoard and hands it to the guard, then asks it every few seconds whether it still answers."""

    def __init__(self, workspace: Workspace, guard: Guard) -> None:
        super().__init__(name="tensorboard", daemon=True)
        self._logdir = workspace.checkpoints
        self._guard = guard
        self._answered = time.monotonic()

    def run(self) -> None:
        """Loads, then probes for ever; an error ends the thread, and `check` reports it."""
        application = load_tensorboard(str(self._logdir))
        self._guard.application = application
        client = Client(application)
        while True:
            if client.get("/data/runs").status_code == 200:
                self._answered = time.monotonic()
                self._guard.health = "ok"
            time.sleep(PROBE_S)

    def check(self) -> None:
        """Notes how TensorBoard is.

        Raises:
            MachineError: it did not start, or it is lost.
        """
        silence_s = time.monotonic() - self._answered
        if not self.is_alive() or silence_s > LOST_S:
            raise MachineError("TensorBoard did not start or answers no more; the lines above say why")
        if silence_s > UNHEALTHY_S and self._guard.health == "ok":
            self._guard.health = "TensorBoard does not answer"


def load_tensorboard(logdir: str) -> WSGIApplication:
    """TensorBoard's WSGI application over `logdir`, with its own plugins and none that other packages bring.

    Those would be found by their entry points; the projector, which reads files by name, is one of them.
    """
    from tensorboard import default, program
    from tensorboard.data.server_ingester import NoDataServerError, get_server_binary

    # As TensorBoard's own command does, because a machine's list of types may be wrong or lack some.
    for kind, suffix in (("text/javascript", ".js"), ("font/woff2", ".woff2"), ("text/html", ".html")):
        mimetypes.add_type(kind, suffix)
    try:
        get_server_binary()
        load_fast = "true"
    except NoDataServerError:
        load_fast = "false"
    handed: list[WSGIApplication] = []

    class Handover(program.TensorBoardServer):  # type: ignore[misc]
        """Takes the application that TensorBoard wants served; the port is served already."""

        def __init__(self, wsgi_app: WSGIApplication, flags: Any) -> None:
            handed.append(wsgi_app)

        def serve_forever(self) -> None:
            """Nothing to do."""

        def get_url(self) -> str:
            """Nobody asks."""
            return ""

    board = program.TensorBoard(plugins=default.get_static_plugins(), server_class=Handover)
    board.configure(
        logdir=logdir,
        load_fast=load_fast,
        reload_interval=RELOAD_S,
        samples_per_plugin=SAMPLES,
        window_title="hybrid_vit_cascade",
    )
    board.launch()
    return handed[0]
