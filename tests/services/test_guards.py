"""Guards: an order is placed at the price that its client allows, or a better one, or not at all."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from jsonschema_rs import Draft202012Validator

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import PriceMoved, PriceStale
from buydesk.http.orders import PLACE_ORDER
from buydesk.money import format_rate
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Outcome, PricedOrder
from buydesk.prices.model import PriceRecord
from buydesk.services.create_buy_order import create_app
from buydesk.times import utc_now
from tests.builders import record, settings
from tests.model_ledger import ModelAccount, ModelLedger
from tests.problems import assert_problem
from tests.serving import served

# 69.00 at 20000.00 and 50 basis points, which is 20100.00, buy 0.00343284 BTC.
PRICE = record(2 * 10**12, ttl=3600)


@dataclass
class Desk:
    ledger: ModelLedger
    client: httpx2.AsyncClient

    async def post(self, *, key: str | None = None, query: str = "", **members: Any) -> httpx2.Response:
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Idempotency-Key": key})
        body = json.dumps({"currency": "EUR", "amount": "69.00", **members}) if not query else None
        return await self.client.post(f"/place_order/{query}", content=body, headers=headers)


@contextlib.asynccontextmanager
async def desk_of(**given: Any) -> AsyncIterator[Desk]:
    configured = settings(price_ttl_seconds=3600, price_refresh_seconds=0.05, markup_bp=50, **given)
    ledger, store = ModelLedger(), MemoryPriceStore(configured)
    await store.publish(PRICE)
    app = create_app(configured, ledger, store, Reporter("create_buy_order", MemoryReportStore(configured), configured))
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        yield Desk(ledger, client)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_of() as desk:
        yield desk


@pytest.mark.parametrize(
    "guard",
    [
        {"max_exchange_rate": "20100"},
        {"max_exchange_rate": "20100.00000000"},
        {"max_exchange_rate": 20100},
        {"max_exchange_rate": "20100.0"},
        {"max_exchange_rate": "2.01e4"},
        {"max_exchange_rate": "99999999999.99999999"},
        {"max_exchange_rate": None},
        {"min_bitcoin_amount": "0.00343284"},
        {"min_bitcoin_amount": "0.00000001"},
        {"min_bitcoin_amount": None},
    ],
)
async def test_order_is_placed_at_the_price_that_is_allowed_or_a_better_one(desk: Desk, guard: dict[str, Any]) -> None:
    answer = await desk.post(**guard)
    assert answer.status_code == 201, answer.text
    order = answer.json()["order"]
    assert (order["exchange_rate"], order["bitcoin_amount"]) == ("20100.00", "0.00343284")


@pytest.mark.parametrize(
    "guard",
    [
        {"max_exchange_rate": "20099.99999999"},
        {"max_exchange_rate": 20099.99},
        {"max_exchange_rate": "0.00000001"},
        {"min_bitcoin_amount": "0.00343285"},
        {"min_bitcoin_amount": "999999999999"},
    ],
)
async def test_order_at_a_worse_price_is_refused_with_the_price_now(desk: Desk, guard: dict[str, Any]) -> None:
    problem = assert_problem(await desk.post(key="k", **guard), 409, "price_moved")
    assert (problem["exchange_rate"], problem["bitcoin_amount"]) == ("20100.00", "0.00343284")
    assert next(iter(guard)) in problem["detail"]
    assert desk.ledger.stored == []
    again = await desk.post(key="k", max_exchange_rate=problem["exchange_rate"])  # a refused order uses no key up
    assert again.status_code == 201


@pytest.mark.parametrize(
    ("members", "member"),
    [
        ({"max_exchange_rate": "0"}, "max_exchange_rate"),
        ({"max_exchange_rate": "-1"}, "max_exchange_rate"),
        ({"max_exchange_rate": ""}, "max_exchange_rate"),
        ({"max_exchange_rate": "20,000"}, "max_exchange_rate"),
        ({"max_exchange_rate": "20100.000000001"}, "max_exchange_rate"),
        ({"max_exchange_rate": "100000000000"}, "max_exchange_rate"),
        ({"max_exchange_rate": "1e999999999"}, "max_exchange_rate"),
        ({"max_exchange_rate": "9" * 33}, "max_exchange_rate"),
        ({"max_exchange_rate": True}, "max_exchange_rate"),
        ({"max_exchange_rate": ["20100"]}, "max_exchange_rate"),
        ({"min_bitcoin_amount": "0"}, "min_bitcoin_amount"),
        ({"min_bitcoin_amount": "0.00000000"}, "min_bitcoin_amount"),
        ({"min_bitcoin_amount": "-1"}, "min_bitcoin_amount"),
        ({"min_bitcoin_amount": "0.000000001"}, "min_bitcoin_amount"),
        ({"min_bitcoin_amount": "1e-3"}, "min_bitcoin_amount"),
        ({"min_bitcoin_amount": 0.003}, "min_bitcoin_amount"),
        ({"max_exchange_rate": "20100", "min_bitcoin_amount": "0.003"}, "min_bitcoin_amount"),
        ({"max_exchange_rate": None, "min_bitcoin_amount": "0.003"}, "min_bitcoin_amount"),
    ],
)
async def test_what_is_no_guard_is_refused_by_name(desk: Desk, members: dict[str, Any], member: str) -> None:
    problem = assert_problem(await desk.post(**members), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == [member]
    assert desk.ledger.stored == []


SCHEMA = Draft202012Validator(PLACE_ORDER["requestBody"]["content"]["application/json"]["schema"])


@pytest.mark.parametrize("name", ["max_exchange_rate", "min_bitcoin_amount"])
@pytest.mark.parametrize("shown", ["20100.00", "0.00345000", "0.00000001", "0.10", "10.00000000", "99999999999.99"])
async def test_what_the_desk_shows_is_a_guard_as_documented_and_taken(desk: Desk, name: str, shown: str) -> None:
    assert SCHEMA.is_valid({"currency": "EUR", "amount": "69.00", name: shown})
    assert (await desk.post(**{name: shown})).json().get("code") in (None, "price_moved")


@pytest.mark.parametrize("name", ["max_exchange_rate", "min_bitcoin_amount"])
@pytest.mark.parametrize("text", ["0", "0.00000000", "0.", "0.000000001", "-1.00", "1.", ".1", ""])
async def test_no_text_that_is_refused_is_documented(desk: Desk, name: str, text: str) -> None:
    assert not SCHEMA.is_valid({"currency": "EUR", "amount": "69.00", name: text})
    assert_problem(await desk.post(**{name: text}), 422, "invalid_request")


@pytest.mark.parametrize("rate", [0.1, 20100.07, 1e-8, 12345678901.5, 4.35])
def test_number_with_few_places_is_documented_whatever_floats_make_of_it(rate: float) -> None:
    assert SCHEMA.is_valid({"currency": "EUR", "amount": "69.00", "max_exchange_rate": rate})


@pytest.mark.parametrize("guard", ["max_exchange_rate=30000", "min_bitcoin_amount=0.001"])
async def test_query_has_no_guard(desk: Desk, guard: str) -> None:
    answer = await desk.post(query=f"?currency=EUR&amount=69&{guard}")
    assert_problem(answer, 422, "invalid_request")


async def test_repeat_is_answered_whatever_its_guard_says(desk: Desk) -> None:
    first = await desk.post(key="k", max_exchange_rate="20100")
    for guard in ({"max_exchange_rate": "1"}, {"min_bitcoin_amount": "9"}, {}):
        again = await desk.post(key="k", **guard)
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotent-replayed"] == "true"
    assert_problem(await desk.post(key="k", amount="70.00", max_exchange_rate="1"), 422, "idempotency_key_reused")


async def test_guard_comes_after_a_pause_and_before_the_limits(desk: Desk) -> None:
    bad = {"max_exchange_rate": "1"}
    desk.ledger.clients["anonymous"] = ModelAccount(cap_satoshi=1, order_satoshi_max=1)
    assert_problem(await desk.post(), 409, "order_too_large")
    assert_problem(await desk.post(**bad), 409, "price_moved")
    desk.ledger.paused = True
    assert_problem(await desk.post(**bad), 503, "paused")


async def test_dry_run_says_whether_the_guard_holds(desk: Desk) -> None:
    assert (await desk.post(dry_run=True, max_exchange_rate="20100")).status_code == 200
    assert_problem(await desk.post(dry_run=True, max_exchange_rate="20099.99"), 409, "price_moved")
    assert desk.ledger.stored == []


async def test_price_that_has_ended_is_told_before_the_guard() -> None:
    ended = settings(price_ttl_seconds=3600, price_refresh_seconds=0.05)
    store = MemoryPriceStore(ended)
    await store.publish(record(age=3599.5, ttl=3600))
    app = create_app(ended, ModelLedger(), store, Reporter("create_buy_order", MemoryReportStore(ended), ended))
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        body = {"currency": "EUR", "amount": "69.00", "max_exchange_rate": "1"}
        answer = await client.post("/place_order/", json=body)
        while answer.json()["code"] == "price_moved":
            answer = await client.post("/place_order/", json=body)
        assert_problem(answer, 503, "price_stale")


@pytest.mark.parametrize(
    ("market_e8", "then", "status"),
    [(None, PriceStale, 503), (10**12, PriceRecord, 201), (3 * 10**12, PriceMoved, 409)],
    ids=["none", "better", "worse"],
)
async def test_guard_judges_anew_when_its_price_has_ended_meanwhile(
    market_e8: int | None, then: type, status: int
) -> None:
    given = settings(price_ttl_seconds=3600, price_refresh_seconds=0.05)
    ended, store, ledger = record(2 * 10**12, age=3598, ttl=3600), MemoryPriceStore(given), ModelLedger()
    await store.publish(ended)
    judged: list[object] = []

    async def place_late(items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        judged.extend(item.price for item in items)
        outcomes = await ModelLedger.place(ledger, items, timeout_seconds)
        if items and len(judged) == 1:
            if market_e8 is not None:
                await store.publish(record(market_e8, ttl=3600))
            await asyncio.sleep((ended.expires_at - utc_now()).total_seconds() + 0.2)
        return outcomes

    ledger.place = place_late  # type: ignore[method-assign]
    app = create_app(given, ledger, store, Reporter("create_buy_order", MemoryReportStore(given), given))
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        body = {"currency": "EUR", "amount": "69.00", "max_exchange_rate": "19999.99"}
        answer = await client.post("/place_order/", json=body)
    assert [type(price) for price in judged] == [PriceMoved, then]
    assert answer.status_code == status
    facts = answer.json()
    assert facts.get("code") == {503: "price_stale", 409: "price_moved"}.get(status)
    if market_e8 is not None:
        assert facts.get("order", facts)["exchange_rate"] == format_rate(market_e8)
