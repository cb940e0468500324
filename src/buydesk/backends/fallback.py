"""Redis, and this process's memory beside it: a cache that is away, or takes no writes, stops no sales and no reports,
and lifts no limit.

What is published is in memory first and then in Redis, for the other processes and for after a restart; what is read
is the newer of the two. Without Redis each process knows only what was published through it, and nothing of before its
start. That Redis cannot be used is logged, and so reported, once; whether it can be is asked by `/status`.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from buydesk.clients.rates import Count, Lot, RateStore
from buydesk.errors import (
    DeskError,
    PriceStale,
    PriceStoreUnavailable,
    PriceUnavailable,
    RatesUnavailable,
    ReportsUnavailable,
)
from buydesk.observability.reports import Level, Report, ReportStore, StoredReport, newest_first
from buydesk.prices.model import FeedStatus, PricePoint, PriceRecord, PriceStore

# Less than whoever asks us waits: a Redis that hangs must not delay what is in memory.
REDIS_SECONDS_MAX = 1.0

T = TypeVar("T")


class _Redis:
    """Whether Redis takes part in each kind of work, and one line in the log whenever that changes."""

    def __init__(self, unavailable: type[DeskError], service: str) -> None:
        self._unavailable = unavailable
        self._log = logging.getLogger(f"buydesk.services.{service}")
        self._away: set[str] = set()

    async def ask(self, work: str, call: Awaitable[T]) -> T:
        """What Redis says; raises the "unavailable" error when it cannot be used or says nothing in time, and what else
        the call raises. `work` is what it does not do then, as the log puts it."""
        try:
            async with asyncio.timeout(REDIS_SECONDS_MAX):
                answer = await call
        except TimeoutError as error:
            away = self._unavailable(f"Redis gave no answer within {REDIS_SECONDS_MAX:g} s.", retry_after_seconds=1)
            self._note(work, away)
            raise away from error
        except DeskError as error:  # of another kind it is an answer
            self._note(work, error if isinstance(error, self._unavailable) else None)
            raise
        self._note(work, None)
        return answer

    def _note(self, work: str, fault: DeskError | None) -> None:
        if fault is not None and work not in self._away:
            self._log.warning("Redis %s, and memory stands in: %s", work, fault.for_operators)
            self._away.add(work)
        elif fault is None and work in self._away:
            self._log.info("Redis %s: no longer so.", work)
            self._away.remove(work)


class OwnPriceStore(PriceStore, Protocol):
    """The price store in memory."""

    def adopt(self, record: PriceRecord) -> None:
        """Takes a copy of the current record in its place, which ends earlier."""
        ...


class FallbackPriceStore(PriceStore):
    """In Redis (`shared`), which it closes, and in memory (`own`)."""

    def __init__(self, shared: PriceStore, own: OwnPriceStore) -> None:
        self._shared = shared
        self._own = own
        self._redis = _Redis(PriceStoreUnavailable, "api_cache_proxy")

    async def publish(self, record: PriceRecord) -> PriceRecord:
        published = await self._own.publish(record)
        with contextlib.suppress(PriceStoreUnavailable):
            stored = await self._redis.ask("takes no price", self._shared.publish(published))
            if stored.expires_at < published.expires_at:
                self._own.adopt(stored)
            return stored
        return published

    async def latest(self) -> PriceRecord:
        own = await _outcome(self._own.latest())
        shared = await _outcome(self._redis.ask("tells no price", self._shared.latest()))
        found = own if _is_newer(own, shared) else shared
        if isinstance(found, DeskError):
            raise found
        return found

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        try:
            return await self._redis.ask("tells no past prices", self._shared.history(minutes, points))
        except PriceStoreUnavailable:
            return await self._own.history(minutes, points)

    async def put_feed_status(self, state: FeedStatus) -> None:
        await self._own.put_feed_status(state)
        with contextlib.suppress(PriceStoreUnavailable):
            await self._redis.ask("takes no state of the sources", self._shared.put_feed_status(state))

    async def feed_status(self) -> FeedStatus:
        shared = await _outcome(self._redis.ask("tells no state of the sources", self._shared.feed_status()))
        if isinstance(shared, DeskError):
            return await self._own.feed_status()
        own = await _outcome(self._own.feed_status())
        return shared if isinstance(own, DeskError) or own.at <= shared.at else own

    async def check(self) -> None:
        """Memory is always there."""

    async def close(self) -> None:
        await self._shared.close()


def _is_newer(own: PriceRecord | DeskError, shared: PriceRecord | DeskError) -> bool:
    """Whether the answer is to come from memory, and not from Redis."""
    if isinstance(shared, PriceStoreUnavailable):
        return True
    if isinstance(own, DeskError):
        return isinstance(own, PriceStale) and isinstance(shared, PriceUnavailable)
    # A published record never changes: of the same one memory's copy counts, whatever a hand did to the one in Redis.
    # Nor does what ended there, or is no price, end a record that is valid here.
    if not isinstance(shared, PriceRecord) or own.id == shared.id:
        return True
    return own.made_at > shared.made_at


async def _outcome(call: Awaitable[T]) -> T | DeskError:
    try:
        return await call
    except DeskError as error:
        return error


class FallbackReportStore(ReportStore):
    """In Redis (`shared`), which it closes; what that does not take is kept in memory (`own`)."""

    def __init__(self, shared: ReportStore, own: ReportStore) -> None:
        self._shared = shared
        self._own = own
        self._redis = _Redis(ReportsUnavailable, "health_check")

    async def report(self, report: Report, *, verified: bool) -> None:
        try:
            await self._redis.ask("takes no reports", self._shared.report(report, verified=verified))
        except ReportsUnavailable:
            await self._own.report(report, verified=verified)

    async def reports(self, service: str | None, level: Level | None, limit: int) -> Sequence[StoredReport]:
        own = await self._own.reports(service, level, limit)
        try:
            shared = await self._redis.ask("tells no reports", self._shared.reports(service, level, limit))
        except ReportsUnavailable:
            return own
        return list(islice(newest_first(own, shared), limit))

    async def last_of_each(self) -> Sequence[StoredReport]:
        own = await self._own.last_of_each()
        try:
            shared = await self._redis.ask("tells no last reports", self._shared.last_of_each())
        except ReportsUnavailable:
            return own
        best_last = sorted((*own, *shared), key=lambda kept: (kept.verified, kept.arrived_at))
        return list({kept.report.service: kept for kept in best_last}.values())

    async def check(self) -> None:
        """Memory is always there."""

    async def close(self) -> None:
        await self._shared.close()


class FallbackRateStore(RateStore):
    """In Redis (`shared`), which it closes; what that does not count is counted in memory (`own`), beginning with
    nothing: what came before, each edge knows by itself."""

    def __init__(self, shared: RateStore, own: RateStore) -> None:
        self._shared = shared
        self._own = own
        self._redis = _Redis(RatesUnavailable, "api_cache_proxy")

    async def take(self, lots: Sequence[Lot]) -> Sequence[Count]:
        try:
            return await self._redis.ask("counts no requests", self._shared.take(lots))
        except RatesUnavailable:
            return await self._own.take(lots)

    async def close(self) -> None:
        await self._shared.close()
