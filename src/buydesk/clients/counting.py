"""Counting of requests by the library `limits`, in whatever keeps its windows: one rule for memory and Redis."""

from collections.abc import Sequence
from math import floor

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from buydesk.clients.rates import MINUTE_SECONDS, Count, Lot


class WindowCounters:
    """Sliding windows in a storage of the library. A lot that does not fit is taken as far as there is room."""

    def __init__(self, storage: MemoryStorage | RedisStorage) -> None:
        self._storage = storage
        self._strategy = SlidingWindowCounterRateLimiter(storage)

    async def take(self, lots: Sequence[Lot]) -> list[Count]:
        """One count each; raises what the storage does."""
        return [await self._take(lot) for lot in lots]

    async def _take(self, lot: Lot) -> Count:
        limit = RateLimitItemPerMinute(lot.per_minute, namespace="counted")
        taken = 0
        if lot.requests and await self._strategy.hit(limit, lot.counter, cost=lot.requests):
            taken = lot.requests
        count = await self._count(limit, lot.counter, taken)
        room = min(lot.requests, lot.per_minute - floor(_used(count)))
        if taken < lot.requests and room > 0 and await self._strategy.hit(limit, lot.counter, cost=room):
            return await self._count(limit, lot.counter, room)
        return count

    async def _count(self, limit: RateLimitItemPerMinute, counter: str, taken: int) -> Count:
        found = await self._storage.get_sliding_window(limit.key_for(counter), limit.get_expiry())
        previous, _, current, forgotten_in_seconds = found
        # The storage keeps a window for as long again as it lasts.
        return Count(taken, current, previous, max(0.0, forgotten_in_seconds - MINUTE_SECONDS))


def _used(count: Count) -> float:
    return count.current + count.previous * count.seconds / MINUTE_SECONDS
