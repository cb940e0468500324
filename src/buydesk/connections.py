"""Connections: how many each address has to the services of this process, and an end to those that are too many.

The server takes connections and says nothing of them before there is a request; but they are open files of this
process, and the system knows whose they are. A connection is ended by shutting its socket down: to the server it looks
as if the client had closed it.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

LOOK_SECONDS = 1.0
# An IPv6 client has a network of this size to itself.
IPV6_CLIENT_BITS = 64
_OPEN_FILES = Path("/dev/fd")  # Linux and macOS have it
# So many take a millisecond; requests are answered between slices of them.
_SLICE_FILES = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection to a port of ours. `client` is what the server calls the other end: address and port."""

    fd: int
    port: int
    address: IPv4Address | IPv6Address
    client: str

    def end(self) -> None:
        """Shuts it down, if the file is still this connection."""
        with contextlib.suppress(OSError), _shared(self.fd) as own:
            if _client_of(own.getpeername()) == self.client and own.getsockname()[1] == self.port:
                own.shutdown(socket.SHUT_RDWR)


class ConnectionLimit:
    """At most `per_address_max` connections of one address to one port; `proxies` may have more, because they have many
    clients. Of too many, those end first that wait for no answer: `is_busy` says of a client whether it does."""

    def __init__(
        self,
        ports: Collection[int],
        per_address_max: int,
        proxies: Collection[IPv4Network | IPv6Network],
        is_busy: Callable[[str], bool],
    ) -> None:
        self.ended = 0
        self._ports = frozenset(ports)
        self._per_address_max = per_address_max
        self._proxies = proxies
        self._is_busy = is_busy

    async def watch(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Looks every LOOK_SECONDS, until cancelled."""
        while True:
            await self.look()
            await sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Ends what is too much now. Costs next to nothing while all open files together are not too many."""
        fds = _open_files()
        if len(fds) <= self._per_address_max:
            return
        found: dict[object, list[Connection]] = defaultdict(list)
        for start in range(0, len(fds), _SLICE_FILES):
            for connection in connections(self._ports, fds[start : start + _SLICE_FILES]):
                found[connection.port, _counted(connection.address)].append(connection)
            await asyncio.sleep(0)
        for whose in found.values():
            surplus = len(whose) - self._per_address_max
            if surplus > 0 and not any(whose[0].address in proxy for proxy in self._proxies):
                whose.sort(key=lambda each: self._is_busy(each.client))
                _log.info(
                    "%s has %d connections to port %d: ending %d", whose[0].address, len(whose), whose[0].port, surplus
                )
                for each in whose[:surplus]:
                    each.end()
                self.ended += surplus


def connections(ports: Collection[int], fds: Collection[int] | None = None) -> Iterator[Connection]:
    """The connections to these ports among the open files of this process, or among those given."""
    for fd in _open_files() if fds is None else fds:
        with contextlib.suppress(OSError), _shared(fd) as own:
            here = own.getsockname()
            if isinstance(here, tuple) and here[1] in ports:
                there = own.getpeername()
                yield Connection(fd, here[1], _address(there[0]), _client_of(there))


def end_all(port: int) -> None:
    """Ends every connection to the port."""
    for each in connections([port]):
        each.end()


def _shared(fd: int) -> socket.socket:
    """The socket that the file is, as a second file: whatever becomes of the first one, this stays the same connection.
    Raises OSError when it is none."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _open_files() -> list[int]:
    return [int(path.name) for path in _OPEN_FILES.iterdir()]


def _client_of(peer: tuple[str, int]) -> str:
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _counted(address: IPv4Address | IPv6Address) -> object:
    """What connections are counted by."""
    return address if address.version == 4 else ip_network((address, IPV6_CLIENT_BITS), strict=False)
