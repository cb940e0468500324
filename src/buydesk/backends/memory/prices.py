"""MemoryPriceStore: the price store of a desk without Redis; it lasts as long as the process that owns it."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from datetime import timedelta
from operator import attrgetter

from buydesk.prices.model import (
    KEPT_FOR,
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
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, EPOCH, Clock

_as_of = attrgetter("as_of")


class MemoryPriceStore(PriceStore):
    """In this process. Keeps a day of points, at most `settings.price_history_records_max`."""

    def __init__(self, settings: Settings, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._seen: UsablePrice | None = None
        self._settings = settings
        self._current: PriceRecord | None = None
        self._points: list[PricePoint] = []  # in the order of their observation, no two of the same moment
        self._status: FeedStatus | None = None

    async def publish(self, record: PriceRecord) -> PriceRecord:
        current = self._current
        if current is not None and current.id == record.id:
            return current
        latest = latest_time(self._clock.now(), self._settings.clock_skew_seconds_max)
        if current is not None and record.made_at < current.made_at <= latest:
            raise superseded(current.made_at)
        self._current = record
        del self._points[bisect_left(self._points, record.as_of, key=_as_of) :]
        self._points.append(record.point())
        too_old = bisect_right(self._points, record.as_of - KEPT_FOR, key=_as_of)
        del self._points[: max(too_old, len(self._points) - self._settings.price_history_records_max)]
        return record

    def adopt(self, record: PriceRecord) -> None:
        """Takes a copy of the current record in its place: where it was published first, it ends earlier."""
        self._current = record

    async def latest(self) -> PriceRecord:
        now = self._clock.now()
        moment = self._clock.monotonic()
        record = valid_record(self._current, now, self._settings.clock_skew_seconds_max)
        self._seen = UsablePrice.seen(record, now, moment, self._seen)
        return self._seen.usable(moment)

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        now = self._clock.now()
        first = bisect_right(self._points, now - timedelta(minutes=minutes), key=_as_of)
        end = bisect_right(self._points, latest_time(now, self._settings.clock_skew_seconds_max), key=_as_of)
        if end - first <= points:
            return self._points[first:end]
        span = history_span(minutes, points)
        found: list[PricePoint] = []
        while first < end and len(found) < points:
            last = self._points[end - 1]
            found.append(last)
            span_start = last.as_of - (last.as_of - EPOCH) % span
            end = bisect_left(self._points, span_start, first, end, key=_as_of)
        return found[::-1]

    async def put_feed_status(self, state: FeedStatus) -> None:
        self._status = state

    async def feed_status(self) -> FeedStatus:
        return recent_feed_status(self._status, self._clock.now())

    async def check(self) -> None:
        """Memory is always there."""

    async def close(self) -> None:
        """There is nothing to close."""
