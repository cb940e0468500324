"""Refusals on record: what the ledger refused, for those who were refused and for operators. The ports RefusalReads
and RefusalStore.

Recording is never in an order's way: what cannot be recorded at once waits, up to a bound, and beyond it is counted.
"""

import asyncio
import logging
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, Protocol

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from buydesk.errors import (
    ClientCapExceeded,
    DailyLimitExceeded,
    DeskError,
    ExposureCapExceeded,
    OrderTooLarge,
    Paused,
    PriceMoved,
    PriceStale,
    PriceUnavailable,
    PriceUnsettled,
    RateLimited,
)
from buydesk.money import Currency, format_cents
from buydesk.orders.model import NewOrder, Outcome, PricedOrder, Refused
from buydesk.reading import Cents, Moment
from buydesk.times import CLOCK, Clock, format_time

RECORDED = (
    *(OrderTooLarge, ClientCapExceeded, DailyLimitExceeded, ExposureCapExceeded),
    *(Paused, PriceUnavailable, PriceStale, PriceUnsettled, PriceMoved),
)
REFUSALS_MAX = 1000
NOTED_AT_ONCE_MAX = 500
WAITING_MAX = 2000
# Of one client in one minute: whoever is refused all the time must not push the refusals of others out.
OF_CLIENT_MAX = 60
# Refusals are recorded together, this long after the first of them.
PAUSE_SECONDS = 0.5
RETRY_SECONDS = 5.0

_log = logging.getLogger("buydesk.services.db_proxy")


class Refusal(msgspec.Struct, frozen=True, rename={"amount_cents": "amount"}):
    """What was asked for, by whom and when, and the code of what refused it. `order_id` is of this one request: another
    with the same key may have been placed since."""

    at: Moment
    client: str
    order_id: uuid.UUID
    client_order_id: str | None
    code: str
    currency: Currency
    amount_cents: Cents


def refusal_document(refusal: Refusal) -> dict[str, object]:
    """The refusal as JSON, its order's id, time and amount as text."""
    document: dict[str, Any] = msgspec.to_builtins(refusal)
    return document | {"at": format_time(refusal.at), "amount": format_cents(refusal.amount_cents)}


class RefusalReads(Protocol):
    """Where refusals are read: those of the last 30 days, and the newest 100,000 at most."""

    async def refusals(self, client: str | None, limit: int) -> Sequence[Refusal]:
        """What was refused to the client, or to all, the newest first; raises LedgerUnavailable, Overloaded. What its
        service priced anew and placed is left out."""
        ...

    async def close(self) -> None: ...


class RefusalStore(RefusalReads, Protocol):
    """Where they are kept."""

    async def note_refusals(self, refusals: Sequence[Refusal]) -> None:
        """Keeps these, at most NOTED_AT_ONCE_MAX; raises LedgerUnavailable, Overloaded, OutcomeUnknown."""
        ...


class RefusalRecorder(Collector):
    """Has refusals recorded in the background; those that are not, because there are too many or the store fails, are
    counted for Prometheus."""

    def __init__(self, store: RefusalStore, clock: Clock = CLOCK) -> None:
        self.store = store
        self._clock = clock
        self._waiting: deque[Refusal] = deque()
        self._arrived = asyncio.Event()
        self._ending = asyncio.Event()
        self._of_client: Counter[str] = Counter()  # in this minute
        self._minute: datetime | None = None
        self._unrecorded = 0

    def note(self, items: Sequence[PricedOrder], outcomes: Sequence[Outcome]) -> None:
        """Has recorded what was refused of a batch, but for dry runs. Beyond a client's rate only repeats are looked
        for."""
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(item.price, RateLimited) or item.order.dry_run or not isinstance(outcome, Refused):
                continue
            if isinstance(outcome.problem, RECORDED):
                self._note(item.order, outcome.problem)

    def _note(self, order: NewOrder, problem: DeskError) -> None:
        now = self._clock.now()
        minute = now.replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute = minute
            self._of_client.clear()
        self._of_client[order.client] += 1
        if self._of_client[order.client] > OF_CLIENT_MAX or len(self._waiting) >= WAITING_MAX:
            self._unrecorded += 1
            return
        self._waiting.append(
            Refusal(
                now, order.client, order.id, order.client_order_id, problem.code, order.currency, order.amount_cents
            )
        )
        self._arrived.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Records while it is entered, and what is left at the end."""
        recording = asyncio.create_task(self._record())
        try:
            yield
        finally:
            self._ending.set()
            self._arrived.set()
            await recording

    async def _record(self) -> None:
        is_recorded = True
        while not self._ending.is_set() or (self._waiting and is_recorded):
            await self._arrived.wait()
            await self._pause(PAUSE_SECONDS if is_recorded else RETRY_SECONDS)
            is_recorded = await self._record_some()

    async def _pause(self, seconds: float) -> None:
        """Waits for so long, or until the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    async def _record_some(self) -> bool:
        """Records the oldest that wait; whether that could be done. What cannot is counted."""
        some = [self._waiting.popleft() for _ in range(min(NOTED_AT_ONCE_MAX, len(self._waiting)))]
        if not self._waiting and not self._ending.is_set():
            self._arrived.clear()
        if not some:
            return True
        try:
            await self.store.note_refusals(some)
        except Exception as error:
            # They are not tried again: the store may have taken them, and they would be there twice.
            why = error.for_operators if isinstance(error, DeskError) else type(error).__name__
            _log.warning("%d refusals are not on record: %s", len(some), why, exc_info=not isinstance(error, DeskError))
            self._unrecorded += len(some)
            return False
        return True

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        yield CounterMetricFamily(
            "buydesk_refusals_unrecorded", "Refusals of orders that are not on record.", value=self._unrecorded
        )
