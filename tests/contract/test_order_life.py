"""What every OrderLife does, beside its ledger: the model, PostgreSQL of both versions, and db_proxy across real
TCP."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

import asyncpg
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.remote import RemoteLedger, RemoteLife
from buydesk.clients.registry import LimitClient, Limits, Pause, Resume
from buydesk.errors import (
    ClientCapExceeded,
    DeskError,
    OrderNotFound,
    OrderStateConflict,
    OrderTooLarge,
    PriceUnavailable,
)
from buydesk.money import SATOSHI_PER_BTC, Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, Closing, Event, OrderLife
from buydesk.orders.model import (
    NUMBER_MAX,
    Anchor,
    Exposure,
    Order,
    OrderLedger,
    Outcome,
    PageAfter,
    PageBefore,
    PageFrom,
    Placeable,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
    new_order_id,
)
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import db_proxy
from buydesk.times import format_time, utc_now
from tests.builders import new_order, priced_order, record, settings
from tests.databases import CAP_SATOSHI, Databases, as_db_proxy, run
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelAccount, ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.operators import operating
from tests.recount import assert_adds_up
from tests.serving import served

SECONDS = 5.0
# One bitcoin costs 1000.00.
PRICE = record(1000 * 10**8, ttl=3600)
SETTINGS = settings(price_ttl_seconds=3600)
BTC_CENTS = 100_000


@dataclass
class Desk:
    ledger: OrderLedger
    life: OrderLife
    dsn: str | None

    async def place(self, *cents: int, client: str = "anonymous", key: str | None = None) -> list[Order]:
        items = [of(client, each, key) for each in cents]
        outcomes = await self.ledger.place(items, SECONDS)
        return [outcome.order for outcome in outcomes if isinstance(outcome, Placed)]

    async def close(self, order: Order | uuid.UUID, status: str, text: str | None) -> Order | DeskError:
        order_id = order.id if isinstance(order, Order) else order
        [result] = await self.life.close_orders([Closing(order_id, status, text)])  # type: ignore[arg-type]
        return result

    async def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        return list(await self.life.events(None, after, limit))

    async def count_open_only(self, client: str | None = None) -> None:
        """From now on the cap counts open orders, of the desk or of a client."""
        if self.dsn is not None:
            if client is None:
                await run(self.dsn, "UPDATE exposure SET cap_counts_open = true")
            else:
                await run(self.dsn, "UPDATE clients SET cap_counts_open = true WHERE name = $1", client)
        else:
            assert isinstance(self.ledger, ModelLedger)
            if client is None:
                self.ledger.counts_open = True
            else:
                self.ledger.clients.setdefault(client, ModelAccount()).counts_open = True

    async def limit(self, client: str, cap_satoshi: int | None, order_satoshi_max: int | None = None) -> None:
        if self.dsn is not None:
            change = "UPDATE clients SET cap_satoshi = $2, order_satoshi_max = $3 WHERE name = $1"
            await run(self.dsn, change, client, cap_satoshi, order_satoshi_max)
        else:
            assert isinstance(self.ledger, ModelLedger)
            account = self.ledger.clients.setdefault(client, ModelAccount())
            account.cap_satoshi, account.order_satoshi_max = cap_satoshi, order_satoshi_max

    async def limit_daily(self, client: str, currency: Currency, cents: int | None) -> None:
        if self.dsn is not None:
            async with operating(self.dsn) as own:
                await own.change(LimitClient(client, Limits(daily_cents_max={currency: cents})), "")
        else:
            assert isinstance(self.ledger, ModelLedger)
            daily = self.ledger.clients.setdefault(client, ModelAccount()).daily_cents_max
            daily.pop(currency, None)
            if cents is not None:
                daily[currency] = cents

    async def pause(self, *, paused: bool = True) -> None:
        if self.dsn is not None:
            async with operating(self.dsn) as own:
                await own.change(Pause() if paused else Resume(), "")
        else:
            assert isinstance(self.ledger, ModelLedger)
            self.ledger.paused = paused


def of(client: str, cents: int, key: str | None = None, currency: Currency = Currency.EUR) -> PricedOrder:
    return priced_order(order=replace(new_order(cents, key), client=client, currency=currency), price=PRICE)


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [each.problem.code if isinstance(each, Refused) else type(each).__name__.lower() for each in outcomes]


@contextlib.asynccontextmanager
async def opened(kind: str, databases: Databases) -> AsyncIterator[Desk]:
    if kind == "model":
        model = ModelLedger()
        yield Desk(model, model, None)
        return
    dsn = await databases.new(16 if kind == "postgres16" else 18)
    ledger = PostgresLedger(as_db_proxy(dsn), SETTINGS, livemode=False)
    life = PostgresLife(ledger)
    if kind == "remote":
        reporter = Reporter("db_proxy", MemoryReportStore(SETTINGS), SETTINGS)
        app = db_proxy.create_app(
            SETTINGS,
            ledger,
            life,
            PostgresAnchors(ledger),
            reporter,
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
        async with served(app) as url:
            remote, remote_life = RemoteLedger(url, SETTINGS), RemoteLife(url, SETTINGS)
            yield Desk(remote, remote_life, dsn)
            await remote.close()
            await remote_life.close()
    else:
        yield Desk(ledger, life, dsn)
    await ledger.close()
    await assert_adds_up(dsn)


@pytest.fixture(params=["model", "postgres18", "postgres16", "remote"])
async def desk(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Desk]:
    async with opened(request.param, databases) as opened_desk:
        yield opened_desk


async def test_order_is_accepted_until_it_is_settled(desk: Desk) -> None:
    [order] = await desk.place(6900, key="k")
    assert (order.status, order.settlement_reference, order.reason, order.closed_at) == ("accepted", None, None, None)
    settled = await desk.close(order, "settled", "bank-7")
    assert isinstance(settled, Order)
    assert settled.closed_at is not None
    assert settled.closed_at >= order.created_at
    assert settled == replace(order, status="settled", settlement_reference="bank-7", closed_at=settled.closed_at)
    assert await desk.ledger.order(order.id, None) == settled
    assert await desk.ledger.order_by_key("anonymous", "k") == settled
    assert list((await desk.ledger.page(None, PageFrom(0), 10)).orders) == [settled]


async def test_order_is_cancelled_for_a_reason(desk: Desk) -> None:
    [order] = await desk.place(6900)
    cancelled = await desk.close(order, "cancelled", "the client asked for it")
    assert isinstance(cancelled, Order)
    expected = {"status": "cancelled", "reason": "the client asked for it", "closed_at": cancelled.closed_at}
    assert cancelled == replace(order, **expected)
    assert await desk.ledger.order(order.id, None) == cancelled


async def test_settlement_needs_no_reference(desk: Desk) -> None:
    [order] = await desk.place(6900)
    settled = await desk.close(order, "settled", None)
    assert isinstance(settled, Order)
    assert (settled.status, settled.settlement_reference) == ("settled", None)
    assert await desk.close(order, "settled", None) == settled
    assert isinstance(await desk.close(order, "settled", "bank-7"), OrderStateConflict)


async def test_same_act_again_has_the_same_answer_and_is_no_further_event(desk: Desk) -> None:
    [order] = await desk.place(6900)
    settled = await desk.close(order, "settled", "bank-7")
    assert await desk.close(order, "settled", "bank-7") == settled
    assert len(await desk.events()) == 2


@pytest.mark.parametrize(
    ("status", "text"), [("settled", "bank-8"), ("settled", None), ("cancelled", "bank-7"), ("cancelled", "late")]
)
async def test_another_act_is_a_conflict_that_says_what_there_is(desk: Desk, status: str, text: str | None) -> None:
    [order] = await desk.place(6900)
    settled = await desk.close(order, "settled", "bank-7")
    conflict = await desk.close(order, status, text)
    assert isinstance(conflict, OrderStateConflict)
    assert conflict.facts == {"order_status": "settled", "settlement_reference": "bank-7"}
    assert await desk.ledger.order(order.id, None) == settled


async def test_conflict_with_a_cancellation_tells_its_reason(desk: Desk) -> None:
    [order] = await desk.place(6900)
    await desk.close(order, "cancelled", "why not")
    conflict = await desk.close(order, "settled", "bank-7")
    assert isinstance(conflict, OrderStateConflict)
    assert conflict.facts == {"order_status": "cancelled", "reason": "why not"}


async def test_what_is_not_there_cannot_be_closed(desk: Desk) -> None:
    assert isinstance(await desk.close(uuid.uuid4(), "settled", None), OrderNotFound)
    assert await desk.events() == []


async def test_list_is_closed_as_if_one_by_one(desk: Desk) -> None:
    first, second, third = await desk.place(100, 200, 300)
    acts = [
        Closing(first.id, "settled", "a"),
        Closing(uuid.uuid4(), "settled", "a"),
        Closing(first.id, "settled", "a"),
        Closing(first.id, "cancelled", "a"),
        Closing(second.id, "cancelled", "b"),
        Closing(second.id, "settled", "b"),
        Closing(third.id, "settled", None),
    ]
    results = await desk.life.close_orders(acts)
    said = [each.status if isinstance(each, Order) else each.code for each in results]
    assert said == [
        "settled", "order_not_found", "settled", "order_state_conflict", "cancelled", "order_state_conflict", "settled",
    ]  # fmt: skip
    assert results[2] == results[0]
    assert [(event.sequence, event.order.status) for event in await desk.events(3)] == [
        (4, "settled"),
        (5, "cancelled"),
        (6, "settled"),
    ]


async def test_repeat_shows_the_moment_of_placing_whatever_became_of_the_order(desk: Desk) -> None:
    item = of("anonymous", 6900, "k")
    [placed] = await desk.ledger.place([item], SECONDS)
    assert isinstance(placed, Placed)
    await desk.close(placed.order, "cancelled", "why not")
    assert await desk.ledger.place([item], SECONDS) == [Replayed(placed.order)]


async def test_reference_and_metadata_are_kept_and_part_of_the_request(desk: Desk) -> None:
    new = replace(new_order(6900, "k"), reference="Müller, invoice 7", metadata='{"b":"1","a":"2"}')
    placed, _ = await desk.ledger.place([priced_order(order=new, price=PRICE), of("anonymous", 100)], SECONDS)
    assert isinstance(placed, Placed)
    assert await desk.ledger.order(placed.order.id, None) == placed.order
    assert (placed.order.reference, placed.order.metadata) == (new.reference, new.metadata)
    assert (placed.order.received_at, placed.order.market_rate_e8) == (new.received_at, placed.order.rate_e8)
    again = replace(new, id=uuid.uuid4(), metadata='{"a":"2","b":"1"}')
    others = [replace(again, reference=None), replace(again, metadata=None), replace(again, metadata='{"a":"2"}')]
    outcomes = await desk.ledger.place([priced_order(order=each, price=PRICE) for each in (again, *others)], SECONDS)
    assert codes(outcomes) == ["replayed", *["idempotency_key_reused"] * 3]


async def test_events_are_what_happened_in_order_as_it_was_then(desk: Desk) -> None:
    first, second = await desk.place(100, 200)
    settled = await desk.close(first, "settled", "bank-7")
    [third] = await desk.place(300)
    cancelled = await desk.close(third, "cancelled", "why not")
    expected = list(enumerate([first, second, settled, third, cancelled], 1))
    assert [(event.sequence, event.order) for event in await desk.events()] == expected
    for after in range(7):
        for limit in range(1, 7):
            found = [(event.sequence, event.order) for event in await desk.events(after, limit)]
            assert found == expected[after : after + limit]
    assert await desk.events(NUMBER_MAX) == []
    assert await desk.life.last_events([]) == {None: 5}


async def test_accepted_orders_oldest_first(desk: Desk) -> None:
    orders = await desk.place(*range(100, 110))
    for each in orders[:3] + orders[5:6]:
        await desk.close(each, "settled", None)
    left = [order for order in orders if order.number not in (1, 2, 3, 6)]
    for after, limit, numbers, next_after in (
        (0, 100, [4, 5, 7, 8, 9, 10], 10),
        (0, 2, [4, 5], 5),
        (5, 2, [7, 8], 8),
        (9, 1, [10], 10),
        (10, 5, [], 10),
        (50, 5, [], 50),
    ):
        found = await desk.life.accepted(after, limit)
        assert list(found.orders) == [order for order in left if order.number in numbers]
        assert found.next_after == next_after
    assert list((await desk.life.accepted(NUMBER_MAX, 5)).orders) == []


async def test_orders_are_numbered_by_client_too(desk: Desk) -> None:
    clients = ["other", "anonymous", "other", "third", "anonymous", "other"]
    outcomes = await desk.ledger.place([of(client, 100) for client in clients], SECONDS)
    orders = [outcome.order for outcome in outcomes if isinstance(outcome, Placed)]
    assert [(order.number, order.client_number) for order in orders] == [
        (1, 1), (2, 1), (3, 2), (4, 1), (5, 2), (6, 3),
    ]  # fmt: skip
    [further] = await desk.place(100, client="third")
    assert (further.number, further.client_number) == (7, 2)


async def test_keys_are_each_client_s_own(desk: Desk) -> None:
    items = [of(client, cents, "k") for client, cents in (("anonymous", 100), ("other", 200), ("third", 300))]
    assert codes(await desk.ledger.place(items, SECONDS)) == ["placed"] * 3
    again = [of("other", 200, "k"), of("third", 100, "k")]
    assert codes(await desk.ledger.place(again, SECONDS)) == ["replayed", "idempotency_key_reused"]
    assert (await desk.ledger.order_by_key("third", "k")).amount_cents == 300


async def test_client_s_own_cap_and_largest_order_hold_beside_the_desk_s(desk: Desk) -> None:
    await desk.limit("other", 3 * SATOSHI_PER_BTC, 2 * SATOSHI_PER_BTC)
    outcomes = await desk.ledger.place(
        [
            of("other", 2 * BTC_CENTS),
            of("other", 2 * BTC_CENTS + 1),
            of("other", BTC_CENTS + 1),
            of("third", 98 * BTC_CENTS),
            of("other", BTC_CENTS),
            of("other", 1),
        ],
        SECONDS,
    )
    assert codes(outcomes) == [
        "placed", "order_too_large", "client_cap_exceeded", "placed", "exposure_cap_exceeded", "exposure_cap_exceeded",
    ]  # fmt: skip
    too_large, over = (each.problem for each in outcomes[1:3] if isinstance(each, Refused))
    assert isinstance(too_large, OrderTooLarge)
    assert too_large.facts == {"bitcoin_amount_max": "2.00000000"}
    assert isinstance(over, ClientCapExceeded)
    assert over.facts == {"cap": "3.00000000", "used": "2.00000000", "available": "1.00000000"}
    # A limit may be changed while an earlier sending is on its way: no refusal of a sending is one of all.
    assert not any(each.by_ledger for each in outcomes if isinstance(each, Refused))
    await desk.limit("other", None, None)
    [last] = await desk.ledger.place([of("other", 1)], SECONDS)
    assert codes([last]) == ["exposure_cap_exceeded"]


async def test_closing_makes_no_room_where_the_cap_counts_all(desk: Desk) -> None:
    [order] = await desk.place(100 * BTC_CENTS)
    await desk.close(order, "cancelled", "why not")
    exposure = await desk.ledger.exposure(None)
    assert (exposure.cap_satoshi, exposure.used_satoshi, exposure.orders) == (CAP_SATOSHI, CAP_SATOSHI, 1)
    assert codes(await desk.ledger.place([of("anonymous", 1)], SECONDS)) == ["exposure_cap_exceeded"]


@pytest.mark.parametrize("status", ["settled", "cancelled"])
async def test_closing_gives_the_room_back_exactly_where_the_cap_counts_open_orders(desk: Desk, status: str) -> None:
    await desk.count_open_only()
    small, _ = await desk.place(33_333, 100 * BTC_CENTS - 33_333)
    assert codes(await desk.ledger.place([of("anonymous", 1)], SECONDS)) == ["exposure_cap_exceeded"]
    for _ in range(2):  # a repeat gives nothing back
        await desk.close(small, status, "because")
    assert (await desk.ledger.exposure(None)).used_satoshi == CAP_SATOSHI - small.satoshi
    outcomes = await desk.ledger.place([of("other", 33_334), of("other", 33_333), of("other", 1)], SECONDS)
    assert codes(outcomes) == ["exposure_cap_exceeded", "placed", "exposure_cap_exceeded"]


async def test_closing_gives_a_client_its_own_room_back(desk: Desk) -> None:
    await desk.limit("other", SATOSHI_PER_BTC)
    [order] = await desk.place(BTC_CENTS, client="other")
    assert codes(await desk.ledger.place([of("other", 1)], SECONDS)) == ["client_cap_exceeded"]
    await desk.close(order, "cancelled", "why not")
    assert codes(await desk.ledger.place([of("other", 1)], SECONDS)) == ["client_cap_exceeded"]
    await desk.count_open_only("other")
    outcomes = await desk.ledger.place([of("other", BTC_CENTS), of("other", 1)], SECONDS)
    assert codes(outcomes) == ["placed", "client_cap_exceeded"]


async def test_nothing_new_is_placed_while_the_desk_is_paused(desk: Desk) -> None:
    [order] = await desk.place(6900, key="k")
    await desk.pause()
    again, other, other_key = of("anonymous", 6900, "k"), of("anonymous", 6900), of("anonymous", 7000, "k")
    outcomes = await desk.ledger.place([again, other, other_key], SECONDS)
    assert codes(outcomes) == ["replayed", "paused", "idempotency_key_reused"]
    assert not isinstance(outcomes[0], Refused)
    assert outcomes[0].order == order
    assert isinstance(outcomes[1], Refused)
    assert not outcomes[1].by_ledger  # it may have been stored before, or be stored once the pause has ended
    assert not isinstance(await desk.close(order, "settled", None), DeskError)
    await desk.pause(paused=False)
    assert codes(await desk.ledger.place([other], SECONDS)) == ["placed"]


async def test_a_pause_is_told_before_the_lack_of_a_price_and_after_a_late_order(desk: Desk) -> None:
    await desk.pause()
    unpriced = priced_order(price=PriceUnavailable("none", retry_after_seconds=5))
    late = replace(priced_order(price=PRICE), deadline=utc_now() - timedelta(seconds=1))
    large = of("anonymous", 200 * BTC_CENTS)
    assert codes(await desk.ledger.place([unpriced, late, large], SECONDS)) == ["paused", "clock_skewed", "paused"]


async def test_a_client_buys_for_no_more_than_its_limit_on_a_day(desk: Desk) -> None:
    before = await desk.place(1000, client="other")
    await desk.limit_daily("other", Currency.EUR, 10_000)
    batch = [of("other", 8000), of("other", 2000), of("other", 1000), of("third", 50_000), of("other", 1)]
    batch.append(of("other", 50_000, currency=Currency.USD))
    outcomes = await desk.ledger.place(batch, SECONDS)
    assert codes(outcomes) == ["placed", "daily_limit_exceeded", "placed", "placed", "daily_limit_exceeded", "placed"]
    assert isinstance(outcomes[1], Refused)
    facts = dict(outcomes[1].problem.facts)
    resets_at = facts.pop("resets_at")
    assert facts == {"currency": "EUR", "limit": "100.00", "used": "90.00", "available": "10.00"}
    assert resets_at == format_time(datetime.combine(utc_now().date() + timedelta(days=1), time(), UTC))
    assert not outcomes[1].by_ledger
    await desk.close(before[0], "cancelled", "what was bought counts all the same")
    assert codes(await desk.ledger.place([of("other", 1)], SECONDS)) == ["daily_limit_exceeded"]


async def test_a_limit_a_day_may_be_raised_lowered_and_taken_away(desk: Desk) -> None:
    await desk.limit_daily("other", Currency.EUR, 1000)
    await desk.place(1000, client="other")
    await desk.limit_daily("other", Currency.EUR, 500)
    outcomes = await desk.ledger.place([of("other", 1)], SECONDS)
    assert codes(outcomes) == ["daily_limit_exceeded"]
    assert isinstance(outcomes[0], Refused)
    assert outcomes[0].problem.facts["available"] == "0.00"
    await desk.limit_daily("other", Currency.EUR, 1100)
    assert codes(await desk.ledger.place([of("other", 101), of("other", 100)], SECONDS)) == [
        *("daily_limit_exceeded", "placed")
    ]
    await desk.limit_daily("other", Currency.EUR, None)
    assert codes(await desk.ledger.place([of("other", 50_000)], SECONDS)) == ["placed"]


async def test_limits_are_told_in_their_order(desk: Desk) -> None:
    await desk.limit("other", 2 * SATOSHI_PER_BTC, SATOSHI_PER_BTC)
    await desk.limit_daily("other", Currency.EUR, BTC_CENTS // 2)
    placed = [each.order for each in await desk.ledger.place([of("third", 99 * BTC_CENTS)], SECONDS)]  # type: ignore[union-attr]
    assert len(placed) == 1
    batch = [of("other", each) for each in (3 * BTC_CENTS, BTC_CENTS, BTC_CENTS // 2, 1)]
    batch.append(of("anonymous", BTC_CENTS))
    assert codes(await desk.ledger.place(batch, SECONDS)) == [
        *("order_too_large", "daily_limit_exceeded", "placed", "daily_limit_exceeded", "exposure_cap_exceeded")
    ]
    await desk.limit("other", SATOSHI_PER_BTC // 2)
    assert codes(await desk.ledger.place([of("other", 1)], SECONDS)) == ["client_cap_exceeded"]


async def test_dry_run_is_told_what_an_order_is_told_next_and_changes_nothing(desk: Desk) -> None:
    def dry(item: PricedOrder) -> PricedOrder:
        return replace(item, order=replace(item.order, id=new_order_id(), dry_run=True))

    async def told(item: PricedOrder) -> tuple[Outcome, Outcome]:
        """What a dry run is told, and then the order itself, in a batch with two more dry runs before it."""
        [alone] = await desk.ledger.place([dry(item)], SECONDS)
        *before, placed = await desk.ledger.place([dry(item), dry(item), item], SECONDS)
        assert codes(before) == codes([alone, alone])
        return alone, placed

    await desk.limit("other", 2 * SATOSHI_PER_BTC, SATOSHI_PER_BTC)
    await desk.limit_daily("other", Currency.EUR, BTC_CENTS * 3 // 2)
    for client, cents, key, expected in (
        ("other", 2 * BTC_CENTS, None, "order_too_large"),
        ("other", BTC_CENTS, "k", "placed"),
        ("other", BTC_CENTS, "k", "replayed"),
        ("other", 1, "k", "idempotency_key_reused"),
        ("other", BTC_CENTS * 3 // 4, None, "daily_limit_exceeded"),
        ("third", 99 * BTC_CENTS, None, "placed"),
        ("third", BTC_CENTS, None, "exposure_cap_exceeded"),
    ):
        tried, placed = await told(of(client, cents, key))
        assert codes([placed]) == [expected]
        if isinstance(tried, Placeable):
            assert isinstance(placed, Placed)
            found = replace(placed.order, id=tried.order.id, number=0, client_number=0)
            assert tried.order == replace(found, created_at=tried.order.created_at)
            assert placed.order.created_at - tried.order.created_at < timedelta(seconds=30)
        elif isinstance(tried, Replayed):
            assert placed == tried
        else:
            assert isinstance(tried, Refused)
            assert isinstance(placed, Refused)
            assert (tried.problem.code, tried.problem.facts) == (placed.problem.code, placed.problem.facts)
    await desk.pause()
    assert codes(await told(of("third", 1))) == ["paused", "paused"]
    await desk.pause(paused=False)
    assert await desk.ledger.exposure(None) == Exposure(CAP_SATOSHI, 100 * SATOSHI_PER_BTC, 2)
    assert [order.number for order in (await desk.ledger.page(None, PageFrom(0), 10)).orders] == [2, 1]
    assert [event.sequence for event in await desk.events()] == [1, 2]
    for bad in (record(1000 * 10**8, age=100), PriceUnavailable("none")):
        item = priced_order(100, price=bad)
        tried, placed = await told(item)
        assert codes([tried]) == codes([placed])


async def test_dry_run_takes_neither_room_nor_key(desk: Desk) -> None:
    whole = of("anonymous", 100 * BTC_CENTS, "k")
    dry = replace(whole, order=replace(whole.order, id=new_order_id(), dry_run=True))
    assert codes(await desk.ledger.place([dry, dry], SECONDS)) == ["placeable", "placeable"]
    batch = [dry, whole, dry, of("anonymous", 1)]
    assert codes(await desk.ledger.place(batch, SECONDS)) == [
        *("placeable", "placed", "replayed", "exposure_cap_exceeded")
    ]
    assert codes(await desk.ledger.place([dry], SECONDS)) == ["replayed"]
    with pytest.raises(OrderNotFound):
        await desk.ledger.order(dry.order.id, None)


async def test_a_new_day_begins_at_midnight_utc_and_none_ends_because_a_clock_is_set_back(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        assert desk.dsn is not None
        await desk.limit_daily("other", Currency.EUR, 1000)
        await desk.place(1000, client="other")
        day = "UPDATE daily_limits SET day = day + $1::int"
        await run(desk.dsn, day, 1)  # the ledger's clock was a day ahead
        assert codes(await desk.ledger.place([of("other", 1)], SECONDS)) == ["daily_limit_exceeded"]
        await run(desk.dsn, day, -2)  # what was bought was bought yesterday
        assert codes(await desk.ledger.place([of("other", 900), of("other", 101)], SECONDS)) == [
            *("placed", "daily_limit_exceeded")
        ]
        connection = await asyncpg.connect(desk.dsn)
        [(today, cents)] = await connection.fetch(
            "SELECT day = (now() AT TIME ZONE 'UTC')::date, cents FROM daily_limits"
        )
        assert (today, cents) == (True, 900)
        # To leave all as it adds up.
        await connection.execute("UPDATE daily_limits SET cents = 1900")
        await connection.close()


@pytest.mark.parametrize("clients", [1, 3, 1000])
async def test_writers_at_once_keep_every_limit_a_day(databases: Databases, clients: int) -> None:
    async with opened("postgres18", databases) as desk:
        assert desk.dsn is not None
        made = await names(desk.dsn, clients)
        await run(
            desk.dsn,
            "INSERT INTO daily_limits SELECT name, currency, 10000, (now() AT TIME ZONE 'UTC')::date, 0 "
            "FROM clients, unnest($1::text[]) AS currency WHERE name LIKE 'client-%'",
            ["EUR", "GBP"],
        )
        rng = random.Random(clients)  # noqa: S311
        writers = [PostgresLedger(as_db_proxy(desk.dsn), SETTINGS, livemode=False) for _ in range(4)]

        async def write(ledger: PostgresLedger) -> None:
            for _ in range(6):
                batch = [
                    of(rng.choice(made), rng.choice([1000, 2500, 4000]), currency=rng.choice(list(Currency)))
                    for _ in range(100)
                ]
                outcomes = await ledger.place(batch, SECONDS)
                assert set(codes(outcomes)) <= {"placed", "daily_limit_exceeded"}

        await asyncio.gather(*map(write, writers))
        connection = await asyncpg.connect(desk.dsn)
        most = await connection.fetch(
            "SELECT currency, max(cents) FROM (SELECT client, currency, sum(amount_cents)::int AS cents FROM orders "
            "GROUP BY client, currency, (created_at AT TIME ZONE 'UTC')::date) s GROUP BY currency"
        )
        await connection.close()
        bought = {row["currency"]: row["max"] for row in most}
        assert bought["EUR"] <= 10_000
        assert bought["GBP"] <= 10_000
        if clients <= 3:
            assert min(bought["EUR"], bought["GBP"]) > 10_000 - 1000
            assert bought["USD"] > 10_000
        for each in writers:
            await each.close()


@pytest.mark.parametrize("kind", ["postgres18", "postgres16", "remote"])
@pytest.mark.parametrize("seed", range(6))
async def test_any_sequence_of_batches_and_closings_ends_as_in_the_model(
    kind: str, seed: int, databases: Databases
) -> None:
    rng = random.Random(seed)  # noqa: S311
    clients = ["anonymous", "other", "third"]
    async with opened(kind, databases) as desk, opened("model", databases) as model:
        for each in (desk, model):
            if seed % 2:
                await each.count_open_only()
            await each.limit("other", 20 * SATOSHI_PER_BTC, 5 * SATOSHI_PER_BTC)
            await each.limit("third", 30 * SATOSHI_PER_BTC)
            await each.limit_daily("other", Currency.EUR, 2_500_000)
            await each.limit_daily("third", Currency.GBP, 1_000_000)
            if seed % 3:
                await each.count_open_only("third")
        known: list[PricedOrder] = []

        def item() -> PricedOrder:
            if known and rng.random() < 0.2:
                return rng.choice(known)
            key = rng.choice([None, None, *"abcdef"])
            currency = rng.choice([Currency.EUR, Currency.EUR, Currency.GBP])
            cents = rng.choice([100, 5000, 200_000, 450_000, 600_000, 3_000_000])
            new = replace(new_order(cents, key), client=rng.choice(clients), currency=currency)
            new = replace(new, dry_run=rng.random() < 0.2)
            known.append(priced_order(order=new, price=PRICE, markup_bp=rng.choice([0, 0, 75, 5000])))
            return known[-1]

        def act() -> Closing:
            order_id = uuid.uuid4() if not known or rng.random() < 0.1 else rng.choice(known).order.id
            if rng.random() < 0.5:
                return Closing(order_id, "settled", rng.choice([None, "a", "b"]))
            return Closing(order_id, "cancelled", rng.choice(["a", "b"]))

        for turn in range(25):
            await pause_in_between(turn, desk, model)
            batch = [item() for _ in range(rng.choice([1, 3, 10]))]
            outcomes, expected = await desk.ledger.place(batch, SECONDS), await model.ledger.place(batch, SECONDS)
            assert codes(outcomes) == codes(expected)
            for found, other in zip(outcomes, expected, strict=True):
                if isinstance(found, Refused):
                    assert isinstance(other, Refused)
                    assert found.problem.facts == other.problem.facts
                else:
                    assert not isinstance(other, Refused)
                    assert found.order == replace(other.order, created_at=found.order.created_at)
            acts = [act() for _ in range(rng.choice([1, 2, 8]))]
            results, wanted = await desk.life.close_orders(acts), await model.life.close_orders(acts)
            for result, want in zip(results, wanted, strict=True):
                if isinstance(want, Order):
                    assert isinstance(result, Order)
                    times = {"created_at": result.created_at, "closed_at": result.closed_at}
                    assert result == replace(want, **times)
                else:
                    assert isinstance(result, DeskError)
                    assert (result.code, result.facts) == (want.code, want.facts)
            for client in (None, *clients, "nobody"):
                assert await desk.ledger.exposure(client) == await model.ledger.exposure(client)
        for client in (None, *clients, "nobody"):
            await assert_reads_alike(desk, model, client)
        assert await desk.life.last_events(["other", "nobody"]) == await model.life.last_events(["other", "nobody"])
        events = [(event.sequence, event.order.id, event.order.status) for event in await desk.events()]
        assert events == [(event.sequence, event.order.id, event.order.status) for event in await model.events()]


async def pause_in_between(turn: int, *desks: Desk) -> None:
    for desk in desks:
        if turn in (10, 12):
            await desk.pause(paused=turn == 10)


async def assert_reads_alike(desk: Desk, model: Desk, client: str | None) -> None:
    """What a client, or the desk, reads is what the model has: pages of every kind and depth, and events."""
    total = (await model.ledger.page(client, PageFrom(0), 1)).total or 0
    for number in (*range(0, total + 3, max(1, total // 7)), NUMBER_MAX):
        for anchor in (PageFrom(number), PageBefore(number), PageAfter(number)):
            found, wanted = await desk.ledger.page(client, anchor, 4), await model.ledger.page(client, anchor, 4)
            assert found.total == wanted.total
            assert [(each.id, each.client_number, each.status) for each in found.orders] == [
                (each.id, each.client_number, each.status) for each in wanted.orders
            ]
    for after in (*range(0, total * 2 + 3, max(1, total // 7)), NUMBER_MAX):
        events, expected = await desk.life.events(client, after, 5), await model.life.events(client, after, 5)
        assert [(each.sequence, each.order.id, each.order.status) for each in events] == [
            (each.sequence, each.order.id, each.order.status) for each in expected
        ]


async def test_order_is_found_by_its_client_only(desk: Desk) -> None:
    [order] = await desk.place(6900, client="other", key="k")
    assert await desk.ledger.order(order.id, "other") == await desk.ledger.order(order.id, None) == order
    for stranger in ("anonymous", "third", "nobody"):
        with pytest.raises(OrderNotFound):
            await desk.ledger.order(order.id, stranger)
        with pytest.raises(OrderNotFound):
            await desk.ledger.order_by_key(stranger, "k")


async def test_client_reads_its_own_pages_exposure_and_events(desk: Desk) -> None:
    await desk.limit("other", 10 * SATOSHI_PER_BTC)
    orders = [each for client in ("other", "third") * 3 for each in await desk.place(100, client=client)]
    own = orders[::2]
    settled = await desk.close(own[0], "settled", "bank-7")
    page = await desk.ledger.page("other", PageFrom(1), 5)
    assert (list(page.orders), page.total) == ([own[1], settled], 3)
    assert list((await desk.ledger.page("other", PageBefore(3), 1)).orders) == [own[1]]
    assert list((await desk.ledger.page("other", PageAfter(1), 1)).orders) == [own[1]]
    used = sum(order.satoshi for order in own)
    assert await desk.ledger.exposure("other") == Exposure(10 * SATOSHI_PER_BTC, used, 3)
    third = await desk.ledger.exposure("third")
    assert (third.cap_satoshi, third.orders) == (None, 3)
    events = await desk.life.events("other", 1, 5)
    assert [(event.sequence, event.order) for event in events] == [(2, own[1]), (3, own[2]), (4, settled)]
    assert await desk.life.last_events(["other", "third", "nobody"]) == {None: 7, "other": 4, "third": 3, "nobody": 0}


@pytest.mark.parametrize("kind", ["postgres18", "remote"])
async def test_following_one_s_own_while_all_write_shows_each_once(kind: str, databases: Databases) -> None:
    """Pages back and forth, and events, of one client, while it and others buy and have orders closed."""
    clients = ["anonymous", "other", "third"]
    rng = random.Random(7)  # noqa: S311
    async with opened(kind, databases) as desk:
        await desk.ledger.place([of(clients[each % 3], 100) for each in range(90)], SECONDS)
        is_writing = True

        async def write() -> None:
            for _ in range(40):
                items = [of(rng.choice(clients), 100) for _ in range(rng.choice([1, 2, 7]))]
                placed = [each.order for each in await desk.ledger.place(items, SECONDS) if isinstance(each, Placed)]
                some = [Closing(each.id, "settled", None) for each in placed if rng.random() < 0.5]
                await desk.life.close_orders(some)

        async def back() -> list[int]:
            found: list[int] = []
            anchor: Anchor = PageFrom(0)
            while orders := (await desk.ledger.page("other", anchor, 3)).orders:
                found += [order.client_number for order in orders]
                anchor = PageBefore(found[-1])
            return found

        async def forth() -> list[int]:
            found = [0]
            while (orders := (await desk.ledger.page("other", PageAfter(found[-1]), 3)).orders) or is_writing:
                found += [order.client_number for order in reversed(orders)]
            return found[1:]

        async def events() -> list[Event]:
            found: list[Event] = []
            while (more := await desk.life.events("other", len(found), 5)) or is_writing:
                found += more
            return found

        readers = [asyncio.create_task(each()) for each in (back, forth)]
        following = asyncio.create_task(events())
        await write()
        is_writing = False
        going_back, going_forth = [await reader for reader in readers]
        assert going_back == list(range(going_back[0], 0, -1))
        orders = (await desk.ledger.exposure("other")).orders
        assert going_forth == list(range(1, orders + 1))
        told = await following
        assert [event.sequence for event in told] == list(range(1, len(told) + 1))
        assert len(told) == (await desk.life.last_events(["other"]))["other"]
        placed = [event.order.client_number for event in told if event.order.status == "accepted"]
        assert placed == going_forth
        assert {event.order.client for event in told} == {"other"}


async def names(dsn: str, count: int) -> list[str]:
    """So many clients, made."""
    made = [f"client-{number}" for number in range(count)]
    await run(dsn, "INSERT INTO clients (name) SELECT unnest($1::text[])", made)
    return made


@pytest.mark.parametrize("clients", [1, 3, 1000])
async def test_batches_of_any_number_of_clients_at_once_keep_every_cap(databases: Databases, clients: int) -> None:
    """Four writers and two who close, each with sessions of their own."""
    async with contextlib.AsyncExitStack() as stack:
        desk = await stack.enter_async_context(opened("postgres18", databases))
        assert desk.dsn is not None
        made = await names(desk.dsn, clients)
        cap = 60 * SATOSHI_PER_BTC // clients
        await run(desk.dsn, "UPDATE clients SET cap_satoshi = $1, cap_counts_open = true", cap)
        await run(desk.dsn, "UPDATE exposure SET cap_counts_open = true")
        cents = max(1, 60 * BTC_CENTS // clients // 3)  # three fit
        placed: list[Order] = []

        async def place(writer: int) -> None:
            ledger = PostgresLedger(as_db_proxy(desk.dsn or ""), SETTINGS, livemode=False)
            stack.push_async_callback(ledger.close)
            for turn in range(3):
                batch = [of(made[(each + writer) % clients], cents, f"{writer}-{turn}-{each}") for each in range(250)]
                outcomes = await ledger.place(batch * (1 + turn % 2), SECONDS)
                placed.extend(outcome.order for outcome in outcomes if isinstance(outcome, Placed))

        async def close(status: str) -> None:
            ledger = PostgresLedger(as_db_proxy(desk.dsn or ""), SETTINGS, livemode=False)
            stack.push_async_callback(ledger.close)
            life = PostgresLife(ledger)
            for _ in range(6):
                some = [Closing(order.id, status, "why") for order in placed[-CLOSED_AT_ONCE_MAX:]]  # type: ignore[arg-type]
                if some:
                    await life.close_orders(some)
                await asyncio.sleep(0.01)

        await asyncio.gather(*map(place, range(4)), close("settled"), close("cancelled"))
        assert len({order.number for order in placed}) == len(placed) > 0
        sequence = [event.sequence for event in await desk.events(0, 5000)]
        assert sequence == list(range(1, len(sequence) + 1))
        numbers: dict[str, list[int]] = {}
        for order in sorted(placed, key=lambda order: order.number):
            numbers.setdefault(order.client, []).append(order.client_number)
        assert all(each == list(range(1, len(each) + 1)) for each in numbers.values())
        last = await desk.life.last_events(made)
        for client in made[:20]:
            assert (await desk.ledger.exposure(client)).used_satoshi <= cap
            own = await desk.life.events(client, 0, 5000)
            assert [event.sequence for event in own] == list(range(1, last[client] + 1))


async def test_client_that_is_not_there_gets_no_order_and_spoils_no_batch(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        items = [of("anonymous", 100), of("nobody", 100), of("other", 100)]
        assert codes(await desk.ledger.place(items, SECONDS)) == ["placed", "internal_error", "placed"]


async def test_settings_that_change_between_the_look_up_and_the_lock_are_seen(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        assert desk.dsn is not None
        await desk.limit("other", 10 * SATOSHI_PER_BTC)
        owner, watcher = await asyncpg.connect(desk.dsn), await asyncpg.connect(desk.dsn)
        async with owner.transaction():
            await owner.execute("UPDATE clients SET cap_satoshi = 5 WHERE name = 'other'")
            placing = asyncio.create_task(desk.ledger.place([of("other", 100)], SECONDS))
            waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            while not await watcher.fetch(waiting):
                await asyncio.sleep(0.005)
        assert codes(await placing) == ["client_cap_exceeded"]
        await owner.close()
        await watcher.close()
