"""RedisRateStore: requests of all services' callers, in Redis. A window is a number under a key of its own, which
expires two minutes after it began."""

from collections.abc import Sequence

from limits.aio.storage import RedisStorage
from redis.asyncio import Redis

from buydesk.backends.redis.store import RedisStore
from buydesk.clients.counting import WindowCounters
from buydesk.clients.rates import Count, Lot, RateStore
from buydesk.errors import RatesUnavailable
from buydesk.settings.model import Settings


class RedisRateStore(RedisStore, RateStore):
    """Two calls of Redis for a lot: one that counts it and one that tells what came of that."""

    def __init__(self, client: Redis, settings: Settings) -> None:
        super().__init__(client, settings, RatesUnavailable, "a count of requests")
        storage = RedisStorage(
            "redis://",  # not where it is: the client's connections are used
            implementation="redispy",
            key_prefix=f"buydesk:rates:{settings.price_feed}",
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # the library passes it on
        )
        self._counters = WindowCounters(storage)

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        async with self._answering():
            return await self._counters.take(lots)
