"""Connections: how many there may be, in all and from one address, and how slow each may be.

Each second all of them are checked for what is late: timers would cost each request.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from fastapi import Response

from buydesk.errors import RequestTimeout
from buydesk.hosts import caller_address, counted
from buydesk.http.requests import Request
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

if TYPE_CHECKING:
    from buydesk.http.protocol import Connection

CHECK_SECONDS = 1.0

Respond = Callable[[Request], Awaitable[Response]]

_log = logging.getLogger(__name__)


class Connections:
    """All connections to one service. `respond` answers a request; times are monotonic."""

    def __init__(self, settings: Settings, respond: Respond, clock: Clock = CLOCK) -> None:
        self.respond = respond
        self.clock = clock
        self.open: set[Connection] = set()
        self.answering: set[asyncio.Task[None]] = set()  # also for clients that have gone
        self.request_seconds_max = settings.request_seconds_max
        self._settings = settings
        self._by_address: Counter[object] = Counter()

    def admit(self, connection: "Connection", peer: Sequence[object]) -> str:
        """Counts the connection; returns why there may be no more of them, "" when it is one."""
        address = connection.peer = caller_address(str(peer[0]))
        connection.is_of_proxy = any(address in proxy for proxy in self._settings.proxies)
        whose = None if connection.is_of_proxy else counted(address)
        if len(self.open) >= self._settings.connections_max:
            return "Too many connections are open."
        if whose is not None and self._by_address[whose] >= self._settings.connections_per_address_max:
            return "Too many connections are open from this address."
        self.open.add(connection)
        self._by_address[whose] += 1
        connection.whose = whose
        return ""

    def forget(self, connection: "Connection") -> None:
        """It has gone, if it was one."""
        if connection in self.open:
            self.open.remove(connection)
            self._by_address[connection.whose] -= 1
            if not self._by_address[connection.whose]:
                del self._by_address[connection.whose]

    async def close_late_forever(self) -> None:
        """Calls `close_late` every CHECK_SECONDS, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                self.close_late()
            except Exception:  # a fault with one must not end the time limits of all
                _log.exception("connections that are late could not be closed")

    def close_late(self) -> None:
        """Ends those that do not take their answer, are late with the head of a request, or idle for too long."""
        now, seconds_max = self.clock.monotonic(), self.request_seconds_max
        for each in list(self.open):
            if each.unread_since(now) < now - self._settings.write_seconds_max:
                each.abort()
            elif each.head_since is not None and now - each.head_since > seconds_max:
                each.refuse(RequestTimeout(f"The request was not complete within {seconds_max:g} s."))
            elif each.idle_since is not None and now - each.idle_since > self._settings.idle_seconds_max:
                each.close()
