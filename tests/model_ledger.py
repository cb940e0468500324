"""The model of a ledger: plainly right, and nothing more."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from buydesk.errors import (
    ClockSkewed,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    OrderNotFound,
    PriceNotFound,
)
from buydesk.money import satoshi_for
from buydesk.orders.model import (
    REPRESENTATION,
    Anchor,
    Exposure,
    Order,
    Outcome,
    Page,
    PageAfter,
    PageBefore,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    is_repeat,
)
from buydesk.prices.model import PriceRecord, stale
from buydesk.times import utc_now
from tests.databases import CAP_SATOSHI


@dataclass(repr=False)  # pytest shows fixtures to itself, and this one grows
class ModelLedger:
    """OrderLedger as one would explain it: items one by one, nothing at once, nothing fast."""

    cap_satoshi: int = CAP_SATOSHI
    batches_at_once: int = 1
    place_seconds: float = 0.001
    stored: list[Order] = field(default_factory=list)
    records: dict[uuid.UUID, PriceRecord] = field(default_factory=dict)
    now: Callable[[], datetime] = utc_now

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        return [self._place(item) for item in items]

    def _place(self, item: PricedOrder) -> Outcome:
        new = item.order
        for order in self.stored:
            same_key = new.client_order_id is not None and order.client_order_id == new.client_order_id
            if order.id == new.id or (same_key and order.client == new.client):
                return (
                    Replayed(order)
                    if is_repeat(new, order)
                    else Refused(IdempotencyKeyReused("reused"), by_ledger=True)
                )
        if item.deadline <= self.now():
            return Refused(ClockSkewed("late"))
        if isinstance(item.price, DeskError):
            return Refused(item.price, by_ledger=True)
        if item.price.expires_at <= self.now():
            return Refused(stale(item.price.as_of, item.price.expires_at), by_ledger=True)
        rate_e8 = item.price.rates_e8[new.currency]
        satoshi = satoshi_for(new.amount_cents, rate_e8)
        exposure = Exposure(self.cap_satoshi, sum(order.satoshi for order in self.stored), len(self.stored))
        if satoshi > exposure.cap_satoshi - exposure.used_satoshi:
            return Refused(ExposureCapExceeded("full", **exposure.facts()))
        order = Order(
            len(self.stored) + 1,
            new.id,
            self.now(),
            new.client,
            new.client_order_id,
            new.currency,
            new.amount_cents,
            rate_e8,
            satoshi,
            item.price.id,
            item.price.as_of,
            False,
            REPRESENTATION,
        )
        self.stored.append(order)
        self.records[item.price.id] = item.price
        return Placed(order)

    async def page(self, anchor: Anchor, page_size: int) -> Page:
        newest_first = self.stored[::-1]
        match anchor:
            case PageBefore(number):
                return Page([order for order in newest_first if order.number < number][:page_size], None)
            case PageAfter(number):
                above = [order for order in self.stored if order.number > number][:page_size]
                return Page(above[::-1], None)
            case _:
                return Page(newest_first[anchor.start : anchor.start + page_size], len(self.stored))

    async def order(self, order_id: uuid.UUID) -> Order:
        return self._only([order for order in self.stored if order.id == order_id])

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        key = (client, client_order_id)
        return self._only([order for order in self.stored if (order.client, order.client_order_id) == key])

    @staticmethod
    def _only(found: list[Order]) -> Order:
        if not found:
            raise OrderNotFound("none")
        return found[0]

    async def exposure(self) -> Exposure:
        return Exposure(self.cap_satoshi, sum(order.satoshi for order in self.stored), len(self.stored))

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        if price_id not in self.records:
            raise PriceNotFound("none")
        return self.records[price_id]

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass
