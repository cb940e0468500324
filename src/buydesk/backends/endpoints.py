"""Clients' endpoints over HTTP, which are taken for hostile: messages are posted to addresses of the public internet
only, looked at when they are connected to; answers are bounded, lead nowhere else and are not read."""

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler

from buydesk import __version__
from buydesk.events.addresses import may_be_asked
from buydesk.events.delivery import TURNS_AT_ONCE_MAX, Answer, Sender
from buydesk.events.urls import parse_url
from buydesk.hosts import caller_address
from buydesk.observability.clock_skew import http_date
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock
from buydesk.way_out import proxy_for

_log = logging.getLogger("buydesk.services.process_buy_orders")

# Standard Webhooks 1.0 recommends 15 to 30 s; an endpoint had better answer before it sets to work.
SEND_SECONDS_MAX = 10.0
# What an endpoint says is not read: so much is taken off a connection that is to be used again.
ANSWER_BYTES_MAX = 16 * 1024
DRAIN_SECONDS_MAX = 1.0
# All that comes in answer to one message, heads and interim answers (RFC 9110, section 15.2) too: it is parsed.
RECEIVED_BYTES_MAX = 64 * 1024
_KEPT_SECONDS = 15.0
# Looking up a name may take its server's time, longer than a message may, and cannot be broken off. So the threads for
# that serve nothing else, and names that hang take at most so many for one client: its others wait for these.
LOOK_UPS_AT_ONCE_MAX = 2 * TURNS_AT_ONCE_MAX
LOOK_UPS_OF_A_CLIENT_MAX = 10
ORIGINS_KEPT_MAX = 1024
_CUT = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)
_client: ContextVar[str] = ContextVar("_client")  # whose message is being sent: aiohttp hands resolvers the name only
LookUp = Callable[..., Sequence[tuple[Any, ...]]]


class EndpointSender(Sender):
    """Posts to endpoints; to those of this machine only for a sandbox that nobody else reaches. `look_up` is
    socket.getaddrinfo."""

    def __init__(self, settings: Settings, clock: Clock = CLOCK, look_up: LookUp = socket.getaddrinfo) -> None:
        self._allows_loopback = allows_loopback(settings)
        self._connect_seconds = settings.connect_seconds_max
        self._clock = clock
        self._threads = ThreadPoolExecutor(LOOK_UPS_AT_ONCE_MAX, thread_name_prefix="webhook-names")
        self._look_up = look_up
        # To find out costs as much as to send, and the environment stays as it is.
        self._proxy_for = lru_cache(maxsize=ORIGINS_KEPT_MAX)(proxy_for)
        self._pools: dict[bool, aiohttp.ClientSession] = {}  # by whether it is for what goes through a proxy
        self.seconds_max = SEND_SECONDS_MAX

    async def send(self, client: str, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """See Sender."""
        _client.set(client)
        try:
            async with asyncio.timeout(self.seconds_max):
                try:
                    return await self._post(url, headers, body)
                except _CUT as error:  # a kept connection, most likely, that the endpoint had given up
                    if isinstance(error, aiohttp.ClientConnectorError):
                        raise
                    return await self._post(url, headers, body)
        except TimeoutError:
            return Answer("timed_out")
        except aiohttp.ClientSSLError:
            return Answer("tls_failed")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Not why: it could tell a stranger of names and addresses that only the desk can see.
            _log.debug("an endpoint cannot be reached: %s", type(error).__name__)
            return Answer("unreachable")

    async def close(self) -> None:
        """Closes the connections."""
        for pool in self._pools.values():
            await pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        parse_url(url, allows_loopback=self._allows_loopback)  # the desk's rules may have changed since it was stored
        proxy = self._proxy_for(urlsplit(url)._replace(path="", query="").geturl())
        pool = self._pool(is_proxied=proxy is not None)
        async with pool.post(url, data=body, headers=headers, allow_redirects=False, proxy=proxy) as response:
            with contextlib.suppress(aiohttp.ClientError, OSError):  # TimeoutError is an OSError
                async with asyncio.timeout(DRAIN_SECONDS_MAX):
                    await _drain(response)
            if 200 <= response.status < 300:
                return Answer("delivered", response.status)
            return Answer("rejected", response.status, self._retry_after_seconds(response))

    def _pool(self, *, is_proxied: bool) -> aiohttp.ClientSession:
        """Made at the first call, because it belongs to the running loop. A proxy of the operator's may be anywhere; it
        looks names up itself, and has to refuse those of inner networks."""
        if is_proxied not in self._pools:
            self._pools[is_proxied] = aiohttp.ClientSession(
                connector=_Connector(
                    limit=2 * TURNS_AT_ONCE_MAX,
                    keepalive_timeout=_KEPT_SECONDS,
                    use_dns_cache=False,
                    ssl=ssl.create_default_context(),
                    resolver=None if is_proxied else _ThreadedResolver(self._threads, self._look_up),
                    socket_factory=None if is_proxied else self._socket,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={
                    "User-Agent": f"buydesk/{__version__}",
                    "Content-Type": "application/json",
                    "Accept-Encoding": "identity",
                },
                timeout=aiohttp.ClientTimeout(sock_connect=self._connect_seconds, ceil_threshold=math.inf),
                auto_decompress=False,
            )
        return self._pools[is_proxied]

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for the address that is connected to next, whether it was looked up or stands in the URL; raises
        OSError for one that a webhook must not lead to."""
        family, kind, protocol, _, where = info
        if not may_be_asked(caller_address(where[0]), allows_loopback=self._allows_loopback):
            _log.info("a webhook leads to %s, which is not of the public internet: it is not asked", where[0])
            raise PermissionError("not an address of the public internet")
        return socket.socket(family, kind, protocol)

    def _retry_after_seconds(self, response: aiohttp.ClientResponse) -> int | None:
        """In how many seconds the endpoint wants to be asked again, if it says so in one of the two ways there are."""
        said = response.headers.get("Retry-After", "")
        if said.isascii() and said.isdecimal():
            return int(said[:9])
        moment = http_date(said)
        return None if moment is None else max(0, math.ceil((moment - self._clock.now()).total_seconds()))


def allows_loopback(settings: Settings) -> bool:
    """Whether webhooks may lead to this machine: for development, where nobody else reaches the desk."""
    return settings.price_feed == "sandbox" and not settings.is_beyond_loopback


class _BoundedHandler(ResponseHandler):
    """A connection's protocol that takes RECEIVED_BYTES_MAX for each request, and then breaks off. aiohttp bounds a
    head, and not how many interim answers come before the last one."""

    _taken = 0

    def set_response_params(self, **given: Any) -> None:
        """What aiohttp calls for each request."""
        self._taken = 0
        super().set_response_params(**given)

    def data_received(self, data: bytes) -> None:
        """Parses what may still come."""
        left = RECEIVED_BYTES_MAX - self._taken
        self._taken += len(data)
        super().data_received(data[: max(left, 0)])
        if self._taken > RECEIVED_BYTES_MAX and self.transport is not None:
            self.set_exception(aiohttp.ClientPayloadError("the answer is too long"))
            self.transport.abort()


class _Connector(aiohttp.TCPConnector):
    """aiohttp has no public way to say what a connection's protocol is: `_factory` makes it, as a test holds."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._factory = partial(_BoundedHandler, loop=self._loop)  # type: ignore[assignment]  # a subclass's


class _ThreadedResolver(AbstractResolver):
    """The system's resolver in threads of its own."""

    def __init__(self, threads: ThreadPoolExecutor, look_up: LookUp) -> None:
        self._threads = threads
        self._look_up = look_up
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(LOOK_UPS_OF_A_CLIENT_MAX))

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a name; raises OSError."""

        def look_up() -> Sequence[tuple[Any, ...]]:
            return self._look_up(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)

        turns = self._turns[_client.get()]
        await turns.acquire()
        looking = asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        looking.add_done_callback(partial(_ended, turns))
        await asyncio.wait([looking])  # which a message that is given up does not end: nor is its thread free
        found = looking.result()
        return [
            ResolveResult(
                hostname=host, host=where[0], port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for kind, _, protocol, _, where in found
        ]

    async def close(self) -> None:
        """Nothing here is its own."""


def _ended(turns: asyncio.Semaphore, looking: asyncio.Future[Any]) -> None:
    turns.release()
    if not looking.cancelled():
        looking.exception()  # nobody may be left to hear of it


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Takes a short answer off its connection, which can be used again then; one that is longer is cut."""
    taken = 0
    while taken <= ANSWER_BYTES_MAX and (part := await response.content.readany()):
        taken += len(part)
