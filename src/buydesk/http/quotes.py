"""Quotes over HTTP: how one is asked for, written and documented."""

import uuid

import msgspec
from fastapi import Response

from buydesk.errors import (
    InvalidRequest,
    LedgerUnavailable,
    PriceStale,
    PriceUnavailable,
    PriceUnsettled,
    RequestTimeout,
)
from buydesk.http.examples import EXAMPLE_QUOTE
from buydesk.http.members import Member, Reasons, body_schema, json_members, read_members, unknown
from buydesk.http.openapi import operation
from buydesk.http.order_members import AMOUNT, CURRENCY, REFERENCE
from buydesk.http.requests import Request, require_json
from buydesk.http.responses import JSONBytesResponse, encode
from buydesk.money import Currency, NotMoney, format_btc, format_cents, format_rate, parse_bitcoin
from buydesk.orders.quotes import OrderQuote
from buydesk.orders.quoting import AskedQuote
from buydesk.reading import Number
from buydesk.settings.types import QUOTE_SECONDS_MAX, QUOTE_SECONDS_MIN
from buydesk.times import format_time


async def read_asked(request: Request, seconds_max: int) -> AskedQuote:
    """The quote that a request asks for, to be valid for `seconds_max` at the most.

    Raises PayloadTooLarge, UnsupportedMediaType and InvalidRequest, which names every member that is wrong.
    """
    require_json(request)
    given = json_members(await request.body())
    reasons: Reasons = []
    found = read_members(given, _MEMBERS, reasons)
    reasons += unknown(given, _MEMBERS, "a quote")
    if given.keys() >= _SIDES:
        reasons.append(("bitcoin_amount", "must not be given beside amount: the price makes one of the other"))
    if given.keys().isdisjoint(_SIDES):
        reasons.append(("amount", "is missing; or bitcoin_amount, for a quote of bitcoin"))
    valid_seconds = found["valid_seconds"]
    if valid_seconds is not None and valid_seconds > seconds_max:
        reasons.append(("valid_seconds", f"must be at most {seconds_max} here"))
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return AskedQuote(
        request.caller.client,
        found["currency"],
        found["amount"],
        found["bitcoin_amount"],
        found["reference"],
        valid_seconds,
        seconds_max,
    )


class QuoteDocument(msgspec.Struct, frozen=True, gc=False):
    """The body of a 201."""

    id: uuid.UUID
    quote: str
    currency: Currency
    amount: str
    bitcoin_amount: str
    exchange_rate: str
    market_rate: str
    markup_bp: int
    price_id: uuid.UUID
    quoted_at: str
    expires_at: str
    reference: str | None


def quote_document(quote: OrderQuote) -> QuoteDocument:
    """The quote as its client sees it."""
    return QuoteDocument(
        quote.id,
        quote.token,
        quote.currency,
        format_cents(quote.amount_cents),
        format_btc(quote.satoshi),
        format_rate(quote.rate_e8),
        format_rate(quote.market_rate_e8),
        quote.markup_bp,
        quote.price_id,
        format_time(quote.quoted_at),
        format_time(quote.expires_at),
        quote.reference,
    )


def quoted(quote: OrderQuote) -> Response:
    """The 201 of a quote. It is nowhere else to be read."""
    return JSONBytesResponse(encode(quote_document(quote)), 201)


def _satoshi(value: object) -> int:
    if not isinstance(value, str):
        raise NotMoney("must be a number, or a number as text")
    return parse_bitcoin(value)


def _seconds(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Number) or not value.isdecimal() or len(value) > 3 or int(value) < QUOTE_SECONDS_MIN:
        raise ValueError(f"must be a whole number from {QUOTE_SECONDS_MIN}")
    return int(value)


_BITCOIN_SCHEMA = {
    "description": "0 < bitcoin_amount, with at most 8 places. The amount is the least that buys as much.",
    "oneOf": [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 21_000_000},
        {"type": "string", "pattern": r"^([1-9][0-9]{0,6}(\.[0-9]{1,8})?|0\.[0-9]{1,8})$"},
    ],
    "examples": ["0.05000000"],
}
_BITCOIN_AMOUNT = Member("bitcoin_amount", _satoshi, _BITCOIN_SCHEMA)
_SECONDS_SCHEMA = {"type": ["integer", "null"], "minimum": QUOTE_SECONDS_MIN, "maximum": QUOTE_SECONDS_MAX}
_VALID_SECONDS = Member("valid_seconds", _seconds, _SECONDS_SCHEMA)
_MEMBERS = (CURRENCY, AMOUNT._replace(is_required=False), _BITCOIN_AMOUNT, REFERENCE, _VALID_SECONDS)
_SIDES = {"amount", "bitcoin_amount"}
QUOTE = operation(
    "Ask for a quote",
    ("What an order would be, and until when the desk places it so.", quote_document(EXAMPLE_QUOTE)),
    errors=(RequestTimeout, PriceUnavailable, PriceStale, PriceUnsettled, LedgerUnavailable),
    description="For an `amount` to pay or a `bitcoin_amount` to get. `POST /place_order/` with the token, `quote`, "
    "places exactly what the quote says until it expires, whatever the price is by then. A quote takes no room below "
    "a cap.",
    tag="orders",
    body={"schema": body_schema(_MEMBERS), "example": {"currency": "EUR", "bitcoin_amount": "0.05000000"}},
    status=201,
)
