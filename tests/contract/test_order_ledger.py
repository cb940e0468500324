"""What every OrderLedger does: the model, PostgreSQL of both versions, and db_proxy across real TCP."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta

import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.remote import RemoteLedger
from buydesk.errors import DeskError, OrderNotFound, PriceNotFound, PriceStale, PriceUnavailable
from buydesk.money import SATOSHI_PER_BTC, Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import (
    Anchor,
    Exposure,
    Order,
    OrderLedger,
    Outcome,
    PageAfter,
    PageBefore,
    PageFrom,
    Placed,
    PricedOrder,
    Refused,
    Replayed,
)
from buydesk.orders.pricing import price_order
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import db_proxy
from tests.builders import new_order, priced_order, record, settings
from tests.databases import CAP_SATOSHI, Databases, as_db_proxy
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.serving import served

SECONDS = 5.0


@contextlib.asynccontextmanager
async def opened(kind: str, databases: Databases) -> AsyncIterator[OrderLedger]:
    if kind == "model":
        yield ModelLedger()
        return
    version = 16 if kind == "postgres16" else 18
    own = PostgresLedger(as_db_proxy(await databases.new(version)), settings(), livemode=False)
    if kind == "remote":
        reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
        app = db_proxy.create_app(
            settings(),
            own,
            PostgresLife(own),
            PostgresAnchors(own),
            reporter,
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
        async with served(app) as url:
            remote = RemoteLedger(url, settings())
            yield remote
            await remote.close()
    else:
        yield own
    await own.close()


@pytest.fixture(params=["model", "postgres18", "postgres16", "remote"])
async def ledger(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[OrderLedger]:
    async with opened(request.param, databases) as opened_ledger:
        yield opened_ledger


async def place(ledger: OrderLedger, *items: PricedOrder) -> Sequence[Outcome]:
    return await ledger.place(items, SECONDS)


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        outcome.problem.code if isinstance(outcome, Refused) else type(outcome).__name__.lower() for outcome in outcomes
    ]


def order_of(outcome: Outcome) -> Order:
    assert not isinstance(outcome, Refused)
    return outcome.order


async def test_orders_above_the_market_are_stored_with_its_rate_and_their_markup(ledger: OrderLedger) -> None:
    price = record(EUR=4119191 * 10**6 + 1)
    items = [priced_order(6900, f"k{bp}", price=price, markup_bp=bp) for bp in (0, 75, 5000)]
    outcomes = await place(ledger, *items)
    assert [
        (order.market_rate_e8, order.markup_bp, order.rate_e8, order.satoshi) for order in map(order_of, outcomes)
    ] == [
        (4119191000001, 0, 4119191000001, 167509),
        (4119191000001, 75, 4150084932502, 166262),
        (4119191000001, 5000, 6178786500002, 111673),
    ]
    for outcome in outcomes:
        order = order_of(outcome)
        assert await ledger.order(order.id, None) == order
    exposure = await ledger.exposure(None)
    assert exposure.used_satoshi == 167509 + 166262 + 111673
    again = await place(ledger, *(priced_order(6900, f"k{bp}", price=price, markup_bp=9) for bp in (0, 75, 5000)))
    assert codes(again) == ["replayed"] * 3  # as they were sold, whatever the markup is now
    assert [order_of(outcome) for outcome in again] == [order_of(outcome) for outcome in outcomes]


async def test_a_placed_order_is_stored_as_asked_and_priced(ledger: OrderLedger) -> None:
    price = record(EUR=4119191 * 10**6)
    item = priced_order(6900, "key-1", price=price)
    [outcome] = await place(ledger, item)
    assert isinstance(outcome, Placed)
    order = outcome.order
    assert (order.number, order.id, order.client, order.client_order_id) == (1, item.order.id, "anonymous", "key-1")
    assert (order.currency, order.amount_cents, order.rate_e8) == (Currency.EUR, 6900, 4119191 * 10**6)
    assert order.satoshi == 167509
    assert (order.price_id, order.price_as_of, order.livemode) == (price.id, price.as_of, False)
    assert await ledger.order(order.id, None) == order
    assert await ledger.order_by_key("anonymous", "key-1") == order
    assert await ledger.price_record(price.id) == price
    assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, 167509, 1)


async def test_an_empty_batch_changes_nothing(ledger: OrderLedger) -> None:
    assert list(await place(ledger)) == []
    assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, 0, 0)


async def test_a_repeat_by_key_returns_the_first_order(ledger: OrderLedger) -> None:
    [first] = await place(ledger, priced_order(key="k"))
    again = priced_order(key="k", price=record(rate_e8=30_000 * 10**8))
    assert await place(ledger, again) == [Replayed(order_of(first))]
    assert (await ledger.exposure(None)).orders == 1


async def test_a_repeat_by_id_returns_the_first_order(ledger: OrderLedger) -> None:
    item = priced_order()
    [first] = await place(ledger, item)
    assert await place(ledger, item) == [Replayed(order_of(first))]


@pytest.mark.parametrize("change", [{"amount_cents": 6901}, {"currency": Currency.USD}])
async def test_a_key_with_another_request_is_refused(ledger: OrderLedger, change: dict[str, object]) -> None:
    order = new_order(key="k")
    await place(ledger, priced_order(order=order))
    other = replace(new_order(key="k"), **change)
    assert codes(await place(ledger, priced_order(order=other))) == ["idempotency_key_reused"]
    assert codes(await place(ledger, priced_order(order=replace(order, **change)))) == ["idempotency_key_reused"]
    assert (await ledger.exposure(None)).orders == 1


async def test_an_id_that_comes_back_under_another_key_is_refused(ledger: OrderLedger) -> None:
    order = new_order(key="k")
    await place(ledger, priced_order(order=order))
    assert codes(await place(ledger, priced_order(order=replace(order, client_order_id="other")))) == [
        "idempotency_key_reused"
    ]


async def test_orders_without_keys_are_all_new_and_clients_have_their_own_keys(ledger: OrderLedger) -> None:
    other_client = replace(new_order(key="k"), client="other")
    outcomes = await place(
        ledger, priced_order(), priced_order(), priced_order(key="k"), priced_order(order=other_client)
    )
    assert codes(outcomes) == ["placed"] * 4
    assert [order_of(outcome).number for outcome in outcomes] == [1, 2, 3, 4]


async def test_equal_keys_in_one_batch_meet_the_first_placed_item(ledger: OrderLedger) -> None:
    expired = record(age=100)
    outcomes = await place(
        ledger,
        priced_order(100, "k", price=expired),
        priced_order(200, "k"),
        priced_order(200, "k"),
        priced_order(300, "k"),
        priced_order(400, "l"),
    )
    assert codes(outcomes) == ["price_stale", "placed", "replayed", "idempotency_key_reused", "placed"]
    assert order_of(outcomes[2]) == order_of(outcomes[1])


async def test_equal_ids_in_one_batch_are_one_order(ledger: OrderLedger) -> None:
    item = priced_order(100)
    outcomes = await place(ledger, item, priced_order(200), item)
    assert codes(outcomes) == ["placed", "placed", "replayed"]
    assert order_of(outcomes[2]) == order_of(outcomes[0])


async def test_an_order_that_does_not_fit_is_refused_and_smaller_later_ones_fit(ledger: OrderLedger) -> None:
    price = record(rate_e8=1000 * 10**8)
    whole = 100 * 1000 * 100  # the whole cap, in cents
    outcomes = await place(
        ledger,
        priced_order(whole - 100, price=price),
        priced_order(101, price=price),
        priced_order(100, price=price),
        priced_order(1, price=price),
    )
    assert codes(outcomes) == ["placed", "exposure_cap_exceeded", "placed", "exposure_cap_exceeded"]
    assert isinstance(outcomes[1], Refused)
    assert outcomes[1].problem.facts == {"cap": "100.00000000", "used": "99.99900000", "available": "0.00100000"}
    assert isinstance(outcomes[3], Refused)
    assert outcomes[3].problem.facts == {"cap": "100.00000000", "used": "100.00000000", "available": "0.00000000"}
    assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, CAP_SATOSHI, 2)


async def test_the_largest_amount_at_the_lowest_rate_is_refused_by_the_cap(ledger: OrderLedger) -> None:
    outcomes = await place(ledger, priced_order(99_999_999_999, price=record(rate_e8=10**8)))
    assert codes(outcomes) == ["exposure_cap_exceeded"]


async def test_repeats_come_before_every_other_refusal(ledger: OrderLedger) -> None:
    price = record(rate_e8=1000 * 10**8)
    whole = priced_order(100 * 1000 * 100, "k", price=price)
    await place(ledger, whole)
    no_price = PriceUnavailable("no price", retry_after_seconds=5)
    outcomes = await place(
        ledger,
        price_order(whole.order, no_price, whole.deadline),
        price_order(whole.order, record(age=100), whole.deadline),
        replace(whole, deadline=whole.deadline - timedelta(hours=1)),
        priced_order(100, "k", price=no_price),
        priced_order(100, "l", price=no_price),
        priced_order(100, "l", price=record(age=100)),
        priced_order(100, "l", seconds=-1),
        priced_order(100, "l"),
    )
    assert codes(outcomes) == [
        "replayed",
        "replayed",
        "replayed",
        "idempotency_key_reused",
        "price_unavailable",
        "price_stale",
        "clock_skewed",
        "exposure_cap_exceeded",
    ]
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    # All but those of the clocks and of the cap hold for an earlier sending too: the cap may be raised meanwhile.
    assert [outcome.by_ledger for outcome in refused] == [True, True, True, False, False]


async def test_an_items_own_price_problem_comes_back_as_it_was(ledger: OrderLedger) -> None:
    problem = PriceStale("too old", retry_after_seconds=7, as_of="then")
    [outcome] = await place(ledger, priced_order(price=problem))
    assert isinstance(outcome, Refused)
    found = outcome.problem
    assert (type(found), found.detail, found.retry_after_seconds, found.facts) == (
        PriceStale,
        "too old",
        7,
        {"as_of": "then"},
    )


async def test_refused_orders_hold_no_key_and_leave_no_price_record(ledger: OrderLedger) -> None:
    expired = record(age=100)
    await place(ledger, priced_order(key="k", price=expired))
    with pytest.raises(OrderNotFound):
        await ledger.order_by_key("anonymous", "k")
    with pytest.raises(PriceNotFound):
        await ledger.price_record(expired.id)
    assert codes(await place(ledger, priced_order(500, key="k"))) == ["placed"]


async def test_what_is_not_there_is_not_found(ledger: OrderLedger) -> None:
    with pytest.raises(OrderNotFound):
        await ledger.order(uuid.uuid4(), None)
    with pytest.raises(OrderNotFound):
        await ledger.order_by_key("anonymous", "never")
    with pytest.raises(PriceNotFound):
        await ledger.price_record(uuid.uuid4())


async def test_a_migrated_ledger_is_ready(ledger: OrderLedger) -> None:
    await ledger.check()


async def test_pages_by_every_anchor(ledger: OrderLedger) -> None:
    empty = await ledger.page(None, PageFrom(0), 10)
    assert (list(empty.orders), empty.total) == ([], 0)
    await place(ledger, *(priced_order(100 + cents) for cents in range(7)))
    expected: dict[Anchor, list[int]] = {
        PageFrom(0): [7, 6, 5],
        PageFrom(2): [5, 4, 3],
        PageFrom(6): [1],
        PageFrom(7): [],
        PageFrom(2**63 - 1): [],
        PageBefore(2**63 - 1): [7, 6, 5],
        PageBefore(5): [4, 3, 2],
        PageBefore(2): [1],
        PageBefore(1): [],
        PageBefore(0): [],
        PageAfter(0): [3, 2, 1],
        PageAfter(3): [6, 5, 4],
        PageAfter(6): [7],
        PageAfter(7): [],
        PageAfter(2**63 - 1): [],
    }
    for anchor, numbers in expected.items():
        page = await ledger.page(None, anchor, 3)
        assert [order.number for order in page.orders] == numbers, anchor
        assert page.total == (7 if isinstance(anchor, PageFrom) else None)
    assert [order.amount_cents for order in (await ledger.page(None, PageFrom(0), 2)).orders] == [106, 105]


@pytest.mark.parametrize("kind", ["postgres18", "postgres16", "remote"])
@pytest.mark.parametrize("seed", range(4))
async def test_any_sequence_of_batches_ends_as_in_the_model(kind: str, seed: int, databases: Databases) -> None:
    rng = random.Random(seed)  # noqa: S311
    model = ModelLedger(cap_satoshi=CAP_SATOSHI)
    known: list[PricedOrder] = []

    def item() -> PricedOrder:
        if known and rng.random() < 0.25:
            return rng.choice(known)
        # Few keys, a cap that fills after some twenty orders: every kind of refusal and repeat happens.
        key = rng.choice([None, *"abcdefgh"])
        price: DeskError | object = rng.choice([record(1000 * 10**8), record(age=100), PriceUnavailable("none")])
        cents = rng.choice([100, 100, 5_000, 1_000_000, 7_000_000])
        made = priced_order(cents, key, price=price if rng.random() < 0.4 else record(1000 * 10**8))  # type: ignore[arg-type]
        known.append(made)
        return made

    async with opened(kind, databases) as ledger:
        for _ in range(12):
            batch = [item() for _ in range(rng.randint(1, 12))]
            wanted, got = await place(model, *batch), await place(ledger, *batch)
            assert codes(got) == codes(wanted)
            for mine, theirs in zip(got, wanted, strict=True):
                if isinstance(mine, Refused) or isinstance(theirs, Refused):
                    assert mine.problem.facts == theirs.problem.facts  # type: ignore[union-attr]
                else:
                    assert mine.order == replace(theirs.order, created_at=mine.order.created_at)
            assert await ledger.exposure(None) == await model.exposure(None)


@pytest.mark.parametrize("kind", ["postgres18", "postgres16", "remote"])
async def test_writers_at_once_never_exceed_the_cap_and_leave_no_gap(kind: str, databases: Databases) -> None:
    price = record(rate_e8=1000 * 10**8)

    async with opened(kind, databases) as ledger:
        # 40 writers want 4 BTC each, in orders of 0.5 BTC: 160 BTC against a cap of 100.
        async def writer(number: int) -> Sequence[Outcome]:
            items = [priced_order(50_000, f"{number}-{each}", price=price) for each in range(8)]
            return [outcome for each in (items[:5], items[5:]) for outcome in await place(ledger, *each)]

        outcomes = [outcome for each in await asyncio.gather(*map(writer, range(40))) for outcome in each]
        placed = [order_of(outcome) for outcome in outcomes if isinstance(outcome, Placed)]
        assert len(placed) == 200
        assert sorted(order.number for order in placed) == list(range(1, 201))
        assert codes(outcomes).count("exposure_cap_exceeded") == 120
        assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, 100 * SATOSHI_PER_BTC, 200)
        by_number = sorted(placed, key=lambda order: order.number)
        assert by_number == sorted(by_number, key=lambda order: order.created_at)
