"""The health desk in Redis (commands of 6.2): what is kept survives health_check, and several of them share it.

`buydesk:reports` is a stream, capped; `buydesk:reports:last` a hash with the last report of each service;
`buydesk:reports:others` a sorted set of the services that are not ours, by the time of their last report.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from buydesk.errors import HealthUnavailable
from buydesk.health import OTHERS_KEPT_MAX, SERVICES, KeptReport, Level, Report, kept_document, kept_from
from buydesk.settings import Settings
from buydesk.times import utc_now

_STREAM = "buydesk:reports"
_LAST = "buydesk:reports:last"
_OTHERS = "buydesk:reports:others"
# Other work of Redis goes on between slices of this many.
_SLICE_REPORTS = 250

# Of the reports from the id ARGV[1] back, ARGV[2] at the most, those of the service ARGV[3] and the level ARGV[4], each
# if not empty; and the id of the oldest one looked at, empty if there are none before it. In Redis, because reading a
# report out of it costs about five times more than passing it over.
_MATCHING = """
local entries = redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])
local found = {}
for _, entry in ipairs(entries) do
  local service, level, document = entry[2][2], entry[2][4], entry[2][6]
  if (ARGV[3] == '' or ARGV[3] == service) and (ARGV[4] == '' or ARGV[4] == level) then
    found[#found + 1] = document
  end
end
return {#entries < tonumber(ARGV[2]) and '' or entries[#entries][1], found}
"""


class RedisHealthDesk:
    """HealthDesk. Owns the client it is given (one that answers in bytes), and closes it.

    A filter passes over 250 reports a call until it has found enough or seen all: about 0.04 s for 4000 reports, of
    which no call holds Redis for longer than some 2 ms.
    """

    def __init__(self, client: Redis, settings: Settings, now: Callable[[], datetime] = utc_now) -> None:
        self._client = client
        self._now = now
        self._kept_max = settings.reports_kept_max
        self._seconds_max = settings.remote_seconds_max

    async def report(self, report: Report) -> None:
        """See HealthDesk."""
        kept = KeptReport(report, self._now())
        text = msgspec.json.encode(kept_document(kept))
        async with self._answering():
            changes = self._client.pipeline(transaction=True)
            entry = {"service": report.service, "level": report.level, "document": text}
            changes.xadd(_STREAM, cast("dict[Any, Any]", entry), maxlen=self._kept_max, approximate=False)
            changes.hset(_LAST, report.service, text)
            if report.service in SERVICES:
                await changes.execute()
                return
            changes.zadd(_OTHERS, {report.service: kept.arrived_at.timestamp()})
            changes.zcard(_OTHERS)
            surplus = (await changes.execute())[-1] - OTHERS_KEPT_MAX
            if surplus > 0:
                silent = cast("list[tuple[bytes, float]]", await self._client.zpopmin(_OTHERS, surplus))
                await self._client.hdel(_LAST, *(name for name, _ in silent))

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[KeptReport]:
        """See HealthDesk."""
        found: list[bytes] = []
        newest = b"+"
        async with self._answering():
            while newest and len(found) < limit:
                # Without a filter every report counts: no more are read than are wanted.
                slice_reports = _SLICE_REPORTS if service or level else min(limit - len(found), _SLICE_REPORTS)
                oldest, matching = await cast(
                    "Awaitable[tuple[bytes, list[bytes]]]",
                    self._client.eval(_MATCHING, 1, _STREAM, newest, slice_reports, service or "", level or ""),
                )
                found += matching
                newest = oldest and b"(" + oldest
            return [kept_from(msgspec.json.decode(document)) for document in found[:limit]]

    async def last_of_each(self) -> Sequence[KeptReport]:
        """See HealthDesk."""
        async with self._answering():
            texts = await cast("Awaitable[list[bytes]]", self._client.hvals(_LAST))
            return [kept_from(msgspec.json.decode(text)) for text in texts]

    async def check(self) -> None:
        """See HealthDesk."""
        async with self._answering():
            await self._client.ping()

    async def close(self) -> None:
        """Closes the client."""
        await self._client.aclose()

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """Bounds the time; whatever is wrong with Redis, or with what it holds, becomes HealthUnavailable."""
        try:
            async with asyncio.timeout(self._seconds_max):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            raise HealthUnavailable(f"Redis gave no answer ({type(error).__name__}).", retry_after_seconds=1) from error
        except (ValueError, LookupError, TypeError) as error:
            raise HealthUnavailable("Redis holds something that is not a report.") from error
