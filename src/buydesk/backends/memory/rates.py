"""MemoryRateStore: the counts of a desk without Redis; they last as long as the process that owns them."""

from collections.abc import Sequence

from limits.aio.storage import MemoryStorage

from buydesk.clients.counting import WindowCounters
from buydesk.clients.rates import Count, Lot, RateStore

# A caller has up to two for each kind. The library looks through all of them whenever it counts.
WINDOWS_MAX = 20_000


class MemoryRateStore(RateStore):
    """In this process. With too many windows it begins anew: what each edge let through, the edge knows by itself."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._counters = WindowCounters(self._storage)

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        if len(self._storage.expirations) >= WINDOWS_MAX:
            await self._storage.reset()
        return await self._counters.take(lots)

    async def close(self) -> None:
        """There is nothing to close."""
