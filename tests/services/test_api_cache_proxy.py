"""api_cache_proxy over real TCP, on a store in memory."""

import asyncio
import html
import json
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from buydesk.backends.memory.prices import MemoryPriceStore
from buydesk.backends.memory.rates import MemoryRateStore
from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.redis.prices import RedisPriceStore
from buydesk.backends.remote import RemotePriceStore
from buydesk.http.prices import RECORD_BYTES_MAX
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.prices.coindesk import currentprice, currentprice_of
from buydesk.prices.documents import document_of, record_document
from buydesk.prices.model import SOURCES, FeedStatus, PriceRecord, Quote, RejectedQuote, Rule, SourceStatus
from buydesk.services.api_cache_proxy import STATE_BYTES_MAX, create_app
from buydesk.settings.model import Settings
from tests import builders
from tests.builders import JUMPED, NOT_QUOTED, signed, without
from tests.clock import FakeClock
from tests.problems import assert_problem
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
TTL = timedelta(seconds=60)
AUTHORIZED = {"Authorization": "Bearer the-token"}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON)


@pytest.fixture
def settings() -> Settings:
    return builders.settings(publishing_tokens="the-token")


@pytest.fixture
def store(settings: Settings, clock: FakeClock) -> MemoryPriceStore:
    return MemoryPriceStore(settings, clock)


@pytest.fixture
async def client(settings: Settings, store: MemoryPriceStore, clock: FakeClock) -> AsyncIterator[httpx2.AsyncClient]:
    reporter = Reporter("api_cache_proxy", MemoryReportStore(settings), settings)
    async with (
        served(create_app(settings, store, MemoryRateStore(), reporter, clock)) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        yield client


def record(as_of: datetime = NOON, **members: Any) -> PriceRecord:
    rates_e8 = {Currency.EUR: 20_572_78 * 10**6, Currency.GBP: 18_271_51 * 10**6, Currency.USD: 21_712_51 * 10**6 + 1}
    half_e8 = 78 * 10**6
    made = PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + TTL,
        feed="sandbox",
        rates_e8=rates_e8,
        used=tuple(
            Quote(source, currency, rate_e8 - half_e8, rate_e8 + half_e8, as_of)
            for currency, rate_e8 in rates_e8.items()
            for source in SOURCES["sandbox"][:2]
        ),
        rejected=(
            RejectedQuote("sandbox-3", "gave no answer"),
            RejectedQuote("sandbox-4", "is older than 30 s", Quote("sandbox-4", Currency.EUR, 10**12, 10**12, as_of)),
        ),
        replayed_from=datetime(2023, 3, 9, tzinfo=UTC),
        rule=Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2),
        decided_at=as_of + TTL / 60,
        bids_e8={currency: rate_e8 - half_e8 for currency, rate_e8 in rates_e8.items()},
        asks_e8={currency: rate_e8 + half_e8 for currency, rate_e8 in rates_e8.items()},
    )
    return signed(replace(made, **members))


def state(at: datetime = NOON, **members: Any) -> FeedStatus:
    rates = {Currency.EUR: 20_572_78 * 10**6}
    sources = (
        SourceStatus("one", "", mids_e8=rates, quoted_at=at),
        SourceStatus("another", "gave no answer", 3, resting_until=at + TTL, last_error="gave no answer", failed_at=at),
    )
    return replace(FeedStatus(at, "sandbox", "only 1 of at least 2 sources agree", sources), **members)


@pytest.mark.parametrize("path", ["/record", "/v1/bpi/currentprice.json", "/v1/bpi/currentprice/GBP.json"])
@pytest.mark.parametrize(
    ("published", "code"),
    [
        (None, "price_unavailable"),
        (record(NOON - 2 * TTL), "price_stale"),
        (without(record(), unsettled=list(Currency)), "price_unsettled"),
    ],
)
async def test_who_is_refused_is_asked_to_come_back_after_the_next_tick(
    client: httpx2.AsyncClient, store: MemoryPriceStore, path: str, published: PriceRecord | None, code: str
) -> None:
    if published is not None:
        await store.publish(published)
    answer = await client.get(path)
    assert assert_problem(answer, 503, code)
    assert answer.headers["retry-after"] == "5", "nobody knows when the next tick is"
    await store.put_feed_status(state(NOON - timedelta(seconds=4)))
    assert (await client.get(path)).headers["retry-after"] == "12", "11 s to it, and one on the way"


def assert_invalid(response: httpx2.Response, *members: str) -> str:
    problem = assert_problem(response, 422, "invalid_request")
    assert tuple(error["member"] for error in problem["errors"]) == members
    return str(problem["detail"])


async def test_record_has_its_own_members_and_those_of_coindesk(
    client: httpx2.AsyncClient, store: MemoryPriceStore
) -> None:
    current = record()
    await store.publish(current)
    response = await client.get("/record")
    assert response.status_code == 200
    document = response.json()
    assert document == record_document(current) | currentprice(current)
    assert len(document) == len(record_document(current)) + len(currentprice(current)), "no member hides another"
    assert document["rates"]["USD"] == "21712.51000001"
    assert document["bpi"]["USD"]["rate_float"] == 21712.51
    assert document["time"]["updatedISO"] == "2026-01-31T12:00:00+00:00"


async def test_retired_document_has_the_retired_members_only(
    client: httpx2.AsyncClient, store: MemoryPriceStore
) -> None:
    current = record()
    await store.publish(current)
    response = await client.get("/v1/bpi/currentprice.json")
    assert response.status_code == 200
    assert response.text == json.dumps(currentprice(current), separators=(",", ":"))


async def test_record_shows_its_proof(client: httpx2.AsyncClient, store: MemoryPriceStore) -> None:
    await store.publish(record())
    document = (await client.get("/record")).json()
    noon = "2026-01-31T12:00:00.123456Z"
    assert document["sources"] == {
        "used": [
            {"source": source, "currency": currency, "bid": bid, "ask": ask, "observed_at": noon}
            for currency, bid, ask in (
                ("EUR", "20572.00", "20573.56"),
                ("GBP", "18270.73", "18272.29"),
                ("USD", "21711.73000001", "21713.29000001"),
            )
            for source in SOURCES["sandbox"][:2]
        ],
        "rejected": [
            {"source": "sandbox-3", "reason": "gave no answer", "quote": None},
            {
                "source": "sandbox-4",
                "reason": "is older than 30 s",
                "quote": {
                    "source": "sandbox-4",
                    "currency": "EUR",
                    "bid": "10000.00",
                    "ask": "10000.00",
                    "observed_at": noon,
                },
            },
        ],
    }
    assert document["rule"] == {
        "version": 2,
        "quote_age_seconds_max": 30,
        "spread_bp_max": 100,
        "deviation_bp_max": 100,
        "sources_min": 2,
    }
    assert document["decided_at"] == "2026-01-31T12:00:01.123456Z"
    assert document["signature"]["key"] == builders.settings().accepted_price_keys[0]
    assert document["signature"]["expires_at"] == document["expires_at"]


@pytest.mark.parametrize(
    "code", ["EUR", "eur", "gBp", "USD", "eur.json", "EUR.JSON", "CHF", "", "eu", "%65ur", "%FF", "*"]
)
async def test_retired_document_of_one_currency_in_any_letter_case(
    client: httpx2.AsyncClient, store: MemoryPriceStore, code: str
) -> None:
    current = record()
    await store.publish(current)
    currency = {"eur": Currency.EUR, "gbp": Currency.GBP, "usd": Currency.USD, "%65ur": Currency.EUR}.get(code.lower())
    for slash in ("", "/"):
        response = await client.get(f"/v1/bpi/currentprice/{code}.json{slash}")
        if currency is not None:
            assert response.status_code == 200
            assert response.text == json.dumps(currentprice_of(current, currency), separators=(",", ":"))
        else:
            assert_problem(response, 404, "not_found")


async def test_unknown_currency_is_told_the_known_ones_also_without_a_price(client: httpx2.AsyncClient) -> None:
    problem = assert_problem(await client.get("/v1/bpi/currentprice/CHF.json"), 404, "not_found")
    assert problem["detail"] == "There are prices in EUR, GBP, USD only."
    assert_problem(await client.get("/v1/bpi/currentprice/usd.json"), 503, "price_unavailable")


def ticker(address: str) -> list[str]:
    """A program as they were written for the retired service, with the standard library only."""

    def fetched(path: str) -> Any:
        with urllib.request.urlopen(f"{address}/v1/bpi/{path}", timeout=5) as answer:  # noqa: S310
            return json.load(answer)

    everything, euro = fetched("currentprice.json"), fetched("currentprice/EUR.json")
    lines = [f"{everything['chartName']} at {everything['time']['updateduk']}"]
    for code, price in everything["bpi"].items():
        lines.append(f"{html.unescape(price['symbol'])} {price['rate']} ({price['description']}, {code})")
    updated = datetime.fromisoformat(euro["time"]["updatedISO"])
    dollars_a_euro = euro["bpi"]["USD"]["rate_float"] / euro["bpi"]["EUR"]["rate_float"]
    exact = float(euro["bpi"]["EUR"]["rate"].replace(",", ""))
    return [*lines, f"{updated:%H:%M} {dollars_a_euro:.4f} {exact:.2f}"]


async def test_program_written_for_the_retired_service_needs_only_another_address(
    client: httpx2.AsyncClient, store: MemoryPriceStore
) -> None:
    await store.publish(record())
    assert await asyncio.to_thread(ticker, str(client.base_url).rstrip("/")) == [
        "Bitcoin at Jan 31, 2026 at 12:00 GMT",
        "$ 21,712.51 (United States Dollar, USD)",
        "£ 18,271.51 (British Pound Sterling, GBP)",
        "€ 20,572.78 (Euro, EUR)",
        "12:00 1.0554 20572.78",
    ]


ALL = tuple(Currency)
NEEDED = {
    "/v1/bpi/currentprice.json": ("EUR", "GBP", "USD"),
    "/v1/bpi/currentprice/eur.json": ("EUR", "USD"),
    "/v1/bpi/currentprice/gbp.json": ("GBP", "USD"),
    "/v1/bpi/currentprice/usd.json": ("USD",),
}


@pytest.mark.parametrize("gone", ALL)
@pytest.mark.parametrize("is_doubted", [False, True], ids=["missing", "unsettled"])
async def test_retired_documents_are_refused_unless_all_of_their_currencies_have_a_price(
    client: httpx2.AsyncClient, store: MemoryPriceStore, gone: Currency, is_doubted: bool
) -> None:
    current = without(record(), **{"unsettled" if is_doubted else "missing": [gone]})
    await store.publish(current)
    for path, needed in NEEDED.items():
        response = await client.get(path)
        if gone not in needed:
            assert response.status_code == 200
            continue
        problem = assert_problem(response, 503, "price_unsettled" if is_doubted else "price_unavailable")
        told = f"The price is not sold at yet: {gone} {JUMPED}."
        assert problem["detail"] == (told if is_doubted else f"There is no price in {gone}: {NOT_QUOTED}.")
        assert response.headers["Retry-After"] == "5"
    answer = await client.get("/record")
    assert answer.status_code == 200
    assert answer.json() == record_document(current), "and no members of the retired document"
    assert gone not in answer.json()["rates"]


async def test_record_says_why_a_currency_has_no_price(client: httpx2.AsyncClient, store: MemoryPriceStore) -> None:
    await store.publish(without(record(), missing=[Currency.GBP], unsettled=[Currency.USD]))
    document = (await client.get("/record")).json()
    assert document["rates"] == {"EUR": "20572.78"}
    assert document["bids"] == {"EUR": "20572.00", "USD": "21711.73000001"}
    assert document["asks"] == {"EUR": "20573.56", "USD": "21713.29000001"}
    assert document["missing"] == {"GBP": NOT_QUOTED}
    assert document["unsettled"] == {"USD": {"rate": "21712.51000001", "reason": JUMPED}}


async def test_record_without_any_price_to_sell_at_is_a_problem_that_brings_it(
    client: httpx2.AsyncClient, store: MemoryPriceStore, settings: Settings
) -> None:
    doubted = without(record(), missing=[Currency.GBP], unsettled=[Currency.EUR, Currency.USD])
    assert (await add(client, record_document(doubted))).status_code == 200
    response = await client.get("/record")
    problem = assert_problem(response, 503, "price_unsettled")
    assert response.headers["Retry-After"] == "5"
    assert problem["currencies"] == {"EUR": JUMPED, "USD": JUMPED}
    assert problem["as_of"] == "2026-01-31T12:00:00.123456Z"
    assert problem["record"] == record_document(doubted)
    far = RemotePriceStore(str(client.base_url).rstrip("/"), settings)
    assert await far.latest() == doubted
    await far.close()


async def test_record_whose_missing_currency_has_a_price_by_the_rule_is_refused(client: httpx2.AsyncClient) -> None:
    lying = signed(replace(without(record(), missing=[Currency.GBP]), used=record().used))
    assert_invalid(await add(client, record_document(lying)), "record")
    hiding = without(record(), unsettled=ALL)
    wrong = {each: replace(rate, rate_e8=(rate.rate_e8 or 0) + 1) for each, rate in hiding.unsettled.items()}
    assert_invalid(await add(client, record_document(signed(replace(hiding, unsettled=wrong)))), "record")


PRICE_PATHS = ["/record", "/v1/bpi/currentprice.json", "/v1/bpi/currentprice/eur.json", "/history"]


@pytest.mark.parametrize("path", [*PRICE_PATHS, *(f"{path}/" for path in PRICE_PATHS)])
async def test_price_may_be_read_by_any_page_and_kept_by_nobody(
    client: httpx2.AsyncClient, store: MemoryPriceStore, path: str
) -> None:
    await store.publish(record())
    response = await client.get(path, params={} if "history" in path else {"_": "1706702400"})
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("path", PRICE_PATHS[:3])
async def test_without_a_valid_price_there_is_a_problem_and_never_an_old_number(
    client: httpx2.AsyncClient, store: MemoryPriceStore, clock: FakeClock, path: str
) -> None:
    response = await client.get(path)
    assert_problem(response, 503, "price_unavailable")
    assert response.headers["Retry-After"] == "5"
    await store.publish(record())
    clock.at = NOON + TTL
    response = await client.get(path)
    problem = assert_problem(response, 503, "price_stale")
    assert response.headers["Retry-After"] == "5"
    assert (problem["as_of"], problem["expires_at"]) == ("2026-01-31T12:00:00.123456Z", "2026-01-31T12:01:00.123456Z")


async def test_history_is_of_the_last_hour_unless_asked_for_more(
    client: httpx2.AsyncClient, store: MemoryPriceStore
) -> None:
    records = [record(NOON - timedelta(minutes=minutes)) for minutes in (1439, 60, 59, 0)]
    for each in records:
        await store.publish(each)
    documents = [document_of(each.point()) for each in records]
    assert (await client.get("/history")).json() == {"data": documents[2:]}
    assert (await client.get("/history/?minutes=1")).json() == {"data": documents[3:]}
    response = await client.get("/history", params={"minutes": 1440, "points": 1000})
    assert response.json() == {"data": documents}
    assert response.headers["Content-Type"] == "application/json"
    assert documents[0] == {
        "id": str(records[0].id),
        "as_of": "2026-01-30T12:01:00.123456Z",
        "rates": {"EUR": "20572.78", "GBP": "18271.51", "USD": "21712.51000001"},
        "replayed_from": "2023-03-09T00:00:00.000000Z",
    }


@pytest.mark.parametrize(("points", "expected"), [(None, 240), (1, 1), (100, 100), (250, 250), (1000, 500)])
async def test_history_has_so_many_points_at_the_most_and_the_latest_is_one_of_them(
    client: httpx2.AsyncClient, store: MemoryPriceStore, points: int | None, expected: int
) -> None:
    records = [record(NOON - timedelta(hours=1) / 500 * number) for number in range(499, -1, -1)]
    for each in records:
        await store.publish(each)
    data = (await client.get("/history", params={} if points is None else {"points": points})).json()["data"]
    assert len(data) == expected
    assert data == [document_of(each) for each in await store.history(60, points or 240)]
    assert data[-1]["id"] == str(records[-1].id)


@pytest.mark.parametrize(("name", "maximum"), [("minutes", 1440), ("points", 1000)])
@pytest.mark.parametrize("value", ["0", "1441", "-1", "x", "", "1.5", "9" * 5000, "\uff11", "1e2", " 1"])
async def test_history_takes_whole_minutes_of_a_day_and_so_many_points(
    client: httpx2.AsyncClient, name: str, maximum: int, value: str
) -> None:
    detail = assert_invalid(await client.get("/history", params={name: value}), name)
    assert detail == f"{name}: must be a whole number from 1 to {maximum}"


async def test_history_refuses_parameters_it_does_not_know_or_has_twice(client: httpx2.AsyncClient) -> None:
    assert_invalid(await client.get("/history?minutes=1&hours=1"), "hours")
    assert_invalid(await client.get("/history?minutes=1&minutes=2"), "minutes")


async def add(client: httpx2.AsyncClient, document: object, query: str = "") -> httpx2.Response:
    return await client.post("/add/" + query, json=document, headers=AUTHORIZED)


async def test_published_record_is_the_price_at_once(client: httpx2.AsyncClient) -> None:
    document = record_document(record())
    response = await add(client, document)
    assert (response.status_code, response.json()) == (200, document)
    latest = (await client.get("/record")).json()
    assert {name: latest[name] for name in document} == document


async def test_add_works_without_its_slash_and_takes_a_whole_answer_of_record(
    client: httpx2.AsyncClient, store: MemoryPriceStore
) -> None:
    current = record()
    await store.publish(current)
    answer = (await client.get("/record")).json()
    response = await client.post("/add", json=answer, headers=AUTHORIZED)
    assert (response.status_code, response.json()) == (200, record_document(current))


@pytest.mark.parametrize(
    ("ttl_seconds", "expires_at"), [(1, NOON + TTL / 60), (60, NOON + TTL), (61, NOON + TTL), (3600, NOON + TTL)]
)
async def test_ttl_shortens_a_record_and_never_extends_it(
    client: httpx2.AsyncClient, store: MemoryPriceStore, ttl_seconds: int, expires_at: datetime
) -> None:
    made = record()
    response = await add(client, record_document(made), f"?ttl={ttl_seconds}")
    assert response.json() == record_document(replace(made, expires_at=expires_at))
    assert (await store.latest()).expires_at == expires_at


async def test_ttl_counts_from_now_and_not_from_the_observation(client: httpx2.AsyncClient, clock: FakeClock) -> None:
    clock.at = NOON + TTL / 2
    response = await add(client, record_document(record()), "?ttl=10")
    assert response.json()["expires_at"] == "2026-01-31T12:00:40.123456Z"


async def test_publishing_again_never_extends_a_shortened_record(client: httpx2.AsyncClient, clock: FakeClock) -> None:
    document = record_document(record())
    await add(client, document, "?ttl=5")
    clock.at = NOON + timedelta(seconds=4)
    assert (await add(client, document, "?ttl=60")).status_code == 200
    assert (await client.get("/record")).json()["expires_at"] == "2026-01-31T12:00:05.123456Z"


@pytest.mark.parametrize("ttl", ["0", "3601", "-5", "1.5", "x", ""])
async def test_ttl_outside_an_hour_is_refused_and_nothing_published(client: httpx2.AsyncClient, ttl: str) -> None:
    detail = assert_invalid(await add(client, record_document(record()), f"?ttl={ttl}"), "ttl")
    assert detail == "ttl: must be a whole number from 1 to 3600"
    assert_problem(await client.get("/record"), 503, "price_unavailable")


async def test_older_record_is_refused_as_superseded(client: httpx2.AsyncClient, store: MemoryPriceStore) -> None:
    await store.publish(record())
    problem = assert_problem(await add(client, record_document(record(NOON - TTL / 2))), 409, "price_superseded")
    assert problem["decided_at"] == "2026-01-31T12:00:01.123456Z"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another"}, {"Authorization": "the-token"}])
async def test_publishing_needs_the_internal_token(
    client: httpx2.AsyncClient, store: MemoryPriceStore, headers: dict[str, str]
) -> None:
    response = await client.post("/add/", json=record_document(record()), headers=headers)
    assert_problem(response, 401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert list(await store.history(60, 1)) == []


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_publishing_takes_json_only(client: httpx2.AsyncClient, content_type: str | None) -> None:
    headers = AUTHORIZED if content_type is None else AUTHORIZED | {"Content-Type": content_type}
    body = json.dumps(record_document(record())).encode()
    assert_problem(await client.post("/add/", content=body, headers=headers), 415, "unsupported_media_type")


async def test_publishing_refuses_a_body_that_is_too_large(client: httpx2.AsyncClient) -> None:
    document = record_document(record()) | {"padding": "x" * RECORD_BYTES_MAX}
    assert_problem(await add(client, document), 413, "payload_too_large")


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"[" * 100_000, b"\xff", b'"\\ud800"'])
async def test_body_that_is_not_json_is_refused(client: httpx2.AsyncClient, body: bytes) -> None:
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    told = assert_invalid(await client.post("/add/", content=body, headers=headers), "body")
    assert told.startswith(("body: is not JSON", "body: is nested too deeply"))


Change = Callable[[dict[str, Any]], object]


def put(value: object, *path: str | int) -> Change:
    """Puts a value at a path of the document."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


def drop(*path: str | int) -> Change:
    """Removes what is at a path of the document."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop("id"), "id: is missing"),
        (put("7", "id"), "id: must be a UUID"),
        (put(7, "id"), "id: must be text"),
        (put(None, "as_of"), "as_of: must be text"),
        (put("yesterday", "as_of"), "as_of: must be an ISO 8601 time"),
        (put("2026-01-31T12:00:00", "as_of"), "as_of: must be an ISO 8601 time"),
        (put("0001-01-01T00:00:00+23:59", "as_of"), "as_of: must be an ISO 8601 time"),
        (put("2026-01-31T12:00:10.123457Z", "as_of"), "as_of: must not lie more than 10 s in the future"),
        (drop("expires_at"), "expires_at: is missing"),
        (put("2026-01-31T12:00:00.123456Z", "expires_at"), "expires_at: must be later than as_of"),
        (put("2026-01-31T12:01:00.123457Z", "expires_at"), "expires_at: must not be more than 60 s after as_of"),
        (put("9999-12-31T23:59:59Z", "expires_at"), "expires_at: must not be more than 60 s after as_of"),
        (put("market", "feed"), "feed: must be sandbox or live"),
        (put([], "feed"), "feed: must be text"),
        (put("live", "feed"), "feed: must be sandbox, the feed of this desk"),
        (put(1678320000, "replayed_from"), "replayed_from: must be text"),
        (put([], "rates"), "rates: must be an object"),
        (drop("rates", "GBP"), "record: the signature is not one of this record"),
        (put(18271.51, "rates", "GBP"), "rates.GBP: must be text"),
        (put("0", "rates", "GBP"), "rates.GBP: must be an exchange rate between"),
        (put("NaN", "rates", "GBP"), "rates.GBP: must be plain decimal text"),
        (put(None, "sources"), "sources: must be an object"),
        (drop("sources", "used"), "sources.used: is missing"),
        (put({}, "sources", "used"), "sources.used: must be a list"),
        (put("one", "sources", "used", 0), "sources.used.0: must be an object"),
        (put("CHF", "sources", "used", 0, "currency"), "sources.used.0.currency: must be one of EUR, GBP, USD"),
        (put(5, "sources", "used", 0, "currency"), "sources.used.0.currency: must be text"),
        (put("-1", "sources", "used", 0, "bid"), "sources.used.0.bid: must be plain decimal text"),
        (drop("sources", "used", 0, "ask"), "sources.used.0.ask: is missing"),
        (put("noon", "sources", "used", 0, "observed_at"), "sources.used.0.observed_at: must be an ISO 8601 time"),
        (put(5, "sources", "used", 0, "source"), "sources.used.0.source: must be text"),
        (put([], "sources", "rejected", 0), "sources.rejected.0: must be an object"),
        (drop("sources", "rejected", 0, "reason"), "sources.rejected.0.reason: is missing"),
        (put([], "sources", "rejected", 1, "quote"), "sources.rejected.1.quote: must be an object"),
        (put("0", "sources", "rejected", 1, "quote", "ask"), "sources.rejected.1.quote.ask: must be an exchange rate"),
        (put(5, "rule"), "rule: must be an object"),
        (drop("rule", "spread_bp_max"), "rule.spread_bp_max: is missing"),
        (put("1", "rule", "version"), "rule.version: must be an integer"),
        (put("later", "decided_at"), "decided_at: must be an ISO 8601 time"),
    ],
)
async def test_document_that_is_no_record_of_this_desk_is_refused_naming_the_member(
    client: httpx2.AsyncClient, change: Change, complaint: str
) -> None:
    document = json.loads(json.dumps(record_document(record())))
    change(document)
    detail = assert_invalid(await add(client, document), complaint.partition(":")[0])
    assert detail.startswith(complaint)
    assert_problem(await client.get("/record"), 503, "price_unavailable")


@pytest.mark.parametrize("document", [[], None, 5, "record"])
async def test_json_that_is_no_object_is_refused(client: httpx2.AsyncClient, document: object) -> None:
    # httpx2 sends no body at all for None.
    body, headers = json.dumps(document).encode(), AUTHORIZED | {"Content-Type": "application/json"}
    assert assert_invalid(await client.post("/add/", content=body, headers=headers), "record") == (
        "record: must be an object"
    )


async def test_refusal_does_not_repeat_a_long_value(client: httpx2.AsyncClient) -> None:
    for member in ("id", "as_of", "feed"):
        response = await add(client, record_document(record()) | {member: "x" * 200_000})
        assert_invalid(response, member)
        assert len(response.content) < 1000


async def tell(client: httpx2.AsyncClient, document: object, path: str = "/sources/") -> httpx2.Response:
    return await client.post(path, json=document, headers=AUTHORIZED)


async def test_what_was_told_of_the_sources_is_shown_to_anybody(client: httpx2.AsyncClient) -> None:
    assert assert_problem(await client.get("/sources"), 503, "price_unavailable")["detail"].startswith(
        "The price sources have no status"
    )
    for path in ("/sources/", "/sources"):
        told = document_of(state(at=NOON - TTL * len(path)))
        response = await tell(client, told, path)
        assert (response.status_code, response.json()) == (200, told)
        for read in ("/sources", "/sources/"):
            response = await client.get(read)
            assert (response.status_code, response.json()) == (200, told)
            assert response.headers["Access-Control-Allow-Origin"] == "*"
            assert response.headers["Cache-Control"] == "no-store"
    assert told["sources"] == [
        {
            "source": "one",
            "detail": "",
            "failures": 0,
            "mids": {"EUR": "20572.78"},
            "quoted_at": "2026-01-31T11:52:00.123456Z",
            "resting_until": None,
            "last_error": "",
            "failed_at": None,
        },
        {
            "source": "another",
            "detail": "gave no answer",
            "failures": 3,
            "mids": None,
            "quoted_at": None,
            "resting_until": "2026-01-31T11:53:00.123456Z",
            "last_error": "gave no answer",
            "failed_at": "2026-01-31T11:52:00.123456Z",
        },
    ]


async def test_telling_of_the_sources_needs_the_internal_token_json_and_few_bytes(client: httpx2.AsyncClient) -> None:
    document = document_of(state())
    response = await client.post("/sources/", json=document)
    assert_problem(response, 401, "unauthorized")
    response = await client.post("/sources/", content=json.dumps(document).encode(), headers=AUTHORIZED)
    assert_problem(response, 415, "unsupported_media_type")
    assert_problem(await tell(client, document | {"padding": "x" * STATE_BYTES_MAX}), 413, "payload_too_large")
    assert_invalid(await tell(client, document, "/sources/?at=now"), "at")
    headers = AUTHORIZED | {"Content-Type": "application/json"}
    assert_invalid(await client.post("/sources/", content=b"{", headers=headers), "body")
    assert_problem(await client.get("/sources"), 503, "price_unavailable")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop("at"), "at: is missing"),
        (put("now", "at"), "at: must be an ISO 8601 time"),
        (put("2026-01-31T12:00:10.123457Z", "at"), "at: must not lie more than 10 s in the future"),
        (put("live", "feed"), "feed: must be sandbox, the feed of this desk"),
        (put(None, "feed"), "feed: must be text"),
        (put(None, "problem"), "problem: must be text"),
        (put({}, "sources"), "sources: must be a list"),
        (put("one", "sources", 0), "sources.0: must be an object"),
        (drop("sources", 1, "detail"), "sources.1.detail: is missing"),
        (put("3", "sources", 1, "failures"), "sources.1.failures: must be an integer"),
        (put([], "sources", 0, "mids"), "sources.0.mids: must be an object"),
        (put("0", "sources", 0, "mids", "EUR"), "sources.0.mids.EUR: must be an exchange rate"),
        (put(5, "sources", 0, "quoted_at"), "sources.0.quoted_at: must be text"),
        (put("soon", "sources", 1, "resting_until"), "sources.1.resting_until: must be an ISO 8601 time"),
    ],
)
async def test_document_that_is_no_state_of_this_desk_is_refused_naming_the_member(
    client: httpx2.AsyncClient, change: Change, complaint: str
) -> None:
    document = json.loads(json.dumps(document_of(state())))
    change(document)
    detail = assert_invalid(await tell(client, document), complaint.partition(":")[0])
    assert detail.startswith(complaint)
    assert_problem(await client.get("/sources"), 503, "price_unavailable")


async def test_other_methods_are_told_both_that_the_sources_take(client: httpx2.AsyncClient) -> None:
    response = await client.put("/sources", json={})
    assert assert_problem(response, 405, "method_not_allowed")["allow"] == "GET, HEAD, POST"
    assert response.headers["Allow"] == "GET, HEAD, POST"
    assert (await client.post("/history")).headers["Allow"] == "GET, HEAD"
    assert (await client.get("/add")).headers["Allow"] == "POST"


async def test_service_is_ready_while_its_store_is_there(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_without_redis_every_answer_says_so(settings: Settings) -> None:
    reporter = Reporter("api_cache_proxy", MemoryReportStore(settings), settings)
    redis: Redis = Redis.from_url(f"redis://127.0.0.1:{free_port()}", retry=None)
    store = RedisPriceStore(redis, settings)
    async with (
        served(create_app(settings, store, MemoryRateStore(), reporter)) as url,
        httpx2.AsyncClient(base_url=url, trust_env=False) as client,
    ):
        now = datetime.now(UTC)
        responses = await asyncio.gather(
            client.get("/record"),
            client.get("/v1/bpi/currentprice.json"),
            client.get("/v1/bpi/currentprice/EUR.json"),
            client.get("/history"),
            client.get("/sources"),
            add(client, record_document(record(now))),
            tell(client, document_of(state(now))),
        )
        for response in responses:
            assert_problem(response, 503, "price_board_unavailable")
            assert response.headers["Retry-After"] == "1"
        problem = assert_problem(await client.get("/readyz"), 503, "not_ready")
        assert [part["what"] for part in problem["missing"]] == ["prices"]
        assert (await client.get("/livez")).status_code == 200
    await store.close()


async def test_unknown_parameters_are_refused_where_no_page_of_a_browser_adds_its_own(
    client: httpx2.AsyncClient,
) -> None:
    assert "x" in assert_invalid(await client.get("/sources?x=1"), "x")
    assert "x" in assert_invalid(await client.get("/history?x=1"), "x")


async def test_a_record_with_a_byte_order_mark_is_told_so(client: httpx2.AsyncClient) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(record_document(record())).encode()
    response = await client.post("/add/", content=content, headers=AUTHORIZED | {"Content-Type": "application/json"})
    assert assert_invalid(response, "body") == "body: starts with a byte order mark; send plain UTF-8"


async def test_documentation_has_every_path_with_examples_of_success_and_of_each_problem(
    client: httpx2.AsyncClient,
) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    codes = {
        ("/record", "get"): {"price_unavailable", "price_stale", "price_unsettled", "price_board_unavailable"},
        ("/v1/bpi/currentprice.json", "get"): {
            "price_unavailable",
            "price_stale",
            "price_unsettled",
            "price_board_unavailable",
        },
        ("/v1/bpi/currentprice/{code}.json", "get"): {
            "not_found",
            "price_unavailable",
            "price_stale",
            "price_unsettled",
            "price_board_unavailable",
        },
        ("/history", "get"): {"invalid_request", "price_board_unavailable"},
        ("/sources/", "get"): {"invalid_request", "price_unavailable", "price_board_unavailable"},
        ("/sources/", "post"): {
            "unauthorized",
            "invalid_request",
            "payload_too_large",
            "unsupported_media_type",
            "price_board_unavailable",
        },
        ("/add/", "post"): {
            "unauthorized",
            "invalid_request",
            "payload_too_large",
            "unsupported_media_type",
            "price_superseded",
            "price_board_unavailable",
        },
    }
    for (path, method), expected in codes.items():
        responses = paths[path][method]["responses"]
        assert responses["200"]["content"]["application/json"]["example"]
        problems = [
            responses[status]["content"]["application/problem+json"]["examples"]
            for status in responses
            if status != "200"
        ]
        assert {code for examples in problems for code in examples} == expected | {"internal_error", "overloaded"}
