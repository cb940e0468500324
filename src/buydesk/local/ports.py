"""Ports: bound before anything else is started, so that a busy one is found while nothing has happened yet."""

import resource
import socket
from collections.abc import Collection

from buydesk.errors import CannotStart
from buydesk.settings import Settings

BACKLOG = 2048
# All six services at `connections_max`, and the connections between them.
OPEN_FILES = 65_536


def bind(settings: Settings, services: Collection[str]) -> dict[str, socket.socket]:
    """Listening sockets for the services; raises CannotStart, with none left bound, when one cannot be had."""
    listeners: dict[str, socket.socket] = {}
    try:
        for service in services:
            listeners[service] = _listen(settings.host, settings.port(service), service)
    except CannotStart:
        close(listeners.values())
        raise
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


def _listen(host: str, port: int, service: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        mend = "free it, or shift all ports with --port-offset 100"
        raise CannotStart(f"{service} cannot listen on {host} port {port} ({why}): {mend}") from error
