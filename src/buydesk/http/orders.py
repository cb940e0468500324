"""Orders over HTTP: how one is read from a request, written into a 201, and documented."""

import re
from collections.abc import Iterable

import msgspec
from fastapi import Response

from buydesk.clients.model import Caller
from buydesk.errors import (
    ClientCapExceeded,
    DailyLimitExceeded,
    DeskError,
    ExposureCapExceeded,
    IdempotencyKeyReused,
    InvalidRequest,
    LedgerUnavailable,
    OrderTooLarge,
    OutcomeUnknown,
    Overloaded,
    Paused,
    PriceMoved,
    PriceStale,
    PriceUnavailable,
    PriceUnsettled,
    RequestTimeout,
)
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.members import Member, Reasons, body_schema, json_members, read_members, unknown
from buydesk.http.openapi import operation, response_example
from buydesk.http.requests import Request, require_json, single_parameters
from buydesk.http.responses import JSONBytesResponse, MsgspecResponse, encode
from buydesk.money import (
    CURRENCIES,
    CURRENCIES_TEXT,
    Currency,
    format_cents,
    parse_amount,
    parse_btc,
    parse_currency,
    parse_rate_limit,
)
from buydesk.orders.model import (
    KEY_PATTERN,
    METADATA_BYTES_MAX,
    METADATA_MEMBERS_MAX,
    REFERENCE_CHARS_MAX,
    NewOrder,
    Order,
    Outcome,
    Placeable,
    PricedOrder,
    Refused,
    metadata_text,
    new_order_id,
    parse_key,
    parse_reference,
)
from buydesk.orders.pricing import Guard, placeable_order
from buydesk.orders.representations import PlacedDocument1, dry_run_document, placed_document
from buydesk.reading import LINE_PATTERN, is_text
from buydesk.times import utc_now

# However it is spelt, and whatever stands around it.
_MEANT_AS_KEY = re.compile(r"in?demp|clientorderid")


async def read_order(request: Request) -> tuple[NewOrder, Guard]:
    """The order a request asks for, from its query or from its JSON body, under a fresh id, and the worst price at
    which it is to be placed.

    Raises PayloadTooLarge, UnsupportedMediaType and InvalidRequest, which names every member that is wrong.
    """
    body = await request.body()
    if request.query:
        if body:
            raise InvalidRequest.of("body", "must be empty when the order is in the query")
        given: dict[str, object] = dict(single_parameters(request, [each.name for each in _PARAMETERS]))
    else:
        if body or "content-type" in request.headers:
            require_json(request)
        if not body:
            raise InvalidRequest.of("body", 'is empty; send {"currency": "EUR", "amount": "69.00"} or use the query')
        given = json_members(body)
    reasons: Reasons = []
    found = read_members(given, _MEMBERS, reasons)
    key, header_key = found["client_order_id"], _header_key(request, reasons)
    wrong_names = misspelt_keys(dict.fromkeys(request.headers))
    reasons += [(name, "is not read: the header for a key is Idempotency-Key") for name in wrong_names]
    if key is not None and header_key is not None and key != header_key and not reasons:
        reasons.append(("client_order_id", "differs from the Idempotency-Key header"))
    guard = Guard(found["max_exchange_rate"], found["min_bitcoin_amount"])
    if {"max_exchange_rate", "min_bitcoin_amount"} <= given.keys():
        reasons.append(("min_bitcoin_amount", "may not stand beside max_exchange_rate: give one of them"))
    reasons += unknown(given, _MEMBERS, "an order")
    if reasons:
        raise InvalidRequest.of_all(reasons)
    key = header_key if key is None else key
    order = NewOrder(
        new_order_id(),
        request.caller.client,
        key,
        found["currency"],
        found["amount"],
        found["reference"],
        found["metadata"],
        dry_run=found["dry_run"],
    )
    return order, guard


def _currency(value: object) -> Currency:
    return parse_currency(value if isinstance(value, str) else "")


def _amount_cents(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_amount(value)


def _rate_limit(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_rate_limit(value)


def _least_bitcoin(value: object) -> int | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    if not (satoshi := parse_btc(value)):
        raise ValueError("must be greater than 0")
    return satoshi


def _dry_run(value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _key(value: object) -> str | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    return parse_key(value)


def _reference(value: object) -> str | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    return parse_reference(value)


def _metadata(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(map(is_text, value.values())):
        raise ValueError("must be an object whose members are text")
    return metadata_text(value)


def _header_key(request: Request, reasons: list[tuple[str, str]]) -> str | None:
    """The Idempotency-Key header, bare or as the quoted string of RFC 8941, in which \\ stands before " and \\."""
    if "idempotency-key" not in request.headers:
        return None
    values = request.headers.getall("idempotency-key")
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
    order: PlacedDocument1  # or a later one


def created(order: Order, orders_url: str, *, is_replay: bool, status: int = 201) -> Response:
    """The 201 of an order, which can be read below `orders_url`; a 200 with the same body for a dry run that finds it
    stored."""
    shown = placed_document(order)
    headers = [(b"location", f"{orders_url}{order.id}".encode())]
    if is_replay:
        headers.append((b"idempotent-replayed", b"true"))
    return JSONBytesResponse(
        encode(PlacedDocument(f"Order was placed for {shown.currency}:{shown.amount}", shown)), status, headers
    )


def placeable(order: Order) -> Response:
    """The 200 of a dry run that would be placed."""
    return MsgspecResponse(_placeable_document(order))


def _placeable_document(order: Order) -> dict[str, object]:
    what = f"{order.currency}:{format_cents(order.amount_cents)}"
    return {"data": f"Order would be placed for {what}", "order": dry_run_document(order)}


def outcome_for(caller: Caller, item: PricedOrder, outcome: Outcome, *, livemode: bool) -> Outcome:
    """The outcome as the caller may see it: a client's dry runs are judged without the desk's cap, or it could halve
    its way to what others have bought, at no cost. The ledger looks at that cap last, so what it refuses is placeable
    otherwise. The moment is ours in both cases, so that it does not tell them apart."""
    is_placeable = isinstance(outcome, Placeable) or (
        isinstance(outcome, Refused) and isinstance(outcome.problem, ExposureCapExceeded)
    )
    if caller.is_anybody or not item.order.dry_run or not is_placeable:
        return outcome
    return Placeable(placeable_order(item, utc_now(), livemode))


def refusal(problem: DeskError, caller: Caller) -> DeskError:
    """The problem as the caller may see it: what others have bought of the desk is told to no client."""
    if isinstance(problem, ExposureCapExceeded) and not caller.is_anybody:
        return ExposureCapExceeded("The desk cannot sell as much any more. A smaller order may still fit.")
    return problem


_EXAMPLE = PlacedDocument("Order was placed for EUR:69.00", placed_document(EXAMPLE_ORDER))
_KEY_SCHEMA = {"type": "string", "pattern": KEY_PATTERN}
_ANY_OTHER_NUMBER = "Any other JSON number of this value in at most 32 characters will do too."
_AMOUNT_RULE = "0 < amount < 1,000,000,000, a whole number of cents."
AMOUNT_TEXT_SCHEMA = {
    "type": "string",
    "pattern": r"^([1-9][0-9]{0,8}(\.[0-9]{1,2})?|0\.(0[1-9]|[1-9][0-9]?))$",
    "description": f"{_AMOUNT_RULE} {_ANY_OTHER_NUMBER}",
    "examples": ["69.00"],
}
_AMOUNT_SCHEMA = {
    "description": _AMOUNT_RULE,
    "oneOf": [
        {"type": "number", "minimum": 0.01, "exclusiveMaximum": 1_000_000_000, "multipleOf": 0.01},
        AMOUNT_TEXT_SCHEMA,
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
_CURRENCY = Member("currency", _currency, _CURRENCY_SCHEMA, is_required=True)
_AMOUNT = Member("amount", _amount_cents, _AMOUNT_SCHEMA, is_required=True)
_KEY = Member("client_order_id", _key, _KEY_SCHEMA | {"type": ["string", "null"]})
_REFERENCE_SCHEMA = {"type": "string", "minLength": 1, "maxLength": REFERENCE_CHARS_MAX, "pattern": LINE_PATTERN}
_REFERENCE = Member("reference", _reference, _REFERENCE_SCHEMA | {"type": ["string", "null"]})
_METADATA_SCHEMA = {
    "type": ["object", "null"],
    "maxProperties": METADATA_MEMBERS_MAX,
    "propertyNames": {"pattern": f"{LINE_PATTERN}|^$"},
    "additionalProperties": {"type": "string", "pattern": f"{LINE_PATTERN}|^$"},
    "description": f"At most {METADATA_BYTES_MAX} bytes as JSON.",
    "examples": [{"shop": "12"}],
}
_METADATA = Member("metadata", _metadata, _METADATA_SCHEMA)
_MAX_RATE = Member(
    "max_exchange_rate",
    _rate_limit,
    {
        "description": "The highest `exchange_rate` at which it is placed, with at most 8 decimal places.",
        "oneOf": [
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100_000_000_000},
            {
                "type": "string",
                "pattern": r"^(0\.(?=[0-9]*[1-9])[0-9]{1,8}|[1-9][0-9]{0,10}(\.[0-9]{1,8})?)$",
                "description": _ANY_OTHER_NUMBER,
            },
            {"type": "null"},
        ],
        "examples": ["20700.00"],
    },
)
_MIN_BITCOIN = Member(
    "min_bitcoin_amount",
    _least_bitcoin,
    {
        "type": ["string", "null"],
        "pattern": r"^(0\.(?=[0-9]*[1-9])[0-9]{1,8}|[1-9][0-9]{0,11}(\.[0-9]{1,8})?)$",
        "description": "The least `bitcoin_amount` for which it is placed. Not beside `max_exchange_rate`.",
        "examples": ["0.003"],
    },
)
_DRY_RUN = Member(
    "dry_run",
    _dry_run,
    {
        "type": ["boolean", "null"],
        "description": "Whether only to say what would become of the order now: nothing is stored, and no key taken.",
    },
    default=False,
)
_MEMBERS = (_CURRENCY, _AMOUNT, _KEY, _REFERENCE, _METADATA, _MAX_RATE, _MIN_BITCOIN, _DRY_RUN)
# Documented as if none were needed: an order may come in the body instead.
_PARAMETERS = (
    _CURRENCY._replace(is_required=False),
    _AMOUNT._replace(schema=AMOUNT_TEXT_SCHEMA, is_required=False),
    _KEY._replace(schema=_KEY_SCHEMA),
    _REFERENCE._replace(schema=_REFERENCE_SCHEMA, description="The client's own: an end customer, or an invoice."),
)
_BODY_EXAMPLE = {"currency": "USD", "amount": 600, "reference": "invoice 7", "metadata": {"shop": "12"}}
PLACE_ORDER = operation(
    "Place a buy order",
    ("The order is stored, on disk.", _EXAMPLE),
    errors=(
        IdempotencyKeyReused,
        RequestTimeout,
        OrderTooLarge,
        ClientCapExceeded,
        DailyLimitExceeded,
        ExposureCapExceeded,
        PriceMoved,
        Paused,
        PriceUnavailable,
        PriceStale,
        PriceUnsettled,
        LedgerUnavailable,
        Overloaded,
        OutcomeUnknown,
    ),
    description="By query or by JSON body. With a key (header or `client_order_id`) it may be sent again without "
    "harm: the same request gives the same answer, and is placed once. `reference` and `metadata` are the client's own "
    "words, kept with the order and shown with it. `max_exchange_rate` or `min_bitcoin_amount`, one of them, keeps it "
    "from being placed at a worse price; what is stored with its key is answered whatever they say. With `dry_run` "
    "it is judged as any order, and not placed.",
    tag="orders",
    query=_PARAMETERS,
    parameters=[{"name": "Idempotency-Key", "in": "header", "schema": _KEY_SCHEMA}],
    body={
        "schema": body_schema(_MEMBERS) | {"not": {"required": [_MAX_RATE.name, _MIN_BITCOIN.name]}},
        "example": _BODY_EXAMPLE,
    },
    is_body_required=False,
    status=201,
)
PLACE_ORDER["responses"] |= response_example(
    "A dry run: the order as it would be placed, or as it is stored with its key.",
    _placeable_document(EXAMPLE_ORDER),
    200,
)
