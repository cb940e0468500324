"""The front: the published ports of services of which there may be several, each in a container of its own.

Every connection goes on to the next of the hosts that have the service's name, and stays there. A host that does not
take it is passed over, so that nobody notices one that is gone. Nothing is read: what is sent once is sent once.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from buydesk.local.ports import allow_connections, bind, close
from buydesk.local.signals import stop_signals
from buydesk.settings import Settings

PIECE_BYTES = 64 * 1024
# Docker's own names change within this time when a container comes or goes.
LOOKUP_SECONDS = 1.0
# A connection over which an answer went, and nothing for so long, is between two requests.
QUIET_SECONDS = 0.5
_POLL_SECONDS = 0.05

_log = logging.getLogger(__name__)

Lookup = Callable[[str, int], Awaitable[Collection[str]]]


async def lookup(host: str, port: int) -> set[str]:
    """The addresses that the name stands for; raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return {str(each[4][0]) for each in found}


@dataclass(eq=False)
class Passage:
    """One connection and where it goes on to."""

    writers: list[asyncio.StreamWriter]
    spoke_last: int = 0  # 0 the client, 1 the service
    spoke_at: float = field(default_factory=time.monotonic)

    def is_between_requests(self) -> bool:
        """True when nothing is lost by closing it."""
        return self.spoke_last == 1 and time.monotonic() - self.spoke_at >= QUIET_SECONDS

    def abort(self) -> None:
        """Cuts both ends."""
        for writer in self.writers:
            writer.transport.abort()


class Front:
    """Passes the connections of one service on. `host` is the name of all its hosts."""

    def __init__(self, host: str, port: int, settings: Settings, lookup: Lookup = lookup) -> None:
        self._host = host
        self._port = port
        self._settings = settings
        self._lookup = lookup
        self._passages: set[Passage] = set()
        self._hosts: list[str] = []
        self._looked_up_at = -LOOKUP_SECONDS
        self._turn = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection until both sides have ended it."""
        passage = Passage([writer])
        if len(self._passages) >= self._settings.connections_max:
            passage.abort()
            return
        self._passages.add(passage)
        try:
            onward = await self._connect()
            passage.writers.append(onward[1])
            await asyncio.gather(self._pass(passage, 0, reader), self._pass(passage, 1, onward[0]))
        except OSError as error:
            _log.info("a connection for %s was cut: %s", self._host, error)
        finally:
            passage.abort()
            self._passages.discard(passage)

    async def drain(self) -> None:
        """Cuts every connection as soon as no request is under way on it, at the latest after `drain_seconds_max`."""
        give_up_at = time.monotonic() + self._settings.drain_seconds_max
        while self._passages:
            is_late = time.monotonic() >= give_up_at
            for each in self._passages:
                if is_late or each.is_between_requests():
                    each.abort()
            await asyncio.sleep(_POLL_SECONDS)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the next host that takes the connection; raises OSError when none does."""
        hosts = await self._current_hosts()
        self._turn += 1
        first = self._turn % len(hosts)
        errors = []
        for host in (*hosts[first:], *hosts[:first]):
            try:
                async with asyncio.timeout(self._settings.connect_seconds_max):
                    return await asyncio.open_connection(host, self._port, limit=PIECE_BYTES)
            except OSError as error:  # TimeoutError is one
                errors.append(f"{host}: {error or 'no answer'}")
        self._looked_up_at = -LOOKUP_SECONDS
        raise OSError("; ".join(errors))

    async def _current_hosts(self) -> list[str]:
        """In one order as long as they are the same."""
        if time.monotonic() - self._looked_up_at >= LOOKUP_SECONDS:
            self._hosts = sorted(await self._lookup(self._host, self._port))
            self._looked_up_at = time.monotonic()
        return self._hosts

    @staticmethod
    async def _pass(passage: Passage, side: int, reader: asyncio.StreamReader) -> None:
        """What one side says, to the other; its end too."""
        writer = passage.writers[1 - side]
        while piece := await reader.read(PIECE_BYTES):
            passage.spoke_last, passage.spoke_at = side, time.monotonic()
            writer.write(piece)
            await writer.drain()
        if side == 0:
            if not writer.is_closing():
                writer.write_eof()  # what it asked may still be answered
            return
        for each in passage.writers:
            each.close()  # once everything is written; then the other side ends too


async def front(settings: Settings, services: Collection[str]) -> None:
    """Passes connections on, each service's from its port to the hosts of its name, until a signal; raises
    CannotStart."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        listeners = bind(settings, services)
        stack.callback(close, listeners.values())
        allow_connections()
        fronts = {service: Front(service, settings.port(service), settings) for service in services}
        servers = [await asyncio.start_server(fronts[name].accept, sock=sock) for name, sock in listeners.items()]
        _log.info("passing on connections for %s", ", ".join(services))
        await stop.wait()
        for server in servers:
            server.close()
        await asyncio.gather(*(each.drain() for each in fronts.values()))
