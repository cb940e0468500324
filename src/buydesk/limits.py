"""Limits on what reads and strangers may take from orders: how often, how many at a time, one check for all who ask,
slices of long work."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from buydesk.errors import Overloaded, RateLimited
from buydesk.times import CLOCK, Clock


class TokenBucket:
    """A token bucket: `at_once_max` may be taken at once, `per_second_max` in the long run, by all callers together."""

    def __init__(self, per_second_max: int, at_once_max: int, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._per_second_max = per_second_max
        self._at_once_max = at_once_max
        self._left: float = at_once_max
        self._at = clock.monotonic()

    def take(self) -> None:
        """Takes one; raises RateLimited, with the seconds until there is one again."""
        before, self._at = self._at, self._clock.monotonic()
        filled = (self._at - before) * self._per_second_max
        self._left = min(self._left + filled, self._at_once_max)
        if self._left < 1:
            raise RateLimited(
                f"At the most {self._per_second_max} a second are taken here, of all callers together.",
                retry_after_seconds=math.ceil((1 - self._left) / self._per_second_max),
            )
        self._left -= 1


# This many orders, or points of a chart, take a fraction of a millisecond to write.
SLICE_ITEMS = 100
T = TypeVar("T")
U = TypeVar("U")


class Bulkhead:
    """At most `places` at a time. `waiting_max` may wait for one, each for `seconds_max`, first come, first served."""

    def __init__(self, places: int, waiting_max: int, seconds_max: float) -> None:
        self._free = asyncio.Semaphore(places)
        self._waiting = 0
        self._waiting_max = waiting_max
        self._seconds_max = seconds_max

    async def __aenter__(self) -> None:
        """While entered, a place is taken; raises Overloaded, at once when too many wait already."""
        if not self._free.locked():
            await self._free.acquire()  # at once
            return
        if self._waiting >= self._waiting_max:
            raise Overloaded(f"{self._waiting} reads are waiting already.", retry_after_seconds=1)
        self._waiting += 1
        try:
            async with asyncio.timeout(self._seconds_max):
                await self._free.acquire()
        except TimeoutError as error:
            raise Overloaded("The read waited too long.", retry_after_seconds=1) from error
        finally:
            self._waiting -= 1

    async def __aexit__(self, *_: object) -> None:
        self._free.release()


# A desk that has recovered says so within two of these: that of db_proxy, and that of whoever asks db_proxy.
FAILURE_COUNTS_SECONDS = 1.0


class SharedCheck:
    """A check that all who ask while it runs share, and its failure for a second more: however many ask, it takes one
    connection, and one that fails, which often costs that connection, takes one a second."""

    def __init__(self, check: Callable[[], Coroutine[None, None, None]]) -> None:
        self._check = check
        self._running: asyncio.Task[None] | None = None
        self._failed_at = -math.inf

    async def __call__(self) -> None:
        """Raises what the check raises."""
        failed_lately = time.monotonic() - self._failed_at < FAILURE_COUNTS_SECONDS
        if self._running is None or (self._running.done() and not failed_lately):
            self._running = asyncio.create_task(self._check())
            self._running.add_done_callback(self._note)
        # Who gives up waiting must not end it for the others.
        await asyncio.shield(self._running)

    def _note(self, check: asyncio.Task[None]) -> None:
        # When all who asked have given up, nobody else fetches its exception.
        if not check.cancelled() and check.exception() is not None:
            self._failed_at = time.monotonic()


async def in_slices(make: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """What `make` makes of each item; other requests are answered between slices of them."""
    made: list[U] = []
    for start in range(0, len(items), SLICE_ITEMS):
        if start:
            await asyncio.sleep(0)
        made += map(make, items[start : start + SLICE_ITEMS])
    return made
