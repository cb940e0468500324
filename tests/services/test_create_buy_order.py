"""create_buy_order over real TCP: what clients may send, what they get, and what never happens."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.errors import (
    DeskError,
    LedgerUnavailable,
    OutcomeUnknown,
    PriceStale,
    PriceStoreUnavailable,
    PriceUnavailable,
)
from buydesk.http.orders import misspelt_keys
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.model import Outcome, PricedOrder, Refused
from buydesk.prices.cache import PriceCache
from buydesk.prices.model import FeedStatus, PriceRecord, stale
from buydesk.services.create_buy_order import create_app
from buydesk.times import utc_now
from tests.builders import JUMPED, NOT_QUOTED, new_order, priced_order, record, settings, signed, without
from tests.clock import FakeClock
from tests.model_ledger import ModelLedger
from tests.problems import assert_problem
from tests.serving import served

JSON = {"Content-Type": "application/json"}
EUR, GBP, USD = ALL = tuple(Currency)
PRICE = record(EUR=4119191 * 10**6, GBP=3533089 * 10**6, USD=4847888 * 10**6, ttl=3600)


class Ledger(ModelLedger):
    """The model, with faults to order."""

    fault: Exception | None = None
    refuse_once: Any = None

    async def place(self, items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        if self.fault is not None:
            raise self.fault
        if self.refuse_once is not None:
            problem, self.refuse_once = self.refuse_once, None
            return [Refused(problem) for _ in items]
        return await super().place(items, timeout_seconds)


@dataclass
class Desk:
    ledger: Ledger
    store: MemoryPriceStore
    client: httpx2.AsyncClient

    async def post(self, body: object = None, query: str = "", **headers: str) -> httpx2.Response:
        content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        all_headers = ({} if body is None else JSON) | {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.client.post(f"/place_order/{query}", content=content, headers=all_headers)


@asynccontextmanager
async def desk_of(**given: Any) -> AsyncIterator[Desk]:
    configured = settings(
        order_seconds_max=1, price_ttl_seconds=3600, resend_pause_seconds=0.01, price_refresh_seconds=0.05, **given
    )
    ledger, store = Ledger(), MemoryPriceStore(configured)
    await store.publish(PRICE)
    reporter = Reporter("create_buy_order", MemoryReportStore(configured), configured)
    async with (
        served(create_app(configured, ledger, store, reporter)) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        yield Desk(ledger, store, client)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_of() as desk:
        yield desk


@pytest.fixture
async def orders(desk: Desk) -> AsyncIterator[Desk]:
    """For refusals: whatever is sent, nothing must be stored."""
    yield desk
    assert desk.ledger.stored == []


async def test_the_brief_s_query_call(desk: Desk) -> None:
    answer = await desk.client.post("/place_order/?currency=eur&amount=69")
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert document["data"] == "Order was placed for EUR:69.00"
    order = document["order"]
    stored = desk.ledger.stored[0]
    assert list(order) == [
        "id",
        "number",
        "created_at",
        "currency",
        "amount",
        "exchange_rate",
        "bitcoin_amount",
        "client_order_id",
        "price_id",
        "price_as_of",
        "livemode",
        "status",
        "received_at",
        "reference",
        "metadata",
        "market_rate",
        "markup_bp",
        "quote_id",
    ]
    assert order["status"] == "accepted"
    assert order["id"] == str(stored.id)
    assert (order["number"], order["currency"], order["amount"]) == (1, "EUR", "69.00")
    assert (order["exchange_rate"], order["bitcoin_amount"]) == ("41191.91", "0.00167509")
    assert (order["client_order_id"], order["price_id"], order["livemode"]) == (None, str(PRICE.id), False)
    assert answer.headers["location"] == f"http://127.0.0.1:8020/get_orders/{stored.id}"
    assert "idempotent-replayed" not in answer.headers


async def test_the_brief_s_json_call(desk: Desk) -> None:
    answer = await desk.post({"currency": "USD", "amount": 600})
    assert answer.status_code == 201
    assert answer.json()["data"] == "Order was placed for USD:600.00"


async def test_without_its_trailing_slash_the_path_is_the_same(desk: Desk) -> None:
    assert (await desk.client.post("/place_order?currency=GBP&amount=1")).status_code == 201


@pytest.mark.parametrize(
    ("amount", "cents"),
    [
        (b"999999999.99", 99_999_999_999),
        (b"1e3", 100_000),
        (b'"69.0"', 6900),
        (b"0.01", 1),
        (b'"1E+3"', 100_000),
        (b"69", 6900),
        (b"6.900e1", 6900),
    ],
)
async def test_amounts_are_judged_by_their_exact_value(desk: Desk, amount: bytes, cents: int) -> None:
    # At this price even the largest amount fits.
    await desk.store.publish(record(10**10 * 10**8, ttl=3600))
    await asyncio.sleep(0.15)
    answer = await desk.post(b'{"currency":"GbP","amount":%s}' % amount)
    assert answer.status_code == 201, answer.text
    assert (desk.ledger.stored[0].amount_cents, desk.ledger.stored[0].currency) == (cents, Currency.GBP)


CODES_503 = [
    *("paused", "price_unavailable", "price_stale", "price_unsettled"),
    *("ledger_unavailable", "wrong_mode", "overloaded", "outcome_unknown"),
]
BAD_AMOUNTS = [
    b"0", b"-1", b"1000000000", b"1000000000.00", b"0.001", b'"1e400"', b"1e400", b"1e-400", b'"NaN"', b'"Infinity"',
    b"true", b"null", b'""', b'"69,00"', b'" 69"', b'"+1"', b'"0x10"', b'"\xd9\xa1"', b"[]", b"{}", b'".5"', b'"5."',
    b"0.0", b"1e-3", b'"' + b"9" * 33 + b'"', b"9" * 33, b'"' + b"0" * 10_000 + b'"', b"1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("amount", BAD_AMOUNTS, ids=lambda amount: amount[:12])
async def test_bad_amounts_are_named(orders: Desk, amount: bytes) -> None:
    answer = await orders.post(b'{"currency":"EUR","amount":%s}' % amount)
    document = assert_problem(answer, 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == ["amount"]


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity", b"01", b"+1", b"1.", b".5"])
async def test_what_is_no_json_number_is_no_json(orders: Desk, constant: bytes) -> None:
    answer = await orders.post(b'{"currency":"EUR","amount":%s}' % constant)
    document = assert_problem(answer, 422, "invalid_request")
    assert document["errors"][0]["member"] == "body"


@pytest.mark.parametrize("currency", ["btc", "", 5, "EUR ", None, True, ["EUR"], "\u20ac", "eu\u0131"])
async def test_bad_currencies_are_named(orders: Desk, currency: object) -> None:
    document = assert_problem(await orders.post({"currency": currency, "amount": 1}), 422, "invalid_request")
    assert document["errors"] == [{"member": "currency", "reason": "must be one of EUR, GBP, USD"}]


async def test_gbp_as_pence_are_written_is_refused_and_every_other_letter_case_taken(desk: Desk) -> None:
    for answer in (
        await desk.post({"currency": "GBp", "amount": 6900}),
        await desk.client.post("/place_order/?currency=GBp&amount=6900"),
    ):
        document = assert_problem(answer, 422, "invalid_request")
        told = "must be one of EUR, GBP, USD; GBp means pence, which are not taken"
        assert document["errors"] == [{"member": "currency", "reason": told}]
    assert desk.ledger.stored == []
    for currency in ("GBP", "gbp", "Gbp", "gBp", "eUr"):
        assert (await desk.post({"currency": currency, "amount": 1})).status_code == 201


async def test_a_key_that_is_null_is_none(desk: Desk) -> None:
    body = {"currency": "EUR", "amount": 1, "client_order_id": None}
    numbers = [(await desk.post(body)).json()["order"]["number"] for _ in range(2)]
    assert numbers == [1, 2]
    keyed = await desk.post(body, Idempotency_Key="k")
    assert keyed.json()["order"]["client_order_id"] == "k"


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8-sig", "starts with a byte order mark; send plain UTF-8"),
        ("utf-16", "starts with a byte order mark of UTF-16 or UTF-32; send plain UTF-8"),
        ("utf-16-le", "is in UTF-16 or UTF-32; send plain UTF-8"),
        ("utf-32-be", "is in UTF-16 or UTF-32; send plain UTF-8"),
    ],
)
async def test_a_body_in_another_encoding_is_told_what_it_is(orders: Desk, encoding: str, told: str) -> None:
    answer = await orders.post('{"currency":"EUR","amount":1}'.encode(encoding))
    assert assert_problem(answer, 422, "invalid_request")["errors"] == [{"member": "body", "reason": told}]


@pytest.mark.parametrize(
    ("body", "member"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'["currency"]', "body"),
        (b'"EUR"', "body"),
        (b"null", "body"),
        (b"\xff\xfe", "body"),
        (b"\xef\xbb\xbf{}", "body"),
        (b"[" * 16_000, "body"),
        (b'{"a":' * 3000, "body"),
        (b'{"amount":1}', "currency"),
        (b'{"currency":"EUR"}', "amount"),
        (b'{"currency":"EUR","amount":1,"price":1}', "price"),
        (b'{"currency":"EUR","amount":1,"\\ud800":1}', "?"),
        (b'{"currency":"EUR","amount":1,"amount":1}', "amount"),
        (b'{"currency":"EUR","amount":1,"client_order_id":7}', "client_order_id"),
        (b'{"currency":"EUR","amount":1,"client_order_id":"a b"}', "client_order_id"),
        (b'{"currency":"EUR","amount":1,"client_order_id":""}', "client_order_id"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else value,
)
async def test_bad_bodies_are_named(orders: Desk, body: bytes, member: str) -> None:
    document = assert_problem(await orders.post(body), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == [member]


async def test_all_that_is_wrong_is_named_at_once(orders: Desk) -> None:
    document = assert_problem(await orders.post({"amount": 0, "x": 1}), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == ["currency", "amount", "x"]


async def test_an_empty_post_says_what_to_send(orders: Desk) -> None:
    document = assert_problem(await orders.client.post("/place_order/"), 422, "invalid_request")
    assert "currency" in document["detail"]


@pytest.mark.parametrize(
    ("query", "member"),
    [
        ("?currency=eur", "amount"),
        ("?amount=1", "currency"),
        ("?currency=eur&amount=1&amount=1", "amount"),
        ("?currency=eur&amount=1&x=1", "x"),
        ("?currency=eur&amount=69%2C00", "amount"),
        ("?currency=eur&amount=%2B1", "amount"),
        ("?currency=eur&amount=", "amount"),
        ("?currency=eur&amount=NaN", "amount"),
        ("?currency=eur&amount=1&client_order_id=", "client_order_id"),
    ],
)
async def test_bad_queries_are_named(orders: Desk, query: str, member: str) -> None:
    document = assert_problem(await orders.client.post(f"/place_order/{query}"), 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == [member]


async def test_query_and_body_together_are_refused(orders: Desk) -> None:
    answer = await orders.post({"currency": "EUR", "amount": 1}, "?currency=eur&amount=1")
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["member"] == "body"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", ""])
async def test_a_body_that_is_not_json_by_its_type_is_unsupported(orders: Desk, content_type: str) -> None:
    body = b'{"currency":"EUR","amount":1}'
    answer = await orders.client.post("/place_order/", content=body, headers={"Content-Type": content_type})
    assert_problem(answer, 415, "unsupported_media_type")


async def test_a_charset_beside_the_content_type_is_fine(desk: Desk) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = await desk.client.post("/place_order/", content=b'{"currency":"EUR","amount":1}', headers=headers)
    assert answer.status_code == 201


@pytest.mark.parametrize("size", [16 * 1024 + 1, 1_000_000])
async def test_a_large_body_is_refused_unread(orders: Desk, size: int) -> None:
    started = time.monotonic()
    assert_problem(await orders.post(b'{"amount":"' + b"9" * size), 413, "payload_too_large")
    assert time.monotonic() - started < 5

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size // 1000 + 1):
            yield b"9" * 1000

    answer = await orders.client.post("/place_order/", content=chunks(), headers=JSON)
    assert_problem(answer, 413, "payload_too_large")


@pytest.mark.parametrize("key", ["k", '"k"', '"a\\"b\\\\c"', "x" * 255, '"' + "x" * 255 + '"', '"', "!~"])
async def test_a_keyed_request_sent_again_gets_the_same_bytes(desk: Desk, key: str) -> None:
    first = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key=key)
    await desk.store.publish(record(50_000 * 10**8, ttl=3600))
    await asyncio.sleep(0.12)
    again = await desk.post(b'{"amount":"6.9e1","currency":"eur"}', Idempotency_Key=key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert first.headers["location"] == again.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(desk.ledger.stored) == 1


async def test_header_bare_quoted_member_and_query_are_the_same_key(desk: Desk) -> None:
    answers = [
        await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k-1"),
        await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key='"k-1"'),
        await desk.post({"currency": "EUR", "amount": 69, "client_order_id": "k-1"}),
        await desk.post({"currency": "EUR", "amount": 69, "client_order_id": "k-1"}, Idempotency_Key="k-1"),
        await desk.client.post("/place_order/?currency=eur&amount=69&client_order_id=k-1"),
    ]
    assert [answer.status_code for answer in answers] == [201] * 5
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json()["order"]["client_order_id"] == "k-1"


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "a b", "\u00e9", "a\tb"])
async def test_bad_keys_are_named(orders: Desk, key: str) -> None:
    headers = {**JSON, "Idempotency-Key": key.encode("latin-1")}
    answer = await orders.client.post("/place_order/", content=b'{"currency":"EUR","amount":1}', headers=headers)  # type: ignore[arg-type]
    document = assert_problem(answer, 422, "invalid_request")
    assert [each["member"] for each in document["errors"]] == ["Idempotency-Key"]


async def test_two_keys_are_refused(orders: Desk) -> None:
    headers = [("Content-Type", "application/json"), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    answer = await orders.client.post("/place_order/", content=b'{"currency":"EUR","amount":1}', headers=headers)
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["member"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "name",
    [
        "X-Idempotency-Key",
        "Idempotency_Key",
        "IdempotencyKey",
        "idempotent-key",
        "X-Idempotency-Token",
        "Idempotency-Keys",
        "Idempotence-Key",
        "Idempotancy-Key",
        "Idempontency-Key",
        "Indempotency-Key",
        "Idem-Potency-Key",
        "Shop-Idempotency-Key",
        "X-Client-Order-Id",
        "client_order_id",
    ],
)
async def test_a_misspelt_key_s_header_is_refused_naming_the_right_one(orders: Desk, name: str) -> None:
    answer = await orders.client.post("/place_order/?currency=EUR&amount=1", headers={name: "k"})
    told = "is not read: the header for a key is Idempotency-Key"
    assert assert_problem(answer, 422, "invalid_request")["errors"] == [{"member": name.lower(), "reason": told}]


def test_headers_that_mean_no_key_are_none() -> None:
    names = ["idempotency-key", "host", "content-type", "x-redemption-code", "x-order", "x-order-id", "x-request-id"]
    assert misspelt_keys(names) == []


async def test_header_and_member_that_differ_are_refused(orders: Desk) -> None:
    answer = await orders.post({"currency": "EUR", "amount": 1, "client_order_id": "a"}, Idempotency_Key="b")
    assert assert_problem(answer, 422, "invalid_request")["errors"][0]["member"] == "client_order_id"


async def test_a_key_with_another_request_is_refused(desk: Desk) -> None:
    await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    assert_problem(
        await desk.post({"currency": "EUR", "amount": 70}, Idempotency_Key="k"), 422, "idempotency_key_reused"
    )
    assert_problem(
        await desk.post({"currency": "GBP", "amount": 69}, Idempotency_Key="k"), 422, "idempotency_key_reused"
    )


async def test_without_a_key_every_call_is_a_new_order(desk: Desk) -> None:
    for _ in range(3):
        assert (await desk.post({"currency": "EUR", "amount": 69})).status_code == 201
    assert [order.number for order in desk.ledger.stored] == [1, 2, 3]


async def test_a_desk_that_requires_keys_takes_no_order_without_one() -> None:
    async with desk_of(idempotency_keys_required=True) as desk:
        document = assert_problem(await desk.post({"currency": "EUR", "amount": 69}), 422, "invalid_request")
        assert [each["member"] for each in document["errors"]] == ["Idempotency-Key"]
        assert desk.ledger.stored == []
        assert (await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")).status_code == 201
        again = await desk.post({"currency": "EUR", "amount": 69, "client_order_id": "k"})
        assert again.headers["idempotent-replayed"] == "true"


async def test_over_the_cap_says_how_much_room_there_is(desk: Desk) -> None:
    document = assert_problem(
        await desk.post({"currency": "EUR", "amount": "999999999.99"}), 409, "exposure_cap_exceeded"
    )
    assert (document["cap"], document["used"], document["available"]) == ("100.00000000", "0.00000000", "100.00000000")


async def test_with_the_price_stale_new_orders_are_refused_and_repeats_answered(desk: Desk) -> None:
    first = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    await desk.store.publish(record(ttl=0.8))
    await asyncio.sleep(1)
    refused = await desk.post({"currency": "EUR", "amount": 69})
    document = assert_problem(refused, 503, "price_stale")
    assert {"as_of", "expires_at"} <= set(document)
    assert int(refused.headers["retry-after"]) > 0
    again = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    assert (again.status_code, again.content) == (201, first.content)
    assert_problem(await desk.client.get("/readyz"), 503, "not_ready")


async def test_with_no_price_ever_orders_are_refused_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buydesk.services.create_buy_order.FIRST_PRICE_SECONDS_MAX", 0.1)
    configured = settings()
    store = MemoryPriceStore(configured)
    reporter = Reporter("create_buy_order", MemoryReportStore(configured), configured)
    app = create_app(configured, Ledger(), store, reporter)
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        answer = await client.post("/place_order/?currency=eur&amount=69")
        assert_problem(answer, 503, "price_unavailable")
        assert int(answer.headers["retry-after"]) > 0


async def test_a_price_that_expires_on_the_way_is_replaced_once(desk: Desk) -> None:
    """The ledger's clock said stale; the record at hand is another by then."""
    original = desk.ledger.place

    async def expire_then_publish(items: Sequence[PricedOrder], timeout_seconds: float) -> Sequence[Outcome]:
        desk.ledger.place = original  # type: ignore[method-assign]
        await desk.store.publish(record(50_000 * 10**8, ttl=3600))
        await asyncio.sleep(0.15)
        return [Refused(stale(PRICE.as_of, PRICE.expires_at)) for _ in items]

    desk.ledger.place = expire_then_publish  # type: ignore[method-assign]
    answer = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    assert answer.status_code == 201
    assert answer.json()["order"]["exchange_rate"] == "50000.00"


async def test_a_price_that_expires_with_no_other_at_hand_is_stale(orders: Desk) -> None:
    orders.ledger.refuse_once = PriceStale("too old by the ledger's clock", retry_after_seconds=5)
    assert_problem(await orders.post({"currency": "EUR", "amount": 69}), 503, "price_stale")


async def test_a_ledger_that_cannot_be_reached_is_said_to_be_so(orders: Desk) -> None:
    orders.ledger.fault = LedgerUnavailable("PostgreSQL is away", retry_after_seconds=1)
    answer = await orders.post({"currency": "EUR", "amount": 69})
    assert_problem(answer, 503, "ledger_unavailable")
    assert answer.headers["retry-after"] == "1"


async def test_an_outcome_that_stays_unknown_is_said_to_be_so(orders: Desk) -> None:
    orders.ledger.fault = OutcomeUnknown("no answer")
    answer = await orders.post({"currency": "EUR", "amount": 69})
    document = assert_problem(answer, 503, "outcome_unknown")
    assert {"order_id", "final_after"} <= set(document)
    assert answer.headers["retry-after"] == "1"


async def test_wrong_method_and_wrong_path(orders: Desk) -> None:
    answer = await orders.client.get("/place_order/")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert_problem(await orders.client.post("/place_orders/"), 404, "not_found")


async def test_the_hot_path_is_documented_with_examples(desk: Desk) -> None:
    operation = (await desk.client.get("/openapi.json")).json()["paths"]["/place_order/"]["post"]
    assert set(operation["responses"]) == {
        "200",
        "201",
        "401",
        "403",
        "404",
        "408",
        "409",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
    }
    shown = operation["responses"]["503"]["content"]["application/problem+json"]["examples"]
    assert set(shown) == set(CODES_503)


async def test_a_currency_that_is_missing_or_unsettled_is_refused_with_its_reason_and_the_others_sell() -> None:
    async with desk_of() as desk:
        doubted = without(record(30_000 * 10**8, ttl=3600), unsettled=[GBP])
        await desk.store.publish(doubted)
        await asyncio.sleep(0.15)
        refused = await desk.post({"currency": "GBP", "amount": 1})
        document = assert_problem(refused, 503, "price_unsettled")
        assert document["detail"] == f"The price is not sold at yet: GBP {JUMPED}."
        assert document["currencies"] == {"GBP": JUMPED}
        assert 1 <= int(refused.headers["retry-after"]) <= 16
        sold = await desk.post({"currency": "EUR", "amount": 1})
        assert sold.json()["order"]["price_id"] == str(doubted.id)
        assert (await desk.client.get("/readyz")).status_code == 200
        # Gone, but not settled: the price before the doubt is not back.
        await desk.store.publish(without(record(30_000 * 10**8, ttl=3600), missing=[GBP, USD]))
        await asyncio.sleep(0.15)
        document = assert_problem(await desk.post({"currency": "GBP", "amount": 1}), 503, "price_unavailable")
        assert document["detail"] == f"There is no price in GBP: {NOT_QUOTED}."
        sold = await desk.post({"currency": "USD", "amount": 1})  # at the record before, which is still valid
        assert sold.json()["order"]["price_id"] == str(doubted.id)


async def test_a_repeat_is_answered_though_its_currency_is_unsettled(desk: Desk) -> None:
    first = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    await desk.store.publish(without(record(ttl=3600), unsettled=ALL))
    await asyncio.sleep(0.15)
    assert_problem(await desk.post({"currency": "EUR", "amount": 69}), 503, "price_unsettled")
    again = await desk.post({"currency": "EUR", "amount": 69}, Idempotency_Key="k")
    assert (again.status_code, again.content) == (201, first.content)
    missing = assert_problem(await desk.client.get("/readyz"), 503, "not_ready")["missing"]
    assert [each["what"] for each in missing] == ["price"]


async def test_a_repeat_is_answered_though_its_currency_was_switched_off_meanwhile() -> None:
    """A 422 would say that the order is not stored."""
    stored = priced_order(100, "k", price=PRICE, order=replace(new_order(100, "k"), currency=GBP))
    async with desk_of(currencies=(EUR, USD)) as desk:
        await desk.ledger.place([stored], 5)
        again = await desk.post({"currency": "GBP", "amount": 1}, Idempotency_Key="k")
        assert (again.status_code, again.json()["order"]["id"]) == (201, str(stored.order.id))
        assert_problem(await desk.post({"currency": "GBP", "amount": 1}, Idempotency_Key="new"), 422, "invalid_request")


async def test_currencies_that_are_switched_off_are_refused() -> None:
    async with desk_of(currencies=(EUR, USD)) as desk:
        document = assert_problem(await desk.post({"currency": "GBP", "amount": 1}), 422, "invalid_request")
        assert document["errors"] == [{"member": "currency", "reason": "must be one of EUR, USD"}]
        assert desk.ledger.stored == []
        for currency in ("EUR", "USD"):
            assert (await desk.post({"currency": currency, "amount": 1})).status_code == 201
        # The desk is ready while it can sell for one of its own.
        await desk.store.publish(without(record(ttl=3600), unsettled=[EUR, USD]))
        await asyncio.sleep(0.15)
        assert_problem(await desk.client.get("/readyz"), 503, "not_ready")


LOG = logging.getLogger("buydesk.services.create_buy_order")


def later(base: PriceRecord, seconds: float) -> PriceRecord:
    """Another record, all of whose times are so much later."""
    by = timedelta(seconds=seconds)
    used = tuple(replace(quote, observed_at=quote.observed_at + by) for quote in base.used)
    as_of = base.as_of + by
    made = replace(base, id=uuid.uuid4(), as_of=as_of, expires_at=base.expires_at + by, decided_at=as_of, used=used)
    return signed(made)


class Faulty(MemoryPriceStore):
    fault: Exception | None = None

    async def latest(self) -> PriceRecord:
        if self.fault is not None:
            raise self.fault
        return await super().latest()


async def test_an_older_price_replaces_only_one_that_is_from_the_future() -> None:
    clock = FakeClock(utc_now())
    latest = [record(ttl=60)]

    class Scripted(MemoryPriceStore):
        async def latest(self) -> PriceRecord:
            return latest[-1]

    price = PriceCache(Scripted(settings()), settings(), LOG, clock)
    await price.refresh()
    latest.append(record(age=28, ttl=60))  # of a store that lost the newer one, say
    await price.refresh()
    assert price.price(EUR) == latest[0]
    clock.at -= timedelta(hours=1)
    latest.append(record(age=3600, ttl=60))
    await price.refresh()
    assert price.price(EUR) == latest[2]


async def test_the_price_at_hand_ends_at_its_own_time_whatever_the_clock_and_the_store_do() -> None:
    clock = FakeClock()
    store = Faulty(settings())
    price = PriceCache(store, settings(), LOG, clock)
    assert price.price(EUR).code == "price_unavailable"  # type: ignore[union-attr]
    store.fault = PriceStoreUnavailable("away", retry_after_seconds=1)
    await price.refresh()
    assert price.price(EUR).code == "price_unavailable"  # type: ignore[union-attr]
    store.fault = None
    at_hand = record(ttl=60)
    clock.at = at_hand.as_of
    await store.publish(at_hand)
    await price.refresh()
    assert price.price(EUR) == at_hand
    # The wall clock steps back an hour; the same record is read again.
    clock.at -= timedelta(hours=1)
    clock.seconds += 59.9
    await price.refresh()
    assert price.price(EUR) == at_hand
    await price.check()
    # The store goes away: what is at hand stays good to its end, and not a moment longer.
    store.fault = PriceStoreUnavailable("away")
    await price.refresh()
    assert price.price(EUR) == at_hand
    clock.seconds += 0.1
    assert price.price(EUR).code == "price_stale"  # type: ignore[union-attr]
    with pytest.raises(PriceStale):
        await price.check()


async def test_the_first_price_is_waited_for() -> None:
    store = Faulty(settings())
    await store.put_feed_status(
        FeedStatus(utc_now(), "sandbox", "", ())
    )  # of a price that is not on the store any more
    price = PriceCache(store, settings(), LOG)
    waiting = asyncio.create_task(price.wait_for_first(60))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    at_hand = record()
    await store.publish(at_hand)
    await waiting
    assert price.price(EUR) == at_hand


@pytest.mark.parametrize("told", ["fewer than 2 sources agree", None], ids=["none", "nothing"])
async def test_a_first_price_that_will_not_come_soon_is_not_waited_for(told: str | None) -> None:
    store = Faulty(settings())
    price = PriceCache(store, settings(), LOG)
    if told is not None:
        await store.put_feed_status(FeedStatus(utc_now(), "sandbox", told, ()))
    async with asyncio.timeout(30):
        await price.wait_for_first(60 if told else 0.1)
    assert isinstance(price.price(EUR), PriceUnavailable)


async def test_a_price_at_hand_that_has_ended_on_the_store_ends() -> None:
    store = Faulty(settings())
    price = PriceCache(store, settings(), LOG)
    at_hand = record()
    await store.publish(at_hand)
    await price.refresh()
    store.fault = stale(at_hand.as_of - timedelta(seconds=1), at_hand.expires_at)  # of a record before it
    await price.refresh()
    assert price.price(EUR) == at_hand
    store.fault = stale(at_hand.as_of, at_hand.expires_at)
    await price.refresh()
    assert isinstance(price.price(EUR), PriceStale)


@pytest.mark.parametrize(("seconds", "is_sold"), [(22, True), (23, False)])
async def test_a_doubt_that_had_ended_before_it_was_seen_ends_the_price_before_it(seconds: int, is_sold: bool) -> None:
    """The store could not be asked for more than a tick; what has ended there meanwhile is none that is at hand."""
    at_hand = record()
    clock = FakeClock(at_hand.made_at)
    store = Faulty(settings(), clock)
    price = PriceCache(store, settings(), LOG, clock)
    await store.publish(at_hand)
    await price.refresh()
    clock.at += timedelta(seconds=seconds)
    store.fault = stale(at_hand.as_of - timedelta(seconds=10), at_hand.expires_at - timedelta(seconds=40))
    await price.refresh()
    assert isinstance(price.price(EUR), PriceRecord) is is_sold


async def test_a_fault_of_one_look_at_the_store_does_not_end_the_looking(caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty(settings())
    store.fault = ZeroDivisionError("a fault")
    price = PriceCache(store, settings(price_refresh_seconds=0.001), LOG)
    looking = asyncio.create_task(price.refresh_forever())
    async with asyncio.timeout(5):
        while "the price could not be looked up" not in caplog.text:
            await asyncio.sleep(0.001)
        store.fault = None
        await store.publish(record())
        while not isinstance(price.price(EUR), PriceRecord):
            await asyncio.sleep(0.001)
    looking.cancel()


def problem_in(price: PriceCache, currency: Currency) -> tuple[str, str, int | None]:
    """Code, detail and Retry-After of why nothing is sold for the currency."""
    problem = price.price(currency)
    assert isinstance(problem, DeskError)
    return problem.code, problem.detail, problem.retry_after_seconds


async def test_a_currency_that_is_missing_is_sold_at_the_record_before_while_that_is_valid() -> None:
    before = record(ttl=60)
    clock = FakeClock(before.as_of)
    store = MemoryPriceStore(settings(), clock)
    price = PriceCache(store, settings(), LOG, clock)
    await store.publish(before)
    await price.refresh()
    clock.seconds += 15
    newer = without(later(before, 15), missing=[GBP])
    await store.publish(newer)
    await price.refresh()
    assert [price.price(each) for each in ALL] == [newer, before, newer]
    clock.seconds += 44.9
    assert price.price(GBP) == before
    clock.seconds += 0.1
    assert problem_in(price, GBP)[:2] == ("price_unavailable", f"There is no price in GBP: {NOT_QUOTED}.")
    assert price.price(EUR) == newer
    await price.check()
    clock.seconds += 15
    assert {problem_in(price, each)[0] for each in ALL} == {"price_stale"}


async def test_a_currency_that_is_missing_is_not_sold_at_a_record_before_one_that_was_not_seen() -> None:
    """That one may have doubted the price."""
    before = record(ttl=60)
    clock = FakeClock(before.as_of)
    store = MemoryPriceStore(settings(), clock)
    price = PriceCache(store, settings(), LOG, clock)
    newer = without(later(before, 30), missing=[GBP])
    for each, seconds in ((before, 0), (newer, 30)):
        clock.seconds += seconds
        await store.publish(each)
        for _ in range(2):
            await price.refresh()
    assert problem_in(price, GBP)[0] == "price_unavailable"
    assert price.price(EUR) == newer


@pytest.mark.parametrize("missing", [[], [USD]], ids=["there", "missing"])
async def test_a_currency_that_is_unsettled_is_refused_at_once_until_a_record_settles_it(
    missing: list[Currency],
) -> None:
    before = record(ttl=60)
    clock = FakeClock(before.as_of)
    store = MemoryPriceStore(settings(), clock)
    price = PriceCache(store, settings(), LOG, clock)
    doubted = without(later(before, 15), missing=missing, unsettled=[GBP])
    gone = without(later(before, 30), missing=[GBP])
    settled = later(before, 45)
    for each, seconds in ((before, 0), (doubted, 15), (gone, 15)):
        clock.seconds += seconds
        await store.publish(each)
        await price.refresh()
        if each is doubted:
            assert problem_in(price, GBP) == ("price_unsettled", f"The price is not sold at yet: GBP {JUMPED}.", 16)
            assert [price.price(EUR), price.price(USD)] == [doubted, before if missing else doubted]
    assert problem_in(price, GBP)[0] == "price_unavailable"  # not at the price that was doubted
    clock.seconds += 15
    await store.publish(settled)
    await price.refresh()
    assert [price.price(each) for each in ALL] == [settled] * 3


@pytest.mark.parametrize(
    ("seconds", "retry_after"), [(0, 16), (0.5, 16), (1, 15), (14, 2), (14.9, 2), (15, 16), (31, 15)]
)
async def test_clients_are_told_to_come_back_after_the_next_tick(seconds: float, retry_after: int) -> None:
    doubted = without(record(ttl=60), unsettled=ALL)
    ticked_at = doubted.as_of + timedelta(seconds=4)  # its oldest quote was that old
    at_hand = signed(replace(doubted, decided_at=ticked_at))
    clock = FakeClock(ticked_at)
    store = MemoryPriceStore(settings(), clock)
    await store.publish(at_hand)
    price = PriceCache(store, settings(), LOG, clock)
    await price.refresh()
    clock.at += timedelta(seconds=seconds)
    assert [problem_in(price, each)[2] for each in ALL] == [retry_after] * 3
    clock.seconds += 60  # the record has ended: the ticks go on
    assert problem_in(price, EUR)[::2] == ("price_stale", retry_after)


async def test_an_ended_price_on_the_store_ends_those_before_it_and_not_those_after() -> None:
    before = record(ttl=60)
    clock = FakeClock(before.as_of)
    store = Faulty(settings(), clock)
    price = PriceCache(store, settings(), LOG, clock)
    newer = without(later(before, 1), missing=[GBP])
    for each in (before, newer):
        await store.publish(each)
        await price.refresh()
    store.fault = stale(before.as_of, before.expires_at)
    await price.refresh()
    assert [isinstance(price.price(each), PriceRecord) for each in ALL] == [True, False, True]
    store.fault = stale(newer.as_of, newer.expires_at)
    await price.refresh()
    assert {problem_in(price, each)[0] for each in ALL} == {"price_stale"}


async def test_a_start_with_unsettled_prices_only_does_not_wait_for_them() -> None:
    store = Faulty(settings())
    await store.publish(without(record(), unsettled=ALL))
    await store.put_feed_status(FeedStatus(utc_now(), "sandbox", f"EUR, GBP, USD: {JUMPED}", ()))
    price = PriceCache(store, settings(), LOG)
    async with asyncio.timeout(30):
        await price.wait_for_first(60)
    assert problem_in(price, EUR)[0] == "price_unsettled"


async def test_the_other_feed_s_price_is_none() -> None:
    store = MemoryPriceStore(settings())
    await store.publish(record())
    price = PriceCache(store, settings(price_feed="live"), LOG)
    await price.refresh()
    problem = price.price(EUR)
    assert isinstance(problem, PriceUnavailable)
    assert problem.detail.endswith("no price of this desk: feed: must be live, the feed of this desk.")
