"""RedisPriceBoard: the price board in Redis 6.2 or newer, or Valkey.

Two keys a feed, so that recorded and live prices never mix: a hash with the record that hangs, and a sorted set with
the documents of the last day by the time of their observation. Expiry in Redis only bounds memory: whether a record is
valid is judged by its `expires_at`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from buydesk.errors import PriceBoardUnavailable
from buydesk.price_documents import record_document, record_from
from buydesk.prices import KEPT_FOR, PriceRecord, observed_by, superseded, valid_record
from buydesk.settings import Settings
from buydesk.times import utc_now

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# A day of documents takes a while to read; other work goes on between slices of this many.
_SLICE_RECORDS = 100

# Hangs the record unless a newer one hangs that is not from the future (later than ARGV[7]); returns the as_of of that
# one, otherwise 0. What is newer leaves the history: it is from the future, or was hung before it. One script, because
# the comparison and the writing must not be torn apart by another updater. Times are whole microseconds, which are
# exact in Lua's numbers until the year 2255.
_PUBLISH = """
local id, as_of, expires_at, document = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local kept_for, records_max, observed_by = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local hanging = redis.call('HMGET', KEYS[1], 'id', 'as_of', 'expires_at', 'document')
if hanging[1] == id then
  if expires_at >= tonumber(hanging[3]) then return 0 end
  redis.call('ZREM', KEYS[2], hanging[4])
elseif hanging[1] and as_of < tonumber(hanging[2]) and tonumber(hanging[2]) <= observed_by then
  return tonumber(hanging[2])
end
redis.call('HSET', KEYS[1], 'id', id, 'as_of', ARGV[2], 'expires_at', ARGV[3], 'document', document)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '(' .. ARGV[2], '+inf')
redis.call('ZADD', KEYS[2], ARGV[2], document)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', as_of - kept_for * 1000000))
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -records_max - 1)
redis.call('EXPIRE', KEYS[1], kept_for)
redis.call('EXPIRE', KEYS[2], kept_for)
return 0
"""


class RedisPriceBoard:
    """PriceBoard, in Redis. Owns the client it is given, and closes it."""

    def __init__(self, client: Redis, settings: Settings, now: Callable[[], datetime] = utc_now) -> None:
        self._client = client
        self._seconds_max = settings.remote_seconds_max
        self._records_max = settings.price_history_records_max
        self._skew_seconds_max = settings.clock_skew_seconds_max
        self._now = now
        self._hanging_key = f"buydesk:prices:{settings.price_feed}:hanging"
        self._history_key = f"buydesk:prices:{settings.price_feed}:history"

    async def publish(self, record: PriceRecord) -> None:
        """See PriceBoard. Publishing again after a lost answer changes nothing."""
        arguments = (
            str(record.id),
            _microseconds(record.as_of),
            _microseconds(record.expires_at),
            msgspec.json.encode(record_document(record)),
            int(KEPT_FOR.total_seconds()),
            self._records_max,
            _microseconds(observed_by(self._now(), self._skew_seconds_max)),
        )
        async with self._faults():
            newer = await cast(
                "Awaitable[int]", self._client.eval(_PUBLISH, 2, self._hanging_key, self._history_key, *arguments)
            )
        if newer:
            raise superseded(_EPOCH + newer * _MICROSECOND)

    async def latest(self) -> PriceRecord:
        """See PriceBoard."""
        async with self._faults():
            document = await cast("Awaitable[bytes | None]", self._client.hget(self._hanging_key, "document"))
            hanging = None if document is None else _record(document)
        return valid_record(hanging, self._now(), self._skew_seconds_max)

    async def history(self, minutes: int) -> Sequence[PriceRecord]:
        """See PriceBoard."""
        since = _microseconds(self._now() - timedelta(minutes=minutes))
        async with self._faults():
            documents = cast("list[bytes]", await self._client.zrangebyscore(self._history_key, f"({since}", "+inf"))
            records: list[PriceRecord] = []
            for start in range(0, len(documents), _SLICE_RECORDS):
                records += map(_record, documents[start : start + _SLICE_RECORDS])
                await asyncio.sleep(0)
        return records

    async def check(self) -> None:
        """See PriceBoard."""
        async with self._faults():
            await self._client.ping()

    async def close(self) -> None:
        """See PriceBoard."""
        await self._client.aclose()

    @asynccontextmanager
    async def _faults(self) -> AsyncIterator[None]:
        """Turns whatever is wrong with Redis, or with what it holds, into PriceBoardUnavailable."""
        try:
            async with asyncio.timeout(self._seconds_max):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            raise PriceBoardUnavailable(f"Redis failed ({type(error).__name__}).", retry_after_seconds=1) from error
        except ValueError as error:
            raise PriceBoardUnavailable("Redis holds something that is not a price record.") from error


def _record(document: bytes) -> PriceRecord:
    return record_from(msgspec.json.decode(document))


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND
