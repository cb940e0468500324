"""RedisPriceStore: the price store in Redis 6.2 or newer, or Valkey.

Three keys a feed, so that recorded and live prices never mix: a hash with the current record, a sorted set with the
points of the last day by the time of their observation, and the status of the sources. Expiry in Redis only bounds
memory: whether a record is valid is judged by its `expires_at`.
"""

from collections.abc import Awaitable, Sequence
from datetime import datetime, timedelta
from typing import cast

import msgspec
from redis.asyncio import Redis

from buydesk.backends.redis.faults import time_of
from buydesk.backends.redis.store import UNREADABLE, RedisStore
from buydesk.errors import PriceStoreUnavailable, PriceUnavailable
from buydesk.limits import in_slices
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.prices.documents import document_of, feed_status_from, point_from, record_document, record_from
from buydesk.prices.model import (
    KEPT_FOR,
    RETRY_AFTER_SECONDS,
    FeedStatus,
    PricePoint,
    PriceRecord,
    PriceStore,
    UsablePrice,
    history_span,
    latest_time,
    recent_feed_status,
    superseded,
    valid_record,
)
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, EPOCH, Clock

_MICROSECOND = timedelta(microseconds=1)

# Makes the record the current one unless that is newer and not from the future (later than ARGV[8]); returns when the
# newer one was made, otherwise 0 and, if the record was the current one already, its document. Points observed later
# leave the history, so that the last point is the current record's. One script, so that no other updater writes between
# the comparison and the writing. Times are whole microseconds, which are exact in Lua's numbers until the year 2255.
_PUBLISH = """
local id, as_of, document, point = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local kept_for, records_max = tonumber(ARGV[5]), tonumber(ARGV[6])
local made_at, latest_time = tonumber(ARGV[7]), tonumber(ARGV[8])
local current = redis.call('HMGET', KEYS[1], 'id', 'made_at')
local current_made_at = tonumber(current[2] or 0) or 0
if current[1] == id then
  return {0, redis.call('HGET', KEYS[1], 'document')}
elseif made_at < current_made_at and current_made_at <= latest_time then
  return {current_made_at}
end
redis.call('HSET', KEYS[1], 'id', id, 'made_at', ARGV[7], 'document', document)
redis.call('ZREMRANGEBYSCORE', KEYS[2], ARGV[2], '+inf')
redis.call('ZADD', KEYS[2], ARGV[2], point)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', as_of - kept_for * 1000000))
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -records_max - 1)
redis.call('EXPIRE', KEYS[1], kept_for)
redis.call('EXPIRE', KEYS[2], kept_for)
return {0}
"""

# The points observed after ARGV[1] and not after ARGV[2], newest first. When they are more than ARGV[3]: from the
# newest down, each time the last one before the span (of ARGV[4] microseconds) that the one found before lies in.
_HISTORY = """
local since, upper, points, span = '(' .. ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('ZCOUNT', KEYS[1], since, upper) <= points then
  return redis.call('ZRANGE', KEYS[1], upper, since, 'BYSCORE', 'REV')
end
local found = {}
while #found < points do
  local last = redis.call('ZRANGE', KEYS[1], upper, since, 'BYSCORE', 'REV', 'LIMIT', 0, 1, 'WITHSCORES')
  if not last[1] then break end
  found[#found + 1] = last[1]
  local as_of = tonumber(last[2])
  upper = '(' .. string.format('%.0f', as_of - math.fmod(as_of, span))
end
return found
"""


def kinds(settings: Settings) -> dict[str, str]:
    """The keys of a price store, and what kind of value each holds."""
    prefix = f"buydesk:prices:{settings.price_feed}"
    # Not "history": earlier versions kept whole records under that name, which expire by themselves.
    return {f"{prefix}:current": "hash", f"{prefix}:points": "zset", f"{prefix}:sources": "string"}


class RedisPriceStore(RedisStore, PriceStore):
    """The price store in Redis; `clocks` hear what time it is there."""

    def __init__(
        self, client: Redis, settings: Settings, clock: Clock = CLOCK, clocks: ClockMonitor | None = None
    ) -> None:
        super().__init__(client, settings, PriceStoreUnavailable, "a price record")
        self._clocks = clocks or ClockMonitor("this process", settings.clock_skew_seconds_max)
        self._settings = settings
        self._clock = clock
        self._seen: UsablePrice | None = None
        self._current_key, self._points_key, self._sources_key = kinds(settings)

    async def publish(self, record: PriceRecord) -> PriceRecord:
        """Publishing again after a lost answer changes nothing."""
        arguments = (
            str(record.id),
            _microseconds(record.as_of),
            msgspec.json.encode(record_document(record)),
            msgspec.json.encode(document_of(record.point())),
            int(KEPT_FOR.total_seconds()),
            self._settings.price_history_records_max,
            _microseconds(record.made_at),
            _microseconds(latest_time(self._clock.now(), self._settings.clock_skew_seconds_max)),
        )
        async with self._answering():
            newer, *documents = await self._run(_PUBLISH, [self._current_key, self._points_key], *arguments)
            current = record_from(msgspec.json.decode(documents[0])) if documents else record
        if newer:
            raise superseded(EPOCH + newer * _MICROSECOND)
        return current

    async def latest(self) -> PriceRecord:
        async with self._answering():
            document = await cast("Awaitable[bytes | None]", self._client.hget(self._current_key, "document"))
            current = None if document is None else record_from(msgspec.json.decode(document))
        now = self._clock.now()
        moment = self._clock.monotonic()
        if current is not None:
            try:
                # First: what is no price of ours, but of a hand, another version or other settings, says nothing about
                # whether ours has ended.
                require_proven(current, self._settings, now)
            except WrongMember as error:
                detail = f"The stored record is no price of this desk: {error}."
                raise PriceUnavailable(detail, retry_after_seconds=RETRY_AFTER_SECONDS) from error
        record = valid_record(current, now, self._settings.clock_skew_seconds_max)
        self._seen = UsablePrice.seen(record, now, moment, self._seen)
        return self._seen.usable(moment)

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        now = self._clock.now()
        arguments = (
            _microseconds(now - timedelta(minutes=minutes)),
            _microseconds(latest_time(now, self._settings.clock_skew_seconds_max)),
            points,
            history_span(minutes, points) // _MICROSECOND,
        )
        async with self._answering():
            documents: list[bytes] = await self._run(_HISTORY, [self._points_key], *arguments)
            found = await in_slices(_readable_point, documents[::-1])
        return [point for point in found if point is not None]

    async def put_feed_status(self, state: FeedStatus) -> None:
        document = msgspec.json.encode(document_of(state))
        async with self._answering():
            asked_at = self._clocks.moment()
            self._clocks.hear("Redis", time_of(await self._client.time()), asked_at)
            await self._client.set(self._sources_key, document, ex=KEPT_FOR)

    async def feed_status(self) -> FeedStatus:
        async with self._answering():
            document = await self._client.get(self._sources_key)
            status = None if document is None else feed_status_from(msgspec.json.decode(document))
        return recent_feed_status(status, self._clock.now())


def _readable_point(document: bytes) -> PricePoint | None:
    """The point, None for what is none: one that cannot be read must not keep the others, and all prices, away."""
    try:
        return point_from(msgspec.json.decode(document))
    except UNREADABLE:
        return None


def _microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // _MICROSECOND
