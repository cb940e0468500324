"""The server of a service: which requests it hears of, its start, and its end in time."""

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache, partial

from buydesk.errors import CannotStart, ForeignOrigin, InvalidHttp
from buydesk.hosts import address_of
from buydesk.http.access import Access
from buydesk.http.app import Service
from buydesk.http.connections import Connections
from buydesk.http.listeners import BACKLOG
from buydesk.http.protocol import Connection
from buydesk.http.requests import Request
from buydesk.settings.model import Settings

# When nothing is worked on any more, answers have so long to reach their clients before the connections are cut.
FLUSH_SECONDS = 1.0
SEND_BUFFER_BYTES = 128 * 1024
_POLL_SECONDS = 0.02
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?", re.ASCII)
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@]+)", re.ASCII)
_PORTS = {"http": "80", "https": "443"}
_SAFE = ("GET", "HEAD")

_log = logging.getLogger(__name__)


class Admission:
    """Which requests a service gets. Raises InvalidHttp for those whose host or end is not certain, and
    on an open desk ForeignOrigin for what a page of another site makes a browser send: by a name of its own that leads
    here (DNS rebinding), or across sites."""

    def __init__(self, settings: Settings) -> None:
        self._is_open = settings.access == "open"
        self._hosts = frozenset(settings.hosts)
        self._is_own = lru_cache(maxsize=256)(self._is_own_name)

    def __call__(self, request: Request) -> None:
        headers = request.headers
        _require_http(request)
        hosts = headers.getall("host", [])
        if not hosts and request.version == "1.0":  # which knows no hosts, and no browser speaks it
            return
        if len(hosts) != 1:
            raise InvalidHttp("A request has exactly one Host.")
        host = request.authority or hosts[0]
        is_own = self._is_own(host)
        if not self._is_open:
            return
        if not is_own:
            raise ForeignOrigin(f"This open desk is not known as {host[:100]}: see BUYDESK_HOSTS.")
        if request.method not in _SAFE and "origin" in headers:
            origins = headers.getall("origin")
            if len(origins) > 1 or not _is_same(origins[0], host):
                raise ForeignOrigin("A page of another origin may not do this on an open desk.")

    def _is_own_name(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            raise InvalidHttp("The Host is none.")
        if found["ipv6"]:
            return True
        name = found["name"].lower().removesuffix(".")
        return "." not in name or name in self._hosts or address_of(name) is not None


def _require_http(request: Request) -> None:
    """Raises InvalidHttp for what the parser lets pass and nobody needs: there, proxies and servers read it apart."""
    if request.version not in ("1.0", "1.1"):
        raise InvalidHttp("This server speaks HTTP/1.1 and HTTP/1.0 only.")
    codings = request.headers.getall("transfer-encoding", [])
    if codings and ([each.lower() for each in codings] != ["chunked"] or request.version == "1.0"):
        raise InvalidHttp("The only transfer coding taken here is chunked, of HTTP/1.1.")


def _is_same(origin: str, host: str) -> bool:
    """Whether the origin is the service's own, port included, as the browser's request names it."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return False
    default = _PORTS[found["scheme"]]
    return _with_port(found["host"], default) == _with_port(host, default)


def _with_port(host: str, default: str) -> tuple[str, str]:
    found = _HOST.fullmatch(host)
    return (host.lower(), "") if found is None else ((found["ipv6"] or found["name"]).lower(), found["port"] or default)


@contextlib.asynccontextmanager
async def serving(service: Service, listener: socket.socket, settings: Settings) -> AsyncIterator[Connections]:
    """While entered, the service runs and is served at the socket. Leaving takes no more connections, lets what was
    accepted be answered, for at most `drain_seconds_max`, and closes the socket. Raises CannotStart."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(service.running())
        except Exception as error:
            _log.exception("%s did not start", service.name)
            raise CannotStart(f"{service.name} did not start: see the log above") from error
        service.access = Access(settings, service.refused, service.keys, service.tokens, rates=service.rates)
        connections = Connections(settings, partial(service.respond, admit=Admission(settings)))
        # The system would take megabytes of an answer that nobody reads; connections take this over.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # asyncio does this only for sockets that it made; without it answers wait for the client's ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(partial(Connection, connections), sock=listener, backlog=BACKLOG)
        watching = asyncio.create_task(connections.close_late_forever())
        stack.callback(watching.cancel)
        try:
            yield connections
        finally:
            server.close()
            service.stopping.set()
            await _drain(connections, settings.drain_seconds_max)


async def _drain(connections: Connections, seconds_max: float) -> None:
    """Ends all: those that wait for an answer once they have it, or the time is up."""
    for each in list(connections.open):
        each.close()
    await _until(lambda: not connections.answering, seconds_max)
    await _until(lambda: not connections.open, FLUSH_SECONDS)
    for each in list(connections.open):
        each.abort()


async def _until(is_so: Callable[[], bool], seconds_max: float) -> None:
    """Returns when it is so, or the time is up."""
    give_up_at = time.monotonic() + seconds_max
    while not is_so() and time.monotonic() < give_up_at:  # noqa: ASYNC110  # an event would cost every request
        await asyncio.sleep(_POLL_SECONDS)
