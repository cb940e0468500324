"""The health desk in Redis (commands of 6.2): what is kept survives health_check, and several of them share it.

`buydesk:reports:verified` is a stream, capped; with `:last` after it a hash with the last report of each service; with
`:others` a sorted set of the services that are not ours, by the time of their last report. `buydesk:reports` and these
are the same for strangers, and have what is left of versions that did not verify reports.
"""

from collections.abc import Awaitable, Sequence
from itertools import islice
from typing import cast

import msgspec
from redis.asyncio import Redis

from buydesk.backends.redis.store import RedisStore
from buydesk.errors import ReportsUnavailable
from buydesk.observability.reports import (
    OTHERS_KEPT_MAX,
    STRANGERS_KEPT_MAX,
    Level,
    Report,
    ReportStore,
    StoredReport,
    newest_first,
    stored_report_document,
    stored_report_from,
)
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock
from buydesk.topology import SERVICES

_VERIFIED = "buydesk:reports:verified"
_STRANGERS = "buydesk:reports"
# The keys of a health desk, and what kind of value each holds.
KINDS = {
    f"{stream}{part}": kind
    for stream in (_VERIFIED, _STRANGERS)
    for part, kind in (("", "stream"), (":last", "hash"), (":others", "zset"))
}
# Other work of Redis goes on between slices of this many.
_SLICE_REPORTS = 250

# Keeps the report ARGV[3] of the service ARGV[1] and the level ARGV[2] as one of ARGV[4] in the stream; unless ARGV[5]
# is "stranger_as_ours", also as the last of its service; if it is "other", of which ARGV[6] are kept, by time ARGV[7].
# In Redis, because it is one step there: no lost answer leaves the last report of a service behind that nobody counts.
_KEEP = """
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[4], '*', 'service', ARGV[1], 'level', ARGV[2], 'document', ARGV[3])
if ARGV[5] == 'stranger_as_ours' then return end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
if ARGV[5] ~= 'other' then return end
redis.call('ZADD', KEYS[3], ARGV[7], ARGV[1])
local silent = redis.call('ZPOPMIN', KEYS[3], math.max(0, redis.call('ZCARD', KEYS[3]) - ARGV[6]))
for index = 1, #silent, 2 do
  redis.call('HDEL', KEYS[2], silent[index])
end
"""

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


class RedisReportStore(RedisStore, ReportStore):
    """A filter passes over 250 reports a call until it has found enough or seen all: about 0.05 s for 5000 reports, of
    which no call holds Redis for longer than some 2 ms.
    """

    def __init__(self, client: Redis, settings: Settings, clock: Clock = CLOCK) -> None:
        super().__init__(client, settings, ReportsUnavailable, "a report")
        self._clock = clock
        self._kept_max = settings.reports_kept_max

    async def report(self, report: Report, *, verified: bool) -> None:
        kept = StoredReport(report, self._clock.now(), verified)
        stream, kept_max = (_VERIFIED, self._kept_max) if verified else (_STRANGERS, STRANGERS_KEPT_MAX)
        whose = "other" if report.service not in SERVICES else "ours" if verified else "stranger_as_ours"
        async with self._answering():
            await self._run(
                _KEEP,
                [stream, f"{stream}:last", f"{stream}:others"],
                *(report.service, report.level, msgspec.json.encode(stored_report_document(kept)), kept_max),
                *(whose, OTHERS_KEPT_MAX, kept.arrived_at.timestamp()),
            )

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[StoredReport]:
        async with self._answering():
            found = [await self._matching(stream, service, level, limit) for stream in (_VERIFIED, _STRANGERS)]
            return list(islice(newest_first(*(map(_stored_report_from, documents) for documents in found)), limit))

    async def _matching(self, stream: str, service: str | None, level: Level | None, limit: int) -> list[bytes]:
        found: list[bytes] = []
        newest = b"+"
        while newest and len(found) < limit:
            # Without a filter every report counts: no more are read than are wanted.
            slice_reports = _SLICE_REPORTS if service or level else min(limit - len(found), _SLICE_REPORTS)
            oldest, matching = await self._run(_MATCHING, [stream], newest, slice_reports, service or "", level or "")
            found += matching
            newest = oldest and b"(" + oldest
        return found

    async def last_of_each(self) -> Sequence[StoredReport]:
        async with self._answering():
            last: dict[str, StoredReport] = {}
            for stream in (_STRANGERS, _VERIFIED):
                documents = await cast("Awaitable[list[bytes]]", self._client.hvals(f"{stream}:last"))
                last |= {kept.report.service: kept for kept in map(_stored_report_from, documents)}
            # Versions that did not verify reports kept the last ones of our services among what is the strangers' now.
            return [kept for kept in last.values() if kept.verified or kept.report.service not in SERVICES]


def _stored_report_from(document: bytes) -> StoredReport:
    return stored_report_from(msgspec.json.decode(document))
