"""Ports: bound before anything else is started, so that a busy one is found while nothing has happened yet."""

import contextlib
import errno
import resource
import socket
from collections.abc import Collection
from ipaddress import IPv6Address

from buydesk.errors import CannotStart
from buydesk.hosts import address_of
from buydesk.settings.model import PORT_OFFSET_MAX, Settings, variable
from buydesk.topology import PORTS

BACKLOG = 2048
# All eight services at `connections_max`, and the connections between them.
OPEN_FILES = 65_536
# All ports of a desk lie within one of these steps.
OFFSET_STEP = 100


def bind(settings: Settings, services: Collection[str]) -> dict[str, socket.socket]:
    """Listening sockets for the services; raises CannotStart, with none left bound, when one cannot be had."""
    listeners: dict[str, socket.socket] = {}
    try:
        for service in services:
            listeners[service] = _listen(settings.host, settings.port(service))
    except OSError as error:
        close(listeners.values())
        where = f"{service} cannot listen on {settings.host} port {settings.port(service)}"
        mend = _mend(settings) if error.errno == errno.EADDRINUSE else f"use another --host ({variable('host')})"
        why = (error.strerror or str(error)).partition(" (while ")[0]  # Python tells the address once more
        raise CannotStart(f"{where} ({why}): {mend}") from error
    return listeners


def allow_connections() -> None:
    """Raises this process's limit of open files, one for each connection, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def close(listeners: Collection[socket.socket]) -> None:
    """Closes them all."""
    for listener in listeners:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Who says :: means every address of this machine.
    is_dual = address_of(host) == IPv6Address(0) and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)


def _mend(settings: Settings) -> str:
    """What to do about a busy port."""
    mend = f"free it, or shift all ports with --port-offset ({variable('port_offset')})"
    offset = settings.port_offset
    others = (*range(offset + OFFSET_STEP, PORT_OFFSET_MAX + 1, OFFSET_STEP), *range(0, offset, OFFSET_STEP))
    free = next((each for each in others if _are_free(settings.host, each)), None)
    return mend if free is None else f"{mend}; all are free at {free}"


def _are_free(host: str, offset: int) -> bool:
    """Whether a desk could have all its ports at this offset now."""
    with contextlib.ExitStack() as bound:
        try:
            for port in PORTS.values():
                bound.enter_context(_listen(host, port + offset))
        except OSError:
            return False
        return True
