"""The model of a ledger: plainly right, and nothing more."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from fractions import Fraction
from math import ceil
from typing import Any

from msgspec.structs import replace

from buydesk.errors import (
    ClientCapExceeded,
    ClockSkewed,
    DailyLimitExceeded,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    OrderNotFound,
    OrderTooLarge,
    Paused,
    PriceNotFound,
    QuoteInvalid,
)
from buydesk.money import Currency, format_btc, format_cents, satoshi_for
from buydesk.orders.life import LOOKED_AT_MAX, AcceptedOrders, Closing, Event, conflict
from buydesk.orders.model import (
    Anchor,
    Exposure,
    NewOrder,
    Order,
    Outcome,
    Page,
    PageAfter,
    PageBefore,
    Placeable,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    is_repeat,
)
from buydesk.orders.quotes import discrepancies_of_quote, expired
from buydesk.prices.model import PriceRecord, stale
from buydesk.times import format_time, utc_now
from tests.databases import CAP_SATOSHI

CLOCK_SKEW = timedelta(seconds=10)


@dataclass
class ModelAccount:
    """What a client, or the desk, may have placed and has."""

    cap_satoshi: int | None = None
    order_satoshi_max: int | None = None
    counts_open: bool = False
    daily_cents_max: dict[Currency, int] = field(default_factory=dict)


@dataclass(repr=False)  # pytest shows fixtures to itself, and this one grows
class ModelLedger:
    """OrderLedger and OrderLife as one would explain them: items one by one, nothing at once, nothing fast."""

    cap_satoshi: int = CAP_SATOSHI
    counts_open: bool = False
    paused: bool = False
    clients: dict[str, ModelAccount] = field(default_factory=dict)
    batches_at_once: int = 1
    place_seconds: float = 0.001
    stored: list[Order] = field(default_factory=list)  # as they were placed
    happened: list[Order] = field(default_factory=list)  # as they were when something happened to them
    closed: dict[uuid.UUID, Order] = field(default_factory=dict)
    records: dict[uuid.UUID, PriceRecord] = field(default_factory=dict)
    now: Callable[[], datetime] = utc_now

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        return [self._place(item) for item in items]

    def _place(self, item: PricedOrder) -> Outcome:
        new = item.order
        if (order := self._stored_already(new)) is not None:
            return Replayed(order) if is_repeat(new, order) else Refused(IdempotencyKeyReused("reused"), by_ledger=True)
        if item.deadline <= self.now():
            return Refused(ClockSkewed("late"))
        if self.paused:
            return Refused(Paused("paused"))
        record = self._price_of(item)
        if isinstance(record, DeskError):
            return Refused(record, by_ledger=True)
        market_e8 = record.rates_e8[new.currency]
        rate_e8 = ceil(market_e8 * (1 + Fraction(item.markup_bp, 10_000)))
        satoshi = satoshi_for(new.amount_cents, rate_e8)
        if error := self._over_limit(new, satoshi):
            return Refused(error)
        own = sum(order.client == new.client for order in self.stored)
        order = Order(
            0 if new.dry_run else len(self.stored) + 1,
            0 if new.dry_run else own + 1,
            new.id,
            self.now(),
            new.client,
            new.client_order_id,
            new.currency,
            new.amount_cents,
            rate_e8,
            satoshi,
            record.id,
            record.as_of,
            False,
            new.representation,
            new.received_at,
            market_e8,
            item.markup_bp,
            new.reference,
            new.metadata,
            None if new.quote is None else new.quote.id,
        )
        if new.dry_run:
            return Placeable(order)
        self.stored.append(order)
        self.happened.append(order)
        self.records.setdefault(record.id, record)
        return Placed(order)

    def _stored_already(self, new: NewOrder) -> Order | None:
        """The order that has the id, or else the quote, or else the key."""
        quote_id = None if new.quote is None else new.quote.id
        own = [order for order in self.stored if order.client == new.client]
        found = [order for order in self.stored if order.id == new.id]
        found += [order for order in own if quote_id is not None and order.quote_id == quote_id]
        found += [order for order in own if new.client_order_id and order.client_order_id == new.client_order_id]
        return found[0] if found else None

    def _price_of(self, item: PricedOrder) -> PriceRecord | DeskError:
        """The record to sell at, or why the item is not sold."""
        price = item.price
        if isinstance(price, PriceRecord):
            return price if self.now() < price.expires_at else stale(price.as_of, price.expires_at)
        if isinstance(price, DeskError):
            return price
        record = self.records.get(price.price_id)
        if record is None or any(discrepancies_of_quote(price, record, CLOCK_SKEW)):
            return QuoteInvalid("not proven")
        return record if self.now() < price.expires_at else expired(price)

    def _over_limit(self, new: NewOrder, satoshi: int) -> DeskError | None:
        client = new.client
        account = self.clients.get(client, ModelAccount())
        if account.order_satoshi_max is not None and satoshi > account.order_satoshi_max:
            return OrderTooLarge("large", bitcoin_amount_max=format_btc(account.order_satoshi_max))
        if account.cap_satoshi is not None:
            used = self._used(account.counts_open, client)
            if satoshi > account.cap_satoshi - used:
                return ClientCapExceeded("full", **Exposure(account.cap_satoshi, used, 0).facts())
        limit = account.daily_cents_max.get(new.currency)
        if limit is not None and new.amount_cents > limit - (bought := self._bought_today(new)):
            left = format_cents(max(0, limit - bought))
            facts: dict[str, Any] = {"limit": format_cents(limit), "used": format_cents(bought), "available": left}
            tomorrow = datetime.combine(self.now().date() + timedelta(days=1), time(), UTC)
            return DailyLimitExceeded("enough", currency=new.currency.value, resets_at=format_time(tomorrow), **facts)
        used = self._used(self.counts_open)
        if satoshi > self.cap_satoshi - used:
            return ExposureCapExceeded("full", **Exposure(self.cap_satoshi, used, 0).facts())
        return None

    def _bought_today(self, new: NewOrder) -> int:
        today = self.now().date()
        return sum(
            order.amount_cents
            for order in self.stored
            if (order.client, order.currency, order.created_at.date()) == (new.client, new.currency, today)
        )

    def _used(self, counts_open: bool, client: str | None = None) -> int:
        counted = [self.now_of(order) for order in self.stored if client in (None, order.client)]
        return sum(order.satoshi for order in counted if not counts_open or order.status == "accepted")

    def now_of(self, placed: Order) -> Order:
        """The order as it is now."""
        return self.closed.get(placed.id, placed)

    async def close_orders(self, closings: Sequence[Closing]) -> Sequence[Order | DeskError]:
        return [self._close(closing) for closing in closings]

    def _close(self, closing: Closing) -> Order | DeskError:
        found = [order for order in self.stored if order.id == closing.order_id]
        if not found:
            return OrderNotFound("none")
        order = self.now_of(found[0])
        is_settled = closing.status == "settled"
        if order.status == "accepted":
            order = replace(
                order,
                status=closing.status,
                settlement_reference=closing.text if is_settled else None,
                reason=None if is_settled else closing.text,
                closed_at=self.now(),
            )
            self.happened.append(order)
            self.closed[order.id] = order
            return order
        text = order.settlement_reference if order.status == "settled" else order.reason
        return order if (order.status, text) == (closing.status, closing.text) else conflict(order)

    async def accepted(self, after: int, limit: int) -> AcceptedOrders:
        looked_at = self.stored[after : after + LOOKED_AT_MAX]
        found = [order for order in looked_at if self.now_of(order).status == "accepted"][:limit]
        next_after = found[-1].number if len(found) == limit else max(after, after + len(looked_at))
        return AcceptedOrders(found, next_after)

    async def events(self, client: str | None, after: int, limit: int) -> Sequence[Event]:
        own = [order for order in self.happened if client in (None, order.client)]
        return [Event(sequence, order) for sequence, order in enumerate(own, 1)][after : after + limit]

    async def last_events(self, clients: Sequence[str]) -> Mapping[str | None, int]:
        return {each: sum(each in (None, order.client) for order in self.happened) for each in (None, *clients)}

    async def keep_price(self, record: PriceRecord) -> None:
        self.records.setdefault(record.id, record)

    async def page(self, client: str | None, anchor: Anchor, page_size: int) -> Page:
        oldest_first = [self.now_of(order) for order in self.stored if client in (None, order.client)]
        newest_first = list(enumerate(oldest_first, 1))[::-1]
        match anchor:
            case PageBefore(limit):
                return Page([order for number, order in newest_first if number < limit][:page_size], None)
            case PageAfter(limit):
                above = [order for number, order in newest_first[::-1] if number > limit][:page_size]
                return Page(above[::-1], None)
            case _:
                found = newest_first[anchor.start : anchor.start + page_size]
                return Page([order for _, order in found], len(newest_first))

    async def order(self, order_id: uuid.UUID, client: str | None) -> Order:
        return self._only([order for order in self.stored if order.id == order_id and client in (None, order.client)])

    async def order_by_key(self, client: str, client_order_id: str) -> Order:
        key = (client, client_order_id)
        return self._only([order for order in self.stored if (order.client, order.client_order_id) == key])

    def _only(self, found: list[Order]) -> Order:
        if not found:
            raise OrderNotFound("none")
        return self.now_of(found[0])

    async def exposure(self, client: str | None) -> Exposure:
        account = ModelAccount(self.cap_satoshi, None, self.counts_open)
        if client is not None:
            account = self.clients.get(client, ModelAccount())
        orders = sum(client in (None, order.client) for order in self.stored)
        return Exposure(account.cap_satoshi, self._used(account.counts_open, client), orders)

    async def price_record(self, price_id: uuid.UUID) -> PriceRecord:
        if price_id not in self.records:
            raise PriceNotFound("none")
        return self.records[price_id]

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass
