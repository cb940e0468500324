"""Orders over HTTP: how one is read from a request, written into a 201, and documented."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from fastapi import Response

from buydesk.errors import (
    ExposureCapExceeded,
    IdempotencyKeyReused,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PriceStale,
    PriceUnavailable,
    RequestTimeout,
    UnsupportedMediaType,
)
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.openapi import error_responses, response_example
from buydesk.http.requests import Request, require_json, require_utf8, single_parameters
from buydesk.http.responses import JSONBytesResponse, encode
from buydesk.money import CURRENCIES, CURRENCIES_TEXT, Currency, parse_amount, parse_currency
from buydesk.orders.model import (
    ANONYMOUS,
    KEY_CHARS_MAX,
    NewOrder,
    Order,
    OrderDocument,
    new_order_id,
    order_document,
    parse_key,
)
from buydesk.reading import Repeated, decode_json, is_text

_MEMBERS = dict.fromkeys(("currency", "amount", "client_order_id")).keys()
# However it is spelt, and whatever stands around it.
_MEANT_AS_KEY = re.compile(r"in?demp|clientorderid")


async def read_order(request: Request) -> NewOrder:
    """The order a request asks for, from its query or from its JSON body, under a fresh id.

    Raises PayloadTooLarge, UnsupportedMediaType and InvalidRequest, which names every member that is wrong.
    """
    body = await request.body()
    if request.query:
        if body:
            raise InvalidRequest.of("body", "must be empty when the order is in the query")
        members: dict[str, object] = dict(single_parameters(request, _MEMBERS))
    else:
        if body or "content-type" in request.headers:
            require_json(request)
        members = _members(body)
    reasons: list[tuple[str, str]] = []
    currency = _read(members, "currency", _currency, reasons)
    amount_cents = _read(members, "amount", _amount_cents, reasons)
    key = _read(members, "client_order_id", _key, reasons) if members.get("client_order_id") is not None else None
    header_key = _header_key(request, reasons)
    wrong_names = misspelt_keys(request.headers)
    reasons += [(name, "is not read: the header for a key is Idempotency-Key") for name in wrong_names]
    if key is not None and header_key is not None and key != header_key and not reasons:
        reasons.append(("client_order_id", "differs from the Idempotency-Key header"))
    if not members.keys() <= _MEMBERS:
        reasons += [(name, "is not a member of an order") for name in members if name not in _MEMBERS]
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return NewOrder(new_order_id(), ANONYMOUS, key if key is not None else header_key, currency, amount_cents)


def _read(
    members: Mapping[str, object], member: str, reader: Callable[[object], Any], reasons: list[tuple[str, str]]
) -> Any:
    """The member through its reader, or one more reason."""
    try:
        if member not in members:
            raise ValueError("is missing")
        return reader(members[member])
    except ValueError as error:
        reasons.append((member, str(error)))


def _members(body: bytes) -> dict[str, object]:
    if not body:
        raise InvalidRequest.of("body", 'is empty; send {"currency": "EUR", "amount": "69.00"} or use the query')

    require_utf8(body)
    try:
        document = decode_json(body.decode("utf-8"))
    except Repeated as error:
        raise InvalidRequest.of_all([(name, "is given more than once") for name in error.names]) from error
    except ValueError as error:
        raise InvalidRequest.of("body", f"is not JSON: {error}"[:200]) from error
    except RecursionError as error:
        raise InvalidRequest.of("body", "is nested too deeply") from error
    if not isinstance(document, dict):
        raise InvalidRequest.of("body", "must be a JSON object")
    return document


def _currency(value: object) -> Currency:
    return parse_currency(value if isinstance(value, str) else "")


def _amount_cents(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_amount(value)


def _key(value: object) -> str:
    if not is_text(value):
        raise ValueError("must be text")
    return parse_key(value)


def _header_key(request: Request, reasons: list[tuple[str, str]]) -> str | None:
    """The Idempotency-Key header, bare or as the quoted string of RFC 8941, in which \\ stands before " and \\."""
    if "idempotency-key" not in request.headers:
        return None
    values = request.headers.get_all("idempotency-key")
    text = values[0]
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = re.sub(r'\\(["\\])', r"\1", text[1:-1])
    try:
        if len(values) > 1:
            raise ValueError("is given more than once")
        return parse_key(text)
    except ValueError as error:
        reasons.append(("Idempotency-Key", str(error)))
        return None


def misspelt_keys(headers: Iterable[str]) -> list[str]:
    """Those of the names, in lower case, that are meant to be a key's header and are not: unread, they would let a
    request that is sent again buy again."""
    return [
        name
        for name in headers
        if ("dem" in name or "order" in name)  # most have neither, which is quicker to see
        and name != "idempotency-key"
        and _MEANT_AS_KEY.search(name.replace("-", "").replace("_", ""))
    ]


class PlacedDocument(msgspec.Struct, frozen=True, gc=False):
    """The body of a 201."""

    data: str
    order: OrderDocument


def created(order: Order, orders_url: str, *, is_replay: bool) -> Response:
    """The 201 of an order, which can be read below `orders_url`."""
    shown = order_document(order)
    headers = [(b"location", f"{orders_url}{order.id}".encode())]
    if is_replay:
        headers.append((b"idempotent-replayed", b"true"))
    return JSONBytesResponse(
        encode(PlacedDocument(f"Order was placed for {shown.currency}:{shown.amount}", shown)), 201, headers
    )


_EXAMPLE = PlacedDocument("Order was placed for EUR:69.00", order_document(EXAMPLE_ORDER))
_KEY_SCHEMA = {"type": "string", "pattern": f"^[!-~]{{1,{KEY_CHARS_MAX}}}$"}
_AMOUNT = "0 < amount < 1,000,000,000, a whole number of cents."
_AMOUNT_TEXT_SCHEMA = {
    "type": "string",
    "pattern": r"^([1-9][0-9]{0,8}(\.[0-9]{1,2})?|0\.(0[1-9]|[1-9][0-9]?))$",
    "description": f"{_AMOUNT} Any other JSON number of this value in at most 32 characters will do too.",
    "examples": ["69.00"],
}
_AMOUNT_SCHEMA = {
    "description": _AMOUNT,
    "oneOf": [
        {"type": "number", "minimum": 0.01, "exclusiveMaximum": 1_000_000_000, "multipleOf": 0.01},
        _AMOUNT_TEXT_SCHEMA,
    ],
    "examples": ["69.00"],
}
# In any letter case, but not GBp.
_CODE_PATTERNS = {code: "".join(f"[{letter}{letter.lower()}]" for letter in code) for code in CURRENCIES}
_CODE_PATTERNS["GBP"] = "[Gg][Bb]P|g[Bb]p|Gbp"
_CURRENCY_SCHEMA = {
    "type": "string",
    "pattern": f"^({'|'.join(_CODE_PATTERNS.values())})$",
    "description": f"{CURRENCIES_TEXT}, in any letter case; but `GBp`, which means pence elsewhere, is refused.",
    "examples": ["EUR"],
}
PLACE_ORDER = {
    "tags": ["orders"],
    "summary": "Place a buy order",
    "description": "By query or by JSON body. With a key (header or `client_order_id`) it may be sent again without "
    "harm: the same request gives the same answer, and is placed once.",
    "parameters": [
        {"name": "currency", "in": "query", "schema": _CURRENCY_SCHEMA},
        {"name": "amount", "in": "query", "schema": _AMOUNT_TEXT_SCHEMA, "example": "69"},
        {"name": "client_order_id", "in": "query", "schema": _KEY_SCHEMA},
        {"name": "Idempotency-Key", "in": "header", "schema": _KEY_SCHEMA},
    ],
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["currency", "amount"],
                    "additionalProperties": False,
                    "properties": {
                        "currency": _CURRENCY_SCHEMA,
                        "amount": _AMOUNT_SCHEMA,
                        "client_order_id": _KEY_SCHEMA | {"type": ["string", "null"]},
                    },
                },
                "example": {"currency": "USD", "amount": 600},
            }
        }
    },
    "responses": response_example("The order is stored, on disk.", _EXAMPLE, 201)
    | error_responses(
        InvalidRequest,
        IdempotencyKeyReused,
        PayloadTooLarge,
        UnsupportedMediaType,
        RequestTimeout,
        ExposureCapExceeded,
        PriceUnavailable,
        PriceStale,
        LedgerUnavailable,
        Overloaded,
        OutcomeUnknown,
    ),
}
