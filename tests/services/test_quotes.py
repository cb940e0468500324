"""Quotes: what clients get, what an order by one is, and what never happens; over real TCP."""

import asyncio
import contextlib
import logging
import os
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from functools import partial
from math import ceil
from typing import Any

import asyncpg
import httpx2
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import Key
from buydesk.clients.rates import RateLimiter
from buydesk.errors import DeskError, LedgerUnavailable, OutcomeUnknown, PriceStale
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Outcome, Placed, PricedOrder
from buydesk.orders.quotes import QuoteSigner, quote_reader
from buydesk.orders.quoting import AskedQuote, KeptPrices, Quoting
from buydesk.prices.cache import PriceCache
from buydesk.prices.model import PriceRecord
from buydesk.services.create_buy_order import create_app
from buydesk.signing_keys import new_signing_key, public_key
from buydesk.times import format_time, parse_time, utc_now
from tests.builders import SIGNING_KEY, quote_figures, quoted_order, record, settings, without
from tests.clock import FakeClock
from tests.databases import Databases, run
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.problems import assert_problem
from tests.proof import discrepancies
from tests.recount import assert_adds_up
from tests.services.test_rates import edges_of
from tests.serving import served

PRICE = record(EUR=2057278 * 10**6, GBP=1827151 * 10**6, USD=2171251 * 10**6, ttl=3600)
MEMBERS = [
    *("id", "quote", "currency", "amount", "bitcoin_amount", "exchange_rate", "market_rate", "markup_bp"),
    *("price_id", "quoted_at", "expires_at", "reference"),
]
# How many quotes are made up and placed; a million take some minutes.
MADE_UP = int(os.environ.get("BUYDESK_TEST_QUOTES", "20000"))


@dataclass(repr=False)
class Ledger(ModelLedger):
    """The model, which notes which records it is to keep; with faults to order."""

    kept: list[uuid.UUID] = field(default_factory=list)
    fault: DeskError | None = None
    lost: int = 0  # so many answers are lost after placing

    async def keep_price(self, record: PriceRecord) -> None:
        self.kept.append(record.id)
        await asyncio.sleep(0.02)
        if self.fault is not None:
            raise self.fault
        await super().keep_price(record)

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        outcomes = await super().place(items, timeout_seconds)
        if items and self.lost:
            self.lost -= 1
            raise OutcomeUnknown("lost")
        return outcomes


@dataclass
class Desk:
    ledger: Ledger
    keys: ModelKeys
    store: MemoryPriceStore
    client: httpx2.AsyncClient

    async def post(self, path: str, body: object, key: Key | None = None, **headers: str) -> httpx2.Response:
        shown = {} if key is None else {"Authorization": f"Bearer {key.text}"}
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.client.post(path, json=body, headers=shown | named)

    async def ask(self, key: Key | None = None, **members: Any) -> httpx2.Response:
        return await self.post("/quotes/", {"currency": "EUR"} | members, key)

    async def quote(self, key: Key | None = None, **members: Any) -> dict[str, Any]:
        answer = await self.ask(key, **({"amount": "69.00"} | members))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def execute(self, token: str, key: Key | None = None, **members: Any) -> httpx2.Response:
        return await self.post("/place_order/", {"quote": token} | members, key)


@contextlib.asynccontextmanager
async def desk_of(
    ledger: Ledger | None = None, price: PriceRecord = PRICE, rates: RateLimiter | None = None, **given: Any
) -> AsyncIterator[Desk]:
    shared = {"order_seconds_max": 1, "price_ttl_seconds": 3600, "resend_pause_seconds": 0.01}
    configured = settings(**(shared | {"price_refresh_seconds": 0.05} | given))
    ledger, keys, store = ledger or Ledger(), ModelKeys(), MemoryPriceStore(configured)
    await store.publish(price)
    app = create_app(configured, ledger, store, Reporter("create_buy_order", MemoryReportStore(configured), configured))
    app.keys, app.rates = KeyCache(keys, configured), rates
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        yield Desk(ledger, keys, store, client)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_of() as desk:
        yield desk


def seconds_between(one: str, other: str) -> float:
    return (parse_time(other) - parse_time(one)).total_seconds()


async def test_a_quote_of_an_amount(desk: Desk) -> None:
    answer = await desk.ask(amount=69, reference="invoice 7")
    assert (answer.status_code, answer.headers["content-type"]) == (201, "application/json")
    assert answer.headers["cache-control"] == "private, no-cache"
    quote = answer.json()
    assert list(quote) == MEMBERS
    assert (quote["currency"], quote["amount"], quote["bitcoin_amount"]) == ("EUR", "69.00", "0.00335395")
    assert (quote["exchange_rate"], quote["market_rate"], quote["markup_bp"]) == ("20572.78", "20572.78", 0)
    assert (quote["price_id"], quote["reference"]) == (str(PRICE.id), "invoice 7")
    assert seconds_between(quote["quoted_at"], quote["expires_at"]) == 30
    assert abs(seconds_between(quote["quoted_at"], format_time(utc_now()))) < 5
    assert desk.ledger.stored == []


@pytest.mark.parametrize(
    ("asked", "amount", "bitcoin"),
    [("0.05", "1028.64", "0.05000005"), (1e-8, "0.01", "0.00000049"), ("0.00335395", "69.00", "0.00335395")],
)
async def test_a_quote_of_bitcoin_is_of_the_fewest_cents_that_buy_as_much(
    desk: Desk, asked: object, amount: str, bitcoin: str
) -> None:
    quote = (await desk.ask(bitcoin_amount=asked)).json()
    assert (quote["amount"], quote["bitcoin_amount"]) == (amount, bitcoin)


async def test_a_quote_has_the_caller_s_markup() -> None:
    async with desk_of(markup_bp=75) as desk:
        bank = desk.keys.add("bank", "quotes:create", "orders:create", client_markup_bp={"EUR": 10})
        quotes = [await desk.quote(), await desk.quote(bank)]
        assert [(quote["markup_bp"], quote["exchange_rate"]) for quote in quotes] == [
            (75, "20727.07585"),
            (10, "20593.35278"),
        ]
        assert {quote["market_rate"] for quote in quotes} == {"20572.78"}
        order = (await desk.execute(quotes[1]["quote"], bank)).json()["order"]
        assert (order["markup_bp"], order["exchange_rate"]) == (10, "20593.35278")


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        ({}, [("currency", "is missing"), ("amount", "is missing; or bitcoin_amount, for a quote of bitcoin")]),
        ({"currency": "CHF", "amount": 1}, [("currency", "must be one of EUR, GBP, USD")]),
        (
            {"currency": "EUR", "amount": 1, "bitcoin_amount": 1},
            [("bitcoin_amount", "must not be given beside amount: the price makes one of the other")],
        ),
        ({"currency": "EUR", "amount": 0.001}, [("amount", "must be a whole number of cents")]),
        ({"currency": "EUR", "bitcoin_amount": 0}, [("bitcoin_amount", "must be greater than 0")]),
        ({"currency": "EUR", "bitcoin_amount": "1e-9"}, [("bitcoin_amount", "must have at most 8 decimal places")]),
        ({"currency": "EUR", "bitcoin_amount": True}, [("bitcoin_amount", "must be a number, or a number as text")]),
        ({"currency": "EUR", "bitcoin_amount": 50_000}, [("bitcoin_amount", "costs more than an order may be of")]),
        ({"currency": "EUR", "amount": 1, "valid_seconds": 4}, [("valid_seconds", "must be a whole number from 5")]),
        ({"currency": "EUR", "amount": 1, "valid_seconds": "9"}, [("valid_seconds", "must be a whole number from 5")]),
        ({"currency": "EUR", "amount": 1, "valid_seconds": 5.5}, [("valid_seconds", "must be a whole number from 5")]),
        ({"currency": "EUR", "amount": 1, "valid_seconds": 61}, [("valid_seconds", "must be at most 60 here")]),
        ({"currency": "EUR", "amount": 1, "reference": 5}, [("reference", "must be text")]),
        ({"currency": "EUR", "amount": 1, "client_order_id": "k"}, [("client_order_id", "is not a member of a quote")]),
    ],
)  # fmt: skip
async def test_what_is_no_request_for_a_quote_is_refused_member_by_member(
    desk: Desk, body: dict[str, Any], errors: list[tuple[str, str]]
) -> None:
    found = assert_problem(await desk.post("/quotes/", body), 422, "invalid_request")["errors"]
    assert [(each["member"], each["reason"]) for each in found] == errors
    assert desk.ledger.kept == [] or "costs more" in errors[0][1]


async def test_how_long_a_quote_is_valid_is_the_desk_s_and_within_its_limit_the_client_s_choice() -> None:
    async with desk_of(quote_seconds=20, quote_seconds_max=900) as desk:
        for asked, seconds in ((None, 20), (5, 5), (900, 900)):
            quote = await desk.quote(valid_seconds=asked)
            assert seconds_between(quote["quoted_at"], quote["expires_at"]) == seconds
        assert_problem(await desk.ask(amount=1, valid_seconds=901), 422, "invalid_request")


@pytest.mark.parametrize(("own", "by_default", "most"), [(10, 10, 10), (300, 30, 300), (None, 30, 60)])
async def test_how_long_is_the_client_s_own_limit_where_it_has_one(
    desk: Desk, own: int | None, by_default: int, most: int
) -> None:
    shop = desk.keys.add("shop", "quotes:create", client_quote_seconds_max=own)
    for asked, seconds in ((None, by_default), (most, most)):
        quote = await desk.quote(shop, valid_seconds=asked)
        assert seconds_between(quote["quoted_at"], quote["expires_at"]) == seconds
    found = assert_problem(await desk.ask(shop, amount=1, valid_seconds=most + 1), 422, "invalid_request")
    assert found["errors"] == [{"member": "valid_seconds", "reason": f"must be at most {most} here"}]


async def test_the_price_record_is_stored_once_before_the_first_quote_at_it(desk: Desk) -> None:
    await asyncio.gather(*(desk.quote(currency=currency) for currency in ("EUR", "GBP", "USD") * 5))
    await desk.quote()
    assert desk.ledger.kept == [PRICE.id]
    assert PRICE.id in desk.ledger.records


async def test_without_the_ledger_there_is_no_quote_at_a_new_price_and_all_the_others(desk: Desk) -> None:
    desk.ledger.fault = LedgerUnavailable("down", retry_after_seconds=1)
    answers = await asyncio.gather(*(desk.ask(amount=1) for _ in range(4)))
    for answer in answers:
        assert_problem(answer, 503, "ledger_unavailable")
        assert answer.headers["retry-after"] == "1"
    assert len(desk.ledger.kept) == 1
    desk.ledger.fault = None
    await desk.quote()
    desk.ledger.fault = LedgerUnavailable("down")
    await desk.quote()
    assert len(desk.ledger.kept) == 2


async def test_who_gives_up_waiting_for_a_record_does_not_end_it_for_the_others() -> None:
    ledger = Ledger()
    kept = KeptPrices(ledger)
    first, second = (asyncio.create_task(kept.keep(PRICE)) for _ in range(2))
    await asyncio.sleep(0.005)
    first.cancel()
    await second
    assert (ledger.kept, list(ledger.records)) == ([PRICE.id], [PRICE.id])
    ledger.fault = LedgerUnavailable("down")
    left = asyncio.create_task(kept.keep(record()))
    await asyncio.sleep(0.005)
    left.cancel()
    await asyncio.sleep(0.05)  # its exception is nobody's, and told to nobody


@pytest.mark.parametrize("missing", [True, False])
async def test_without_a_price_there_is_no_quote(missing: bool) -> None:
    published = without(PRICE, **{"missing" if missing else "unsettled": [Currency.EUR]})
    async with desk_of(price=published) as desk:
        assert_problem(await desk.ask(amount=1), 503, "price_unavailable" if missing else "price_unsettled")
        assert (await desk.ask(currency="GBP", amount=1)).status_code == 201


async def test_a_currency_that_is_switched_off_has_no_quotes() -> None:
    async with desk_of(currencies="GBP,USD") as desk:
        found = assert_problem(await desk.ask(amount=1), 422, "invalid_request")
        assert found["errors"] == [{"member": "currency", "reason": "must be one of GBP, USD"}]


async def test_a_clock_that_was_set_forward_gives_no_quote_that_nobody_could_prove() -> None:
    clock = FakeClock(at=PRICE.as_of + timedelta(seconds=1))
    configured = settings(price_ttl_seconds=3600)
    store = MemoryPriceStore(configured, clock=clock)
    await store.publish(PRICE)
    prices = PriceCache(store, configured, logging.getLogger(), clock)
    await prices.refresh()
    quoting = Quoting(Ledger(), prices, configured, clock)
    asked = AskedQuote("shop", Currency.EUR, 100, None, None, None, 60)
    assert (await quoting.give(asked, 0)).quoted_at == clock.at
    clock.at = PRICE.expires_at
    with pytest.raises(PriceStale):
        await quoting.give(asked, 0)


async def test_an_order_by_quote_is_what_the_quote_says_at_whatever_price_there_is(desk: Desk) -> None:
    quote = await desk.quote()
    await desk.store.publish(record(99_999 * 10**8, ttl=3600))
    await asyncio.sleep(0.15)
    answer = await desk.execute(quote["quote"])
    assert answer.status_code == 201
    document = answer.json()
    assert document["data"] == "Order was placed for EUR:69.00"
    order = document["order"]
    shared = (
        "currency",
        "amount",
        "bitcoin_amount",
        "exchange_rate",
        "market_rate",
        "markup_bp",
        "price_id",
        "reference",
    )
    assert {name: order[name] for name in shared} == {name: quote[name] for name in shared}
    assert (order["quote_id"], order["client_order_id"], order["status"]) == (quote["id"], None, "accepted")
    assert "idempotent-replayed" not in answer.headers


@pytest.mark.parametrize("is_unsettled", [True, False])
async def test_a_quote_is_honoured_while_prices_are_unsettled_or_stale(is_unsettled: bool) -> None:
    async with desk_of() as desk:
        quote = await desk.quote()
        if is_unsettled:
            await desk.store.publish(without(record(), unsettled=list(Currency)))
        else:

            async def latest() -> PriceRecord:
                raise PriceStale("old", as_of=format_time(PRICE.as_of))

            desk.store.latest = latest  # type: ignore[method-assign]
        await asyncio.sleep(0.2)
        plain = await desk.client.post("/place_order/?currency=EUR&amount=69")
        assert_problem(plain, 503, "price_unsettled" if is_unsettled else "price_stale")
        assert (await desk.execute(quote["quote"])).status_code == 201


def after(seconds: timedelta) -> datetime:
    return utc_now() + seconds


async def test_executed_again_it_is_the_first_answer_byte_for_byte_a_day_later_too(desk: Desk) -> None:
    quote = await desk.quote()
    first = await desk.execute(quote["quote"])
    assert first.status_code == 201
    for later in (timedelta(), timedelta(minutes=1), timedelta(days=1)):
        desk.ledger.now = partial(after, later)
        desk.ledger.paused, desk.ledger.cap_satoshi = True, 0
        again = await desk.execute(quote["quote"])
        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
    assert len(desk.ledger.stored) == 1


async def test_a_quote_expires_by_the_ledger_s_clock(desk: Desk) -> None:
    quote = await desk.quote(valid_seconds=5)
    desk.ledger.now = partial(after, timedelta(seconds=6))
    found = assert_problem(await desk.execute(quote["quote"]), 409, "quote_expired")
    assert found["expires_at"] == quote["expires_at"]
    desk.ledger.now = utc_now
    assert (await desk.execute(quote["quote"])).status_code == 201


async def test_pause_and_caps_count_when_it_is_executed(desk: Desk) -> None:
    quote = await desk.quote()
    desk.ledger.paused = True
    assert_problem(await desk.execute(quote["quote"]), 503, "paused")
    desk.ledger.paused, desk.ledger.cap_satoshi = False, 335394
    assert_problem(await desk.execute(quote["quote"]), 409, "exposure_cap_exceeded")
    desk.ledger.cap_satoshi = 335395
    assert (await desk.execute(quote["quote"])).status_code == 201


async def test_key_reference_and_metadata_stand_beside_a_quote_and_nothing_else(desk: Desk) -> None:
    quote = await desk.quote()
    found = assert_problem(
        await desk.execute(quote["quote"], currency="EUR", amount=69, note="x"), 422, "invalid_request"
    )
    reason = "is not a member of an order by quote"
    assert found["errors"] == [{"member": name, "reason": reason} for name in ("currency", "amount", "note")]
    answer = await desk.execute(quote["quote"], client_order_id="k", reference="r", metadata={"a": "b"})
    order = answer.json()["order"]
    assert (order["client_order_id"], order["reference"], order["metadata"]) == ("k", "r", {"a": "b"})
    again = await desk.post(
        "/place_order/", {"quote": quote["quote"], "reference": "r", "metadata": {"a": "b"}}, Idempotency_Key="k"
    )
    assert again.content == answer.content
    keyless = await desk.execute(quote["quote"], reference="r", metadata={"a": "b"})
    assert keyless.content == answer.content
    for other in ({"client_order_id": "l", "reference": "r", "metadata": {"a": "b"}}, {"reference": "s"}, {}):
        assert_problem(await desk.execute(quote["quote"], **other), 422, "idempotency_key_reused")


async def test_the_quote_s_reference_is_the_order_s_and_no_other_stands_against_it(desk: Desk) -> None:
    quote = await desk.quote(reference="invoice 7")
    found = assert_problem(await desk.execute(quote["quote"], reference="invoice 8"), 422, "invalid_request")
    assert found["errors"] == [{"member": "reference", "reason": "differs from the quote's"}]
    first = await desk.execute(quote["quote"])
    assert first.json()["order"]["reference"] == "invoice 7"
    assert (await desk.execute(quote["quote"], reference="invoice 7")).content == first.content


@pytest.mark.parametrize("token", [7, None, ["q1"], {"id": 1}])
async def test_a_quote_that_is_no_text_is_named(desk: Desk, token: object) -> None:
    found = assert_problem(await desk.post("/place_order/", {"quote": token}), 422, "invalid_request")
    assert found["errors"] == [{"member": "quote", "reason": "must be text"}]


async def test_a_quote_needs_no_key_where_orders_do() -> None:
    async with desk_of(idempotency_keys_required=True) as desk:
        quote = await desk.quote()
        assert (await desk.execute(quote["quote"])).status_code == 201


async def test_every_change_of_a_token_is_refused_before_and_after_it_is_executed(desk: Desk) -> None:
    token = (await desk.quote())["quote"]
    rng = random.Random(7)  # noqa: S311

    async def refused() -> None:
        for place in range(0, len(token), 3):
            other = rng.choice([each for each in "abcXYZ019-_." if each != token[place]])
            assert_problem(await desk.execute(token[:place] + other + token[place + 1 :]), 422, "quote_invalid")
        for text in ("", token[:-1], token + "A", "\u202e" + token, token * 3, "q1...", "\x00"):
            assert_problem(await desk.execute(text), 422, "quote_invalid")

    await refused()
    assert (await desk.execute(token)).status_code == 201
    await refused()
    assert len(desk.ledger.stored) == 1


async def test_another_client_s_quote_is_not_there_whether_it_was_executed_or_not(desk: Desk) -> None:
    shop, bank = (desk.keys.add(name, "orders:create", "quotes:create") for name in ("shop", "bank"))
    token = (await desk.quote(shop))["quote"]
    before = await desk.execute(token, bank)
    found = assert_problem(before, 404, "quote_not_found")
    assert_problem(await desk.execute(token), 404, "quote_not_found")
    assert (await desk.execute(token, shop)).status_code == 201
    assert (await desk.execute(token, bank)).content == before.content
    assert "shop" not in str(found)
    assert_problem(await desk.execute(token[:-1], bank), 422, "quote_invalid")
    assert [order.client for order in desk.ledger.stored] == ["shop"]


async def test_quotes_are_for_who_may_have_them(desk: Desk) -> None:
    reader = desk.keys.add("shop", "orders:create")
    found = assert_problem(await desk.ask(reader, amount=1), 403, "insufficient_scope")
    assert found["scope"] == "quotes:create"


async def test_the_other_mode_s_quote_is_none(desk: Desk) -> None:
    live = QuoteSigner(SIGNING_KEY).sign(replace(quote_figures(PRICE), livemode=True))
    assert_problem(await desk.execute(live.token), 422, "quote_invalid")


async def test_while_a_key_is_changed_quotes_of_both_are_taken() -> None:
    old, new = new_signing_key(), new_signing_key()
    ledger, keys = Ledger(), f"{public_key(old)},{public_key(new)}"
    given: list[dict[str, Any]] = [
        {"quote_signing_key": old},
        {"quote_signing_key": old, "quote_keys": keys},
        {"quote_signing_key": new, "quote_keys": keys},
        {"quote_signing_key": new, "quote_keys": public_key(new)},
    ]
    tokens: list[str] = []
    first: httpx2.Response | None = None
    for stage, each in enumerate(given):
        async with desk_of(ledger, **each) as desk:
            tokens.append((await desk.quote())["quote"])
            if first is None:
                first = await desk.execute(tokens[0])
            again = await desk.execute(tokens[0])
            if stage < 3:
                assert (again.status_code, again.content) == (201, first.content)
                assert (await desk.execute(tokens[stage])).status_code == 201
            else:  # the old key was given up; its orders are found as all orders are
                assert_problem(again, 422, "quote_invalid")
                assert (await desk.execute(tokens[2])).headers["idempotent-replayed"] == "true"


async def test_a_lost_answer_is_sent_again_and_becomes_known(desk: Desk) -> None:
    quote = await desk.quote()
    desk.ledger.lost = 1
    first = await desk.execute(quote["quote"])
    assert first.status_code == 201
    desk.ledger.lost = 10**6
    lost = await desk.execute((await desk.quote())["quote"])
    found = assert_problem(lost, 503, "outcome_unknown")
    assert found["order_id"]
    desk.ledger.lost = 0
    assert len(desk.ledger.stored) == 2
    assert (await desk.execute(quote["quote"])).content == first.content


async def test_beyond_the_rate_a_stored_quote_is_repeated_and_no_other_is_placed() -> None:
    limiter = RateLimiter(MemoryRateStore(), settings(anonymous_rate=3))
    async with desk_of(rates=limiter) as desk:
        quotes = [(await desk.quote())["quote"] for _ in range(2)]  # as look-ups
        answers = [await desk.execute(quotes[0]) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {201}
        assert (await desk.execute(quotes[0])).content == answers[0].content  # by the last look-up
        assert_problem(await desk.execute(quotes[1]), 429, "rate_limited")
        assert_problem(await desk.ask(amount=1), 429, "rate_limited")
        assert len(desk.ledger.stored) == 1
    await limiter.close()


async def test_200_executions_of_one_quote_through_two_edges_are_one_order(databases: Databases) -> None:
    async with edges_of(databases, order_seconds_max=8) as desk:
        key = desk.keys.add("anonymous", "orders:create", "quotes:create", client_rate_per_minute=100_000)
        body = {"currency": "EUR", "bitcoin_amount": "0.05"}
        asked = await desk.call("one", "POST", "/quotes/", key, json=body)
        assert asked.status_code == 201, asked.text
        quote = asked.json()

        async def execute(number: int) -> httpx2.Response:
            return await desk.call(
                ("one", "two")[number % 2], "POST", "/place_order/", key, json={"quote": quote["quote"]}
            )

        answers = await asyncio.gather(*map(execute, range(200)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.content for answer in answers}) == 1
        order = answers[0].json()["order"]
        assert (order["number"], order["quote_id"], order["bitcoin_amount"]) == (
            1,
            quote["id"],
            quote["bitcoin_amount"],
        )
        assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
        listed = await desk.call("db_proxy", "GET", "/get/", desk.keys.add("anonymous", "orders:read"))
        assert len(listed.json()) == 1


class Prices:
    """The same price for all currencies, changed as it pleases."""

    def __init__(self) -> None:
        self.record = PRICE

    def price(self, _: Currency) -> PriceRecord:
        return self.record


async def test_many_quotes_place_exactly_what_they_say(databases: Databases) -> None:
    rng = random.Random(20_230_309)  # noqa: S311  # the same ones every time
    dsn, configured = await databases.new(), settings()
    await run(dsn, "UPDATE exposure SET cap_satoshi = 2100000000000000")
    ledger, prices, read = PostgresLedger(dsn, configured, livemode=False), Prices(), quote_reader(configured)
    quoting = Quoting(ledger, prices, configured)  # type: ignore[arg-type]
    by_id: dict[uuid.UUID, tuple[AskedQuote, int]] = {}
    for start in range(0, MADE_UP, 500):
        prices.record = record(rng.randrange(10**11, 10**15) | 1, ttl=60)
        batch = []
        for _ in range(min(500, MADE_UP - start)):
            markup_bp = rng.choice([0, 0, 50, 75, rng.randint(0, 5000)])
            cents = rng.randint(1, 10 ** rng.randint(1, 6)) if rng.random() < 0.5 else None
            satoshi = rng.randint(1, 10 ** rng.randint(1, 7)) if cents is None else None
            asked = AskedQuote("anonymous", rng.choice(list(Currency)), cents, satoshi, None, None, 60)
            given = await quoting.give(asked, markup_bp)
            quote = read(given.token)
            assert quote == given
            by_id[quote.id] = asked, markup_bp
            batch.append(quoted_order(quote))
        for outcome in await ledger.place(batch, 30):
            assert isinstance(outcome, Placed)
            order = outcome.order
            assert order.quote_id is not None
            asked, markup_bp = by_id.pop(order.quote_id)
            rate_e8 = ceil(Fraction(prices.record.rates_e8[asked.currency]) * (1 + Fraction(markup_bp, 10_000)))

            def bought(cents: int, rate_e8: int = rate_e8) -> int:
                return ceil(Fraction(cents, 100) / Fraction(rate_e8, 10**8) * 10**8)

            assert (order.currency, order.rate_e8, order.markup_bp) == (asked.currency, rate_e8, markup_bp)
            assert order.satoshi == bought(order.amount_cents)
            if asked.satoshi is None:
                assert order.amount_cents == asked.amount_cents
            else:
                assert order.satoshi >= asked.satoshi
                assert order.amount_cents == 1 or bought(order.amount_cents - 1) < asked.satoshi
    assert not by_id
    assert (await ledger.exposure(None)).orders == MADE_UP
    await ledger.close()
    await assert_adds_up(dsn)


async def test_orders_by_quote_are_proven_by_what_is_stored(databases: Databases) -> None:
    dsn = await databases.new()
    ledger, price = PostgresLedger(dsn, settings(), livemode=False), record(age=59.5)
    await ledger.keep_price(price)
    quote = QuoteSigner(SIGNING_KEY).sign(
        replace(
            quote_figures(price),
            quoted_at=price.expires_at - timedelta(milliseconds=1),
            expires_at=price.expires_at + timedelta(seconds=30),
        )
    )
    await asyncio.sleep(0.6)
    [outcome] = await ledger.place([quoted_order(quote)], 5)
    assert isinstance(outcome, Placed)
    order = outcome.order
    assert order.created_at > price.expires_at
    connection = await asyncpg.connect(dsn)
    [stored] = await connection.fetch("SELECT quoted_at, quote_expires_at FROM orders")
    assert tuple(stored) == (quote.quoted_at, quote.expires_at)
    assert discrepancies(order, price, quoted_at=stored["quoted_at"]) == []
    assert "the price ended at" in "; ".join(discrepancies(order, price))
    assert "the price ended at" in "; ".join(discrepancies(order, price, quoted_at=price.expires_at))
    await assert_adds_up(dsn)
    for changes in ("quote_expires_at = created_at", "quote_expires_at = quoted_at + interval '16 minutes'"):
        with pytest.raises(asyncpg.CheckViolationError, match="orders_quote_in_time"):
            await connection.execute(f"ALTER TABLE orders DISABLE TRIGGER ALL; UPDATE orders SET {changes}")  # noqa: S608
    await connection.close()
    await ledger.close()
