"""The server: granian's, embedded, one for each service of the process in its event loop.

granian takes connections and reads and writes HTTP, in a thread of its own; nothing of ours does. What it leaves to its
application is here: which requests a desk takes at all, how long a client may take over its answer, and an end in time.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator
from functools import lru_cache
from ipaddress import ip_address
from typing import Protocol

from granian._granian import SocketHolder
from granian.constants import HTTPModes
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server as EmbeddedServer

from buydesk import request_ids
from buydesk.connections import end_all
from buydesk.errors import CannotStart, ForeignOrigin, InvalidHttp
from buydesk.local.ports import BACKLOG
from buydesk.settings import Settings
from buydesk.web import Body, Request, Scope, Service

# The request line and all headers together; of those there may be 100 (hyper's own limit).
HEAD_BYTES_MAX = 64 * 1024
# When nothing is worked on any more, answers have so long to reach their clients before the connections are cut.
FLUSH_SECONDS = 1.0
_POLL_SECONDS = 0.02
_HOST = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?", re.ASCII)
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#@]+)", re.ASCII)
_PORTS = {"http": "80", "https": "443"}
_SAFE = ("GET", "HEAD")
# On every answer. `server` would be granian's otherwise.
_HEADERS = [("server", "buydesk"), ("x-content-type-options", "nosniff"), ("x-frame-options", "DENY")]
_NOTHING_ELSE = ("content-security-policy", "default-src 'none'; frame-ancestors 'none'")

_log = logging.getLogger(__name__)


class Proto(Body, Protocol):
    """What granian lets its application read and write (RSGI's HTTP protocol)."""

    def response_bytes(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None: ...


class Admission:
    """Which requests a service hears of. Raises InvalidHttp for a host that cannot be told, and on an open desk
    ForeignOrigin for what a page of another site makes a browser send: by a name of its own that leads here (DNS
    rebinding), or across sites."""

    def __init__(self, settings: Settings) -> None:
        self._is_open = settings.access == "open"
        self._hosts = frozenset(settings.hosts)
        self._is_own = lru_cache(maxsize=256)(self._is_own_name)

    def __call__(self, scope: Scope) -> None:
        hosts = scope.headers.get_all("host")
        if len(hosts) != 1:
            if hosts or scope.http_version != "1":  # HTTP/1.0 knows no hosts, and no browser speaks it
                raise InvalidHttp("A request has exactly one Host.")
            return
        host = scope.authority or hosts[0]
        is_own = self._is_own(host)
        if not self._is_open:
            return
        if not is_own:
            raise ForeignOrigin(f"This open desk is not known as {host[:100]}: see BUYDESK_HOSTS.")
        if scope.method not in _SAFE and "origin" in scope.headers and not _is_same(scope.headers.get("origin"), host):
            raise ForeignOrigin("A page of another origin may not do this on an open desk.")

    def _is_own_name(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            raise InvalidHttp("The Host is none.")
        if found["ipv6"]:
            return True
        name = found["name"].lower().removesuffix(".")
        return "." not in name or name in self._hosts or _is_ipv4(name)


def _is_ipv4(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_same(origin: str | None, host: str) -> bool:
    """Whether the origin is the service's own, port included, as the browser's request names it."""
    found = _ORIGIN.fullmatch(origin or "")
    if found is None:
        return False
    default = _PORTS[found["scheme"]]
    return _with_port(found["host"], default) == _with_port(host, default)


def _with_port(host: str, default: str) -> tuple[str, str]:
    found = _HOST.fullmatch(host)
    return (host.lower(), "") if found is None else ((found["ipv6"] or found["name"]).lower(), found["port"] or default)


class Application:
    """A service as granian calls it. `busy` are the clients that wait for an answer."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.busy: set[str] = set()
        self._service = service
        self._admission = Admission(settings)
        self._seconds_max = settings.request_seconds_max

    async def __rsgi__(self, scope: Scope, proto: Proto) -> None:
        given = scope.headers.get_all(request_ids.HEADER)
        request_id = request_ids.begin(given[-1] if given else None)  # of several the nearest proxy's
        request = Request(scope, proto, self._seconds_max)
        client = scope.client
        self.busy.add(client)
        try:
            response = await self._service.respond(request, self._admission)
        finally:
            self.busy.discard(client)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers]
        headers += _HEADERS
        headers.append((request_ids.HEADER, request_id))
        if response.media_type != "text/html":  # a page says itself what it needs
            headers.append(_NOTHING_ELSE)
        proto.response_bytes(response.status_code, headers, bytes(response.body))


class Server(EmbeddedServer):
    """granian's embedded server, on a socket that listens already: it would make one that shares its port."""

    def __init__(self, application: Application, listener: socket.socket, settings: Settings) -> None:
        super().__init__(
            application,
            http=HTTPModes.http1,
            websockets=False,
            backpressure=settings.connections_max,
            http1_settings=HTTP1Settings(
                header_read_timeout=int(settings.idle_seconds_max * 1000), max_buffer_size=HEAD_BYTES_MAX
            ),
            # Its errors go where all logs go. It warns at each start that it is experimental.
            log_level=LogLevels.error,
            log_dictconfig={"formatters": {}, "handlers": {}, "loggers": {}},
        )

        # Not described by its stubs: a file that listens, whether it is a unix socket, and the backlog.
        self._listening = SocketHolder(os.dup(listener.fileno()), False, BACKLOG)  # type: ignore[call-arg]

    def _init_shared_socket(self) -> None:
        self._shd = self._listening  # type: ignore[assignment]


@contextlib.asynccontextmanager
async def serving(service: Service, listener: socket.socket, settings: Settings) -> AsyncIterator[Application]:
    """While entered, the service runs and is served at the socket. Leaving takes no more connections, lets what was
    accepted be answered, for `drain_seconds_max` at the most, and closes the socket. Raises CannotStart."""
    application = Application(service, settings)
    port = listener.getsockname()[1]
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; taken over by every connection
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(settings.write_seconds_max * 1000)))
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(service.running())
        except Exception as error:
            _log.exception("%s did not start", service.name)
            raise CannotStart(f"{service.name} did not start: see the log above") from error
        server = Server(application, listener, settings)
        serving = asyncio.create_task(server.serve())
        try:
            yield application
        finally:
            listener.close()
            server.stop()  # type: ignore[no-untyped-call]
            await _drained(application, serving, settings.drain_seconds_max)
            end_all(port)
            await serving


async def _drained(application: Application, serving: "asyncio.Task[None]", seconds_max: float) -> None:
    """Returns when the server has ended, or only waits for clients that are slow to read or to ask."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds_max):
            while application.busy and not serving.done():  # noqa: ASYNC110  # an event would cost every request
                await asyncio.sleep(_POLL_SECONDS)
    await asyncio.wait([serving], timeout=FLUSH_SECONDS)
