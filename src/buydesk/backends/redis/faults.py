"""What is wrong with Redis, in words, and whether anything is: a check that does what the desk needs of it."""

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta

from redis import exceptions
from redis.asyncio import Redis

from buydesk.errors import DeskError, ReportsUnavailable
from buydesk.limits import SharedCheck
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.times import EPOCH

FAULTS = (exceptions.RedisError, OSError, TimeoutError)
_OF_A_CLUSTER = (
    exceptions.ClusterCrossSlotError,
    exceptions.ClusterDownError,
    exceptions.AskError,
    exceptions.MovedError,
)
# What the server itself replied. The others are of the driver, and name the address.
_REPLIES = (exceptions.ResponseError, exceptions.AuthenticationError, exceptions.BusyLoadingError)

_PROBE_KEY = "buydesk:probe"
_PROBE_KEPT_SECONDS = 60
# Prices are published by a script, with these commands.
_PUBLISH_NOTHING = """
redis.call('HSET', KEYS[1], 'id', redis.call('HMGET', KEYS[1], 'id')[1] or '')
redis.call('ZADD', KEYS[2], 0, '')
redis.call('ZREMRANGEBYSCORE', KEYS[2], 1, 2)
redis.call('ZREMRANGEBYRANK', KEYS[2], 1, -1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[1])
"""


def meaning_of(error: Exception, unavailable: type[DeskError]) -> DeskError:
    """What a fault of Redis means to whoever wanted something of it: the "unavailable" error."""
    if isinstance(error, _OF_A_CLUSTER):
        detail = "Redis runs as a cluster, and the desk needs a single server."
    else:
        detail = f"Redis failed ({type(error).__name__})."
    said = str(error) if isinstance(error, _REPLIES) else ""
    return unavailable(detail, retry_after_seconds=1, server_said=said)


def time_of(time: tuple[int, int]) -> datetime:
    """What TIME answered: seconds since 1970, and microseconds."""
    return EPOCH + timedelta(seconds=time[0], microseconds=time[1])


class RedisCheck:
    """Raises ReportsUnavailable unless Redis takes writes, runs scripts and holds, under each of the keys, the kind of
    value that the desk keeps there, or nothing."""

    def __init__(self, client: Redis, kinds: Mapping[str, str], seconds_max: float, clocks: ClockMonitor) -> None:
        self._client = client  # owned, and closed
        self._clocks = clocks
        self._kinds = kinds
        self._seconds_max = seconds_max
        self._shared = SharedCheck(self._check)

    async def __call__(self) -> None:
        """One call of Redis for all who ask while it runs."""
        await self._shared()

    async def close(self) -> None:
        """Closes the client."""
        await self._client.aclose()

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(self._seconds_max), self._client.pipeline(transaction=False) as pipeline:
                for key in self._kinds:
                    pipeline.type(key)
                pipeline.set(_PROBE_KEY, "", ex=_PROBE_KEPT_SECONDS)
                pipeline.eval(_PUBLISH_NOTHING, 2, f"{_PROBE_KEY}:hash", f"{_PROBE_KEY}:set", _PROBE_KEPT_SECONDS)
                pipeline.time()
                asked_at = self._clocks.moment()
                *found, _, _, time = await pipeline.execute()
                self._clocks.hear("Redis", time_of(time), asked_at)
        except FAULTS as error:
            raise meaning_of(error, ReportsUnavailable) from error
        for (key, kind), other in zip(self._kinds.items(), found, strict=True):
            if other.decode() not in ("none", kind):
                detail = f"Redis holds a {other.decode()} under {key}, where the desk keeps a {kind}: delete it."
                raise ReportsUnavailable(detail, retry_after_seconds=1)
