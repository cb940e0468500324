"""api_cache_proxy: the price, for the other services and for clients; the only service that uses the price store."""

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Response

from buydesk.bounds import in_slices
from buydesk.errors import (
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    PriceStale,
    PriceStoreUnavailable,
    PriceSuperseded,
    PriceUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from buydesk.http.app import Service, service_app
from buydesk.http.openapi import INTERNAL, answer, number_parameter, problems
from buydesk.http.requests import Request, require_json, require_token, require_utf8, single_parameters, whole_number
from buydesk.http.responses import MsgspecResponse
from buydesk.money import CURRENCIES, RATE_SCALE, Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.verification import require_proven
from buydesk.prices.coindesk import currentprice, currentprice_of
from buydesk.prices.documents import (
    feed_status_document,
    feed_status_from,
    point_document,
    record_document,
    record_from,
)
from buydesk.prices.model import (
    HISTORY_MINUTES_MAX,
    HISTORY_POINTS_MAX,
    FeedStatus,
    NotARecord,
    PriceRecord,
    PriceStore,
    Quote,
    RejectedQuote,
    Rule,
    Signature,
    SourceStatus,
    require_plausible_status,
)
from buydesk.settings import PRICE_TTL_SECONDS_MAX, Settings, tokens
from buydesk.times import utc_now

HISTORY_MINUTES = 60
HISTORY_POINTS = 240
RECORD_BYTES_MAX = 256 * 1024
STATE_BYTES_MAX = 64 * 1024
# Nothing on the way may keep a price for longer than it is valid; browsers may read it from any page, as CoinDesk's.
_PRICE_HEADERS = {"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"}

_Read = TypeVar("_Read")


def create_app(
    settings: Settings, store: PriceStore, reporter: Reporter, now: Callable[[], datetime] = utc_now
) -> Service:
    """The service. It closes none of what it is given."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield

    app = service_app("api_cache_proxy", "The price of a bitcoin", {"prices": store.check}, reporter, lifespan)
    accepted = tokens(settings.publishing_tokens)

    async def record(_: Request) -> Response:
        latest = await store.latest()
        return MsgspecResponse(record_document(latest) | currentprice(latest), headers=_PRICE_HEADERS)

    async def coindesk(_: Request) -> Response:
        return MsgspecResponse(currentprice(await store.latest()), headers=_PRICE_HEADERS)

    async def coindesk_of(request: Request) -> Response:
        currency = CURRENCIES.get(request.parameter.upper())
        if currency is None:
            raise NotFound(f"There are prices in {', '.join(CURRENCIES)} only.")
        return MsgspecResponse(currentprice_of(await store.latest(), currency), headers=_PRICE_HEADERS)

    async def history(request: Request) -> Response:
        asked = single_parameters(request, ("minutes", "points"))
        minutes = whole_number(asked, "minutes", HISTORY_MINUTES_MAX) or HISTORY_MINUTES
        points = whole_number(asked, "points", HISTORY_POINTS_MAX) or HISTORY_POINTS
        found = await store.history(minutes, points)
        return MsgspecResponse({"data": await in_slices(point_document, found)}, headers=_PRICE_HEADERS)

    async def sources(request: Request) -> Response:
        single_parameters(request, ())
        return MsgspecResponse(feed_status_document(await store.feed_status()), headers=_PRICE_HEADERS)

    async def add(request: Request) -> Response:
        require_token(request, accepted)
        require_json(request)
        ttl_seconds = whole_number(single_parameters(request, ("ttl",)), "ttl", PRICE_TTL_SECONDS_MAX)
        new = parse_record(await request.body(RECORD_BYTES_MAX), settings, now())
        if ttl_seconds is not None:
            new = new.shortened(timedelta(seconds=ttl_seconds), now())
        return MsgspecResponse(record_document(await store.publish(new)))

    async def put_sources(request: Request) -> Response:
        require_token(request, accepted)
        require_json(request)
        single_parameters(request, ())
        state = parse_state(await request.body(STATE_BYTES_MAX), settings, now())
        await store.put_feed_status(state)
        return MsgspecResponse(feed_status_document(state))

    app.add_direct_route("/record", "GET", record, _RECORD_OPERATION)
    app.add_direct_route("/v1/bpi/currentprice.json", "GET", coindesk, _COINDESK_OPERATION)
    app.add_direct_route("/v1/bpi/currentprice/{code}.json", "GET", coindesk_of, _COINDESK_OF_OPERATION)
    app.add_direct_route("/history", "GET", history, _HISTORY_OPERATION)
    app.add_direct_route("/add/", "POST", add, _ADD_OPERATION)
    app.add_direct_route("/sources/", "GET", sources, _SOURCES_OPERATION)
    app.add_direct_route("/sources/", "POST", put_sources, _PUT_SOURCES_OPERATION)
    return app


def parse_record(body: bytes, settings: Settings, now: datetime) -> PriceRecord:
    """The record that a JSON body is; raises InvalidRequest naming what is wrong.

    A record that is no proven price here (`require_proven`) is wrong too.
    """

    def proven(document: object) -> PriceRecord:
        new = record_from(document)
        require_proven(new, settings, now)
        return new

    return _parsed(body, proven)


def parse_state(body: bytes, settings: Settings, now: datetime) -> FeedStatus:
    """The state of the sources that a JSON body is; raises InvalidRequest naming what is wrong.

    One that is not plausible here (`require_plausible_status`) is wrong too.
    """

    def plausible(document: object) -> FeedStatus:
        state = feed_status_from(document)
        require_plausible_status(state, settings.price_feed, settings.clock_skew_seconds_max, now)
        return state

    return _parsed(body, plausible)


def _parsed(body: bytes, reader: Callable[[object], _Read]) -> _Read:
    require_utf8(body)
    try:
        return reader(msgspec.json.decode(body))
    except NotARecord as error:
        raise InvalidRequest.of(error.member, error.reason) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("body", "must be JSON") from error


_AT = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)


def _quotes(currency: Currency, *mids_cents: int) -> list[Quote]:
    """An example's quotes of a currency, one a source, each with 5 cents to either side."""
    cent_e8 = RATE_SCALE // 100
    return [
        Quote(source, currency, (mid - 5) * cent_e8, (mid + 5) * cent_e8, _AT)
        for source, mid in zip(("bitstamp", "coinbase", "kraken"), mids_cents, strict=True)
    ]


_FAR = replace(_quotes(Currency.EUR, 20_572_78, 20_572_78, 20_990_00)[2], source="gemini")
_EXAMPLE = PriceRecord(
    id=uuid.UUID("0b6f3a52-3c1e-4f0a-9a55-0d8a2f1c7e11"),
    as_of=_AT,
    expires_at=_AT + timedelta(seconds=60),
    feed="live",
    rates_e8={
        Currency.EUR: 20_572_78 * RATE_SCALE // 100,
        Currency.GBP: 18_271_51 * RATE_SCALE // 100,
        Currency.USD: 21_712_51 * RATE_SCALE // 100,
    },
    used=(
        *_quotes(Currency.EUR, 20_572_78, 20_570_12, 20_574_40),
        *_quotes(Currency.GBP, 18_271_51, 18_269_03, 18_272_95),
        *_quotes(Currency.USD, 21_712_51, 21_709_88, 21_714_07),
    ),
    rejected=(
        RejectedQuote("gemini", "is more than 1 % from the median", _FAR),
        RejectedQuote("bitfinex", "gave no answer within 5 s"),
    ),
    rule=Rule(quote_age_seconds_max=30, spread_bp_max=1000, deviation_bp_max=100, sources_min=2),
    decided_at=_AT + timedelta(seconds=1),
    signature=Signature(
        "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        "XukwEvSOq9VKI4P6P4pd7quaRtowdKBXtfr92cIZD55gQve2kTKecu9gFxz9xSez6yHPUO0fqVE3dlEAeKeZAg",
        expires_at=_AT + timedelta(seconds=60),
    ),
)
_STATE_EXAMPLE = FeedStatus(
    at=_AT + timedelta(seconds=1),
    feed="live",
    problem="",
    sources=(
        SourceStatus("kraken", "", mids_e8=_EXAMPLE.rates_e8, quoted_at=_AT),
        SourceStatus(
            "bitfinex",
            "gave no answer within 4 s",
            failures=3,
            resting_until=_AT + timedelta(seconds=16),
            last_error="gave no answer within 4 s",
            failed_at=_AT,
        ),
    ),
)
_NO_PRICE = problems(PriceUnavailable, PriceStale, PriceStoreUnavailable)
_RECORD_OPERATION = {
    "summary": "The current price record",
    "description": "Valid until `expires_at` and not longer; never an old price. With its proof: the quotes used and "
    "rejected, the rule and when it was applied. Beside the exact record it has the members of CoinDesk's retired "
    "document.",
    "responses": answer("The price", record_document(_EXAMPLE) | currentprice(_EXAMPLE)) | _NO_PRICE,
}
_COINDESK_OPERATION = {
    "summary": "The current price, exactly in the shape of CoinDesk's retired document",
    "responses": answer("The price", currentprice(_EXAMPLE)) | _NO_PRICE,
}
_COINDESK_OF_OPERATION = {
    "summary": "The current price in dollars and one currency, in the shape of CoinDesk's retired document",
    "parameters": [
        {
            "name": "code",
            "in": "path",
            "required": True,
            "description": "The currency, in any letter case.",
            "schema": {"type": "string", "enum": list(CURRENCIES)},
            "example": "EUR",
        }
    ],
    "responses": answer("The price", currentprice_of(_EXAMPLE, Currency.EUR)) | problems(NotFound) | _NO_PRICE,
}
_HISTORY_OPERATION = {
    "summary": "Past prices, oldest first",
    "description": "Those observed within the last `minutes`, the latest among them. When there are more than "
    "`points`: the last one of each span of `minutes` / `points`. Spans begin at multiples of their length: the points "
    "of a chart stay where they are from one look to the next.",
    "parameters": [
        number_parameter(
            "minutes", "Those observed within the last so many minutes.", HISTORY_MINUTES_MAX, HISTORY_MINUTES
        ),
        number_parameter("points", "So many at the most.", HISTORY_POINTS_MAX, HISTORY_POINTS),
    ],
    "responses": answer("The prices", {"data": [point_document(_EXAMPLE.point())]})
    | problems(InvalidRequest, PriceStoreUnavailable),
}
_SOURCES_OPERATION = {
    "summary": "How the price sources are",
    "description": "As they were when they were last asked: the last quotes of each, what is wrong with it, and until "
    "when it is left alone. `problem` says why there was no new price then.",
    "responses": answer("The state of all sources", feed_status_document(_STATE_EXAMPLE))
    | problems(InvalidRequest, PriceUnavailable, PriceStoreUnavailable),
}
_PUT_SOURCES_OPERATION = {
    "summary": "Tell how the price sources are (internal)",
    "description": "Needs `Authorization: Bearer <publishing token>`. Replaces the status before.",
    "security": INTERNAL,
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}, "example": feed_status_document(_STATE_EXAMPLE)}
        },
    },
    "responses": answer("The status as stored", feed_status_document(_STATE_EXAMPLE))
    | problems(Unauthorized, InvalidRequest, PayloadTooLarge, UnsupportedMediaType, PriceStoreUnavailable),
}
_ADD_OPERATION = {
    "summary": "Publish a price record (internal)",
    "description": "Needs `Authorization: Bearer <publishing token>`, and the record a signature by api_updater. "
    "Publishing the current record again is fine and changes nothing.",
    "security": INTERNAL,
    "parameters": [
        number_parameter(
            "ttl",
            "Seconds from now after which the record is not valid any more. Only ever shortens, and only a new record.",
            PRICE_TTL_SECONDS_MAX,
        )
    ],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "example": record_document(_EXAMPLE)}},
    },
    "responses": answer("The record as published", record_document(_EXAMPLE))
    | problems(
        Unauthorized, InvalidRequest, PayloadTooLarge, UnsupportedMediaType, PriceSuperseded, PriceStoreUnavailable
    ),
}
