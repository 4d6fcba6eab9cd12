"""Where the launchers of a run's machines meet: a store of keys on the first machine, for torch's elastic agent.

joined/N   machine N, once; a second time it is a new launcher there, and the group that the old one was in is over
go         the first machine: all are there
beat/N     machine N, every few seconds
over       the machine whose processes ended first: their exit code, which all of them end with
left/N     machine N has read it, or all of its processes ended well
"""

from __future__ import annotations

import errno
import fcntl
import logging
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from app.env import ClusterNode
from app.errors import AppError, MachineError, Stopped

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PATIENCE_S = 2 * 3600.0
"""How long a machine waits for the others; one that is rented costs money meanwhile."""
POLL_S, NOTICE_S = 0.2, 60.0
CONNECT_S = 2.0
ANSWER = timedelta(seconds=30)
BEAT_S, SILENT_S = 5.0, 60.0
"""A machine that is silent for so long is gone, without the network having said so."""
BACKLOG = 1024
SIOCGIFADDR = 0x8915
ANY_PORT = 9


class Meeting(RendezvousHandler):
    """All machines of the run, or this one by itself.

    Args:
        node: this machine's place; None is a machine by itself, whose store listens on the loopback alone.
        polled: asked while it waits, and on all machines but the first as long as the first one answers.
    """

    def __init__(self, node: ClusterNode | None, polled: Callable[[], bool]) -> None:
        self.node = node or ClusterNode(0, 1, LOOPBACK, 0)
        self._polled = polled
        self._store: Store | None = None
        self._beats, self._beat_at = 0, 0.0
        self._heard: dict[int, tuple[bytes, float]] = {}

    def next_rendezvous(self) -> RendezvousInfo:
        """Return when all machines are there.

        Raises:
            MachineError: they do not come, or the first one's address cannot be used.
            Stopped: asked to stop.
        """
        store, port = self._serve() if self.node.rank == 0 else self._reach()
        self._store = store
        place = RendezvousStoreInfo(self.node.address, port)
        return RendezvousInfo(PrefixStore("agents", store), self.node.rank, self.node.count, place)

    def over(self) -> int | None:
        """The exit code that the run ends with on another machine; None while it goes on."""
        if self.node.count == 1:
            return None
        if self._store is None:
            return AppError.exit_code
        try:
            if self._store.check(["over"]):
                return int(self._store.get("over"))
            return self._beat(self._store)
        except DistError:
            log.error("the first machine of the run (%s) does not answer any more", self.node.address)
            self._store = None
            return AppError.exit_code

    def announce(self, exit_code: int) -> int:
        """The processes of this machine ended; the exit code of the first machine that said so."""
        if self.node.count == 1 or self._store is None:
            return exit_code
        try:
            return int(self._store.compare_set("over", "", str(exit_code)))
        except DistError:
            self._store = None
            return exit_code

    def leave(self, limit_s: float) -> None:
        """Nothing more is asked by this machine; the first one stays until all have said so, or for so long."""
        if self.node.count == 1 or self._store is None:
            return
        others, end = [f"left/{rank}" for rank in range(1, self.node.count)], time.monotonic() + limit_s
        with suppress(DistError):
            if self.node.rank > 0:
                self._store.set(f"left/{self.node.rank}", "1")
                return
            while not self._store.check(others) and time.monotonic() < end:
                time.sleep(POLL_S / 4)

    def _serve(self) -> tuple[Store, int]:
        listener = self._listen()
        port = listener.getsockname()[1]
        store = TCPStore(
            self.node.address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=ANSWER,
            master_listen_fd=listener.detach(),
        )
        others = [f"joined/{rank}" for rank in range(1, self.node.count)]
        wait = self._Wait(self, f"{self.node.count - 1} other machines")
        while not all(store.check([key]) for key in others):
            wait()
        store.set("go", "1")
        return store, port

    def _listen(self) -> socket.socket:
        address, port = self.node.address, self.node.port
        try:
            family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise MachineError(f"MASTER_ADDR {address}: no such address ({error})") from error
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            try:
                listener.bind(place)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                log.warning("%s is no address of this machine's own: it listens on all of them", address)
                listener.bind(("", port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise MachineError(
                f"{address}:{port} (MASTER_ADDR, MASTER_PORT) cannot be listened on: {error.strerror}. End what holds "
                "it, or choose another port on all machines"
            ) from error
        return listener

    def _reach(self) -> tuple[Store, int]:
        address, port = self.node.address, self.node.port
        wait = self._Wait(self, f"the first machine at {address}:{port}")
        while True:
            wait()
            # torch would fill the log while nobody listens.
            with suppress(OSError):
                socket.create_connection((address, port), CONNECT_S).close()
                with suppress(DistError):
                    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=ANSWER)
                    if self._join(store, wait):
                        return store, port

    def _join(self, store: Store, wait: Callable[[], None]) -> bool:
        if store.add(f"joined/{self.node.rank}", 1) > 1:
            store.compare_set("over", "", str(AppError.exit_code))
            return False
        while not store.check(["go"]):
            wait()
        return True

    def _beat(self, store: Store) -> int | None:
        """A sign of life for the first machine; on the first one an exit code where another gives none."""
        now = time.monotonic()
        if self.node.rank > 0:
            self._polled()
        if now - self._beat_at < BEAT_S:
            return None
        self._beat_at = now
        if self.node.rank > 0:
            self._beats += 1
            store.set(f"beat/{self.node.rank}", str(self._beats))
            return None
        for rank in range(1, self.node.count):
            beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
            last, since = self._heard.get(rank, (b"", now))
            self._heard[rank] = (beat, since if beat == last else now)
            if now - self._heard[rank][1] > SILENT_S:
                log.error("machine %d of the run has been silent for %.0f s: it is gone", rank, SILENT_S)
                return AppError.exit_code
        return None

    class _Wait:
        """A moment of waiting for others, within limits."""

        def __init__(self, meeting: Meeting, whom: str) -> None:
            self._meeting, self._whom = meeting, whom
            self._began = self._told = time.monotonic()

        def __call__(self) -> None:
            if self._meeting._polled():
                raise Stopped("stopped while waiting for the other machines of the run")
            now = time.monotonic()
            if now - self._began > PATIENCE_S:
                raise MachineError(
                    f"waited {PATIENCE_S / 3600:.0f} h for {self._whom} (NUM_NODES is {self._meeting.node.count}). "
                    "Start the same command on every machine, with MASTER_ADDR and MASTER_PORT of the first one"
                )
            if now - self._told > NOTICE_S:
                self._told = now
                log.info("waiting for %s", self._whom)
            time.sleep(POLL_S)

    def get_backend(self) -> str:
        """A name for torch."""
        return "meeting"

    @property
    def use_agent_store(self) -> bool:
        """The processes of the run use this store, too."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nothing."""

    def num_nodes_waiting(self) -> int:
        """None: the number of machines is fixed."""
        return 0

    def get_run_id(self) -> str:
        """A name for torch."""
        return "hybrid-vit-cascade"

    def shutdown(self) -> bool:
        """Nothing is left to do."""
        return True


def interface_to(address: str) -> str | None:
    """Name of the network interface through which this machine reaches an IPv4 address; None where that is unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it asks for the route.
            probe.connect((address, ANY_PORT))
            own = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None
