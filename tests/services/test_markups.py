"""Markups: what clients pay above the market's rate, by the desk's setting or their own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import asyncpg
import httpx2
import msgspec
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import Key
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Outcome, PageFrom, PricedOrder, Refused
from buydesk.prices.documents import record_document
from buydesk.prices.model import stale
from buydesk.runtime.wiring import wire
from buydesk.services.create_buy_order import create_app
from buydesk.settings.model import Settings
from chaos.judge import read_ledger
from tests.builders import TOKEN, priced_order, record, settings
from tests.databases import Databases
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.proof import discrepancies
from tests.recount import assert_adds_up
from tests.serving import served

MARKET = {"EUR": "20572.78000001", "GBP": "18271.51", "USD": "21712.51"}
PRICE = record(EUR=2057278000001, GBP=1827151 * 10**6, USD=2171251 * 10**6, ttl=3600)
SECONDS = 5.0


@dataclass
class Desk:
    ledger: ModelLedger
    keys: ModelKeys
    store: MemoryPriceStore
    client: httpx2.AsyncClient

    async def buy(self, currency: str = "EUR", key: Key | None = None, **members: Any) -> dict[str, Any]:
        headers = {} if key is None else {"Authorization": f"Bearer {key.text}"}
        body = {"currency": currency, "amount": "69.00", **members}
        answer = await self.client.post("/place_order/", json=body, headers=headers)
        assert answer.status_code == 201, answer.text
        return dict(answer.json()["order"])


@contextlib.asynccontextmanager
async def desk_of(**given: Any) -> AsyncIterator[Desk]:
    configured = settings(price_ttl_seconds=3600, price_refresh_seconds=0.05, **given)
    ledger, keys, store = ModelLedger(), ModelKeys(), MemoryPriceStore(configured)
    await store.publish(PRICE)
    app = create_app(configured, ledger, store, Reporter("create_buy_order", MemoryReportStore(configured), configured))
    app.keys = KeyCache(keys, configured)
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        yield Desk(ledger, keys, store, client)


def marked_up(currency: str, markup_bp: int) -> dict[str, Any]:
    """What an order of 69.00 shows of its price, by fractions."""
    rate_e8 = ceil(Fraction(MARKET[currency]) * (1 + Fraction(markup_bp, 10_000)) * 10**8)
    satoshi = ceil(Fraction(69) / Fraction(rate_e8, 10**8) * 10**8)
    fraction = f"{rate_e8 % 10**8:08d}".rstrip("0")
    return {
        "market_rate": MARKET[currency],
        "markup_bp": markup_bp,
        "exchange_rate": f"{rate_e8 // 10**8}.{fraction:0<2}",
        "bitcoin_amount": f"{satoshi // 10**8}.{satoshi % 10**8:08d}",
    }


def priced(order: dict[str, Any]) -> dict[str, Any]:
    return {name: order[name] for name in ("market_rate", "markup_bp", "exchange_rate", "bitcoin_amount")}


@pytest.mark.parametrize(
    ("setting", "markups_bp"),
    [
        (0, {"EUR": 0, "GBP": 0, "USD": 0}),
        (75, {"EUR": 75, "GBP": 75, "USD": 75}),
        ("EUR:50,GBP:5000", {"EUR": 50, "GBP": 5000, "USD": 0}),
    ],
)
async def test_orders_are_sold_at_the_market_s_rate_and_the_desk_s_markup(
    setting: object, markups_bp: dict[str, int]
) -> None:
    async with desk_of(markup_bp=setting) as desk:
        for currency, markup_bp in markups_bp.items():
            assert priced(await desk.buy(currency)) == marked_up(currency, markup_bp)
        for order in desk.ledger.stored:
            assert discrepancies(order, PRICE) == []


async def test_client_s_own_markup_takes_the_place_of_the_desk_s_currency_by_currency() -> None:
    async with desk_of(markup_bp=75) as desk:
        plain = desk.keys.add("shop", "orders:create")
        own = desk.keys.add("bank", "orders:create", client_markup_bp={"EUR": 10, "GBP": 0})
        keyed = desk.keys.add("anonymous", "orders:create", client_markup_bp={"EUR": 5})
        for key, currency, markup_bp in (
            *((None, "EUR", 75), (plain, "EUR", 75), (own, "EUR", 10), (own, "GBP", 0), (own, "USD", 75)),
            *((keyed, "EUR", 5), (None, "EUR", 75)),  # whoever shows no key pays what the desk asks of everybody
        ):
            assert priced(await desk.buy(currency, key)) == marked_up(currency, markup_bp)


async def test_order_that_is_priced_once_more_has_its_markup_again() -> None:
    async with desk_of(markup_bp=75) as desk:
        place = desk.ledger.place

        async def expire_then_publish(items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
            desk.ledger.place = place  # type: ignore[method-assign]
            await desk.store.publish(record(50_000 * 10**8, ttl=3600))
            await asyncio.sleep(0.15)
            return [Refused(stale(PRICE.as_of, PRICE.expires_at)) for _ in items]

        desk.ledger.place = expire_then_publish  # type: ignore[method-assign]
        order = await desk.buy()
        assert (order["market_rate"], order["markup_bp"], order["exchange_rate"]) == ("50000.00", 75, "50375.00")


async def test_ledger_stores_no_rate_but_the_market_s_and_the_markup(databases: Databases) -> None:
    ledger = PostgresLedger(await databases.new(), settings(), livemode=False)
    try:
        good = priced_order(6900, price=PRICE, markup_bp=75)
        for wrong in (
            replace(good, rate_e8=good.rate_e8 - 1),
            replace(good, rate_e8=good.rate_e8 + 1),
            replace(good, market_rate_e8=good.market_rate_e8 + 1),
            replace(good, markup_bp=74),
            replace(good, markup_bp=-1, rate_e8=-(-good.market_rate_e8 * 9_999 // 10_000)),
            replace(good, markup_bp=5001, rate_e8=-(-good.market_rate_e8 * 15_001 // 10_000)),
        ):
            [outcome] = await ledger.place([wrong], SECONDS)
            assert isinstance(outcome, Refused)
            assert outcome.problem.code == "internal_error"
        assert (await ledger.page(None, PageFrom(0), 10)).orders == []
    finally:
        await ledger.close()


@contextlib.asynccontextmanager
async def edge_of(given: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """A whole desk of its own at the database, with the price: a client of its create_buy_order."""
    wired = wire(given)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(wired.close)
        prices = await stack.enter_async_context(served(wired.apps["api_cache_proxy"], settings=given))
        publisher = await stack.enter_async_context(httpx2.AsyncClient())
        document = msgspec.to_builtins(record_document(PRICE))
        answer = await publisher.post(
            f"{prices}/add/?ttl=3600", json=document, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        assert answer.status_code == 200, answer.text
        await stack.enter_async_context(served(wired.apps["db_proxy"], settings=given))
        url = await stack.enter_async_context(served(wired.apps["create_buy_order"], settings=given))
        yield await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))


async def test_edges_with_other_markups_give_one_answer_for_one_key_and_all_adds_up(databases: Databases) -> None:
    dsn = await databases.new()
    given = [settings(database_url=dsn, price_ttl_seconds=3600, markup_bp=bp) for bp in (50, "EUR:75")]
    async with edge_of(given[0]) as first, edge_of(given[1]) as second:

        async def buy(number: int) -> httpx2.Response:
            body = {"currency": "EUR", "amount": "69.00", "client_order_id": f"k{number // 4}"}
            return await (first, second)[number % 2].post("/place_order/", json=body)

        answers = await asyncio.gather(*map(buy, range(80)))
        assert {answer.status_code for answer in answers} == {201}
        for start in range(0, 80, 4):
            assert len({answer.content for answer in answers[start : start + 4]}) == 1
        prices = [priced(answer.json()["order"]) for answer in answers]
        assert all(price in (marked_up("EUR", 50), marked_up("EUR", 75)) for price in prices)
    await assert_adds_up(dsn)
    database = await asyncpg.connect(dsn)
    assert all(order.rate_follows for order in (await read_ledger(database)).orders)
    await database.close()
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    orders = (await ledger.page(None, PageFrom(0), 1000)).orders
    assert len(orders) == 20
    for order in orders:
        assert discrepancies(order, await ledger.price_record(order.price_id)) == []
    await ledger.close()
