"""api_cache_proxy: the price, for the other services and for clients; the only service that uses the price board."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from buydesk.coindesk import currentprice
from buydesk.errors import (
    InvalidRequest,
    PayloadTooLarge,
    PriceBoardUnavailable,
    PriceStale,
    PriceSuperseded,
    PriceUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from buydesk.money import RATE_SCALE, Currency
from buydesk.price_documents import record_document, record_from
from buydesk.prices import HISTORY_MINUTES_MAX, NotARecord, PriceBoard, PriceRecord, Quote, Rejection, require_plausible
from buydesk.reporting import Reporter
from buydesk.settings import Settings
from buydesk.times import utc_now
from buydesk.web import (
    FastJSON,
    Service,
    answer,
    encode,
    problems,
    read_body,
    require_json,
    require_token,
    service_app,
    single_parameters,
)

HISTORY_MINUTES = 60
TTL_SECONDS_MAX = 3600
RECORD_BYTES_MAX = 256 * 1024
# A day of records takes a while to write; other requests are answered between slices of this many.
_SLICE_RECORDS = 100
_WHOLE_NUMBER = re.compile(r"[0-9]{1,4}", re.ASCII)
# Nothing on the way may keep a price for longer than it is valid; browsers may read it from any page, as CoinDesk's.
_PRICE_HEADERS = {"Cache-Control": "no-store", "Access-Control-Allow-Origin": "*"}


def create_app(
    settings: Settings, board: PriceBoard, reporter: Reporter, now: Callable[[], datetime] = utc_now
) -> Service:
    """The service. It closes none of what it is given."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield

    app = service_app("api_cache_proxy", "The price of a bitcoin", {"prices": board.check}, reporter, lifespan)
    token = settings.internal_token.get_secret_value()

    async def record(_: Request) -> Response:
        latest = await board.latest()
        return FastJSON(record_document(latest) | currentprice(latest), headers=_PRICE_HEADERS)

    async def coindesk(_: Request) -> Response:
        return FastJSON(currentprice(await board.latest()), headers=_PRICE_HEADERS)

    async def history(request: Request) -> Response:
        minutes = _whole_number(single_parameters(request, ("minutes",)), "minutes", HISTORY_MINUTES_MAX)
        records = await board.history(HISTORY_MINUTES if minutes is None else minutes)
        return StreamingResponse(_history_json(records), media_type="application/json")

    async def add(request: Request) -> Response:
        require_token(request, token)
        require_json(request)
        ttl_seconds = _whole_number(single_parameters(request, ("ttl",)), "ttl", TTL_SECONDS_MAX)
        new = parse_record(await read_body(request, RECORD_BYTES_MAX), settings, now())
        if ttl_seconds is not None:
            new = new.shortened(timedelta(seconds=ttl_seconds), now())
        await board.publish(new)
        return FastJSON(record_document(new))

    app.add_hot_route("/record", "GET", record, _RECORD_OPERATION)
    app.add_hot_route("/v1/bpi/currentprice.json", "GET", coindesk, _COINDESK_OPERATION)
    app.add_documented_route("/history", "GET", history, _HISTORY_OPERATION)
    app.add_hot_route("/add/", "POST", add, _ADD_OPERATION)
    return app


def parse_record(body: bytes, settings: Settings, now: datetime) -> PriceRecord:
    """The record that a JSON body is; raises InvalidRequest naming what is wrong.

    A record that is not plausible here (`require_plausible`) is wrong too.
    """
    try:
        new = record_from(msgspec.json.decode(body))
        require_plausible(new, settings.price_feed, settings.price_ttl_seconds, settings.clock_skew_seconds_max, now)
    except NotARecord as error:
        raise InvalidRequest.of(error.member, error.reason) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("body", "must be JSON") from error
    return new


def _whole_number(parameters: Mapping[str, str], name: str, maximum: int) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    if not _WHOLE_NUMBER.fullmatch(text) or not 1 <= int(text) <= maximum:
        raise InvalidRequest.of(name, f"must be a whole number from 1 to {maximum}")
    return int(text)


async def _history_json(records: Sequence[PriceRecord]) -> AsyncIterator[bytes]:
    yield b'{"data":['
    for start in range(0, len(records), _SLICE_RECORDS):
        documents = map(record_document, records[start : start + _SLICE_RECORDS])
        yield (b"," if start else b"") + b",".join(map(encode, documents))
        await asyncio.sleep(0)
    yield b"]}"


_AT = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
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
    used=(Quote("kraken", Currency.EUR, 20_572_73 * RATE_SCALE // 100, 20_572_83 * RATE_SCALE // 100, _AT),),
    rejected=(Rejection("other", "gave no answer (TimeoutError)"),),
)
_NO_PRICE = problems(PriceUnavailable, PriceStale, PriceBoardUnavailable)
_RECORD_OPERATION = {
    "summary": "The current price record",
    "description": "Valid until `expires_at` and not longer; never an old price. Beside the exact record it has the "
    "members of CoinDesk's retired document.",
    "responses": answer("The price", record_document(_EXAMPLE) | currentprice(_EXAMPLE)) | _NO_PRICE,
}
_COINDESK_OPERATION = {
    "summary": "The current price, exactly in the shape of CoinDesk's retired document",
    "responses": answer("The price", currentprice(_EXAMPLE)) | _NO_PRICE,
}
_HISTORY_OPERATION = {
    "summary": "Past price records, oldest first",
    "parameters": [
        {
            "name": "minutes",
            "in": "query",
            "description": "Those observed within the last so many minutes.",
            "schema": {
                "type": "integer",
                "minimum": 1,
                "maximum": HISTORY_MINUTES_MAX,
                "default": HISTORY_MINUTES,
            },
        }
    ],
    "responses": answer("The records", {"data": [record_document(_EXAMPLE)]})
    | problems(InvalidRequest, PriceBoardUnavailable),
}
_ADD_OPERATION = {
    "summary": "Publish a price record (internal)",
    "description": "Needs `Authorization: Bearer <internal token>`. Publishing the current record again is fine and "
    "never makes it valid for longer.",
    "parameters": [
        {
            "name": "ttl",
            "in": "query",
            "description": "Seconds from now after which the record is not valid any more. Only ever shortens.",
            "schema": {"type": "integer", "minimum": 1, "maximum": TTL_SECONDS_MAX},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "example": record_document(_EXAMPLE)}},
    },
    "responses": answer("The record as published", record_document(_EXAMPLE))
    | problems(
        Unauthorized, InvalidRequest, PayloadTooLarge, UnsupportedMediaType, PriceSuperseded, PriceBoardUnavailable
    ),
}
