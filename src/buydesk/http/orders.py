"""Orders over HTTP: how one is read from a request, written into a 201, and documented."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
    QuoteExpired,
    QuoteInvalid,
    QuoteNotFound,
    RequestTimeout,
)
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.members import Reasons, body_schema, json_members, read_members, unknown
from buydesk.http.openapi import operation, response_example
from buydesk.http.order_members import KEY_SCHEMA, MAX_RATE, MEMBERS, MEMBERS_BY_QUOTE, MIN_BITCOIN, PARAMETERS
from buydesk.http.requests import Request, require_json, single_parameters
from buydesk.http.responses import JSONBytesResponse, MsgspecResponse, encode
from buydesk.money import format_cents
from buydesk.orders.model import NewOrder, Order, Outcome, Placeable, PricedOrder, Refused, new_order_id, parse_key
from buydesk.orders.pricing import NO_GUARD, Guard, placeable_order
from buydesk.orders.quotes import OrderQuote
from buydesk.orders.representations import PlacedDocument1, dry_run_document, placed_document
from buydesk.times import utc_now

# However it is spelt, and whatever stands around it.
_MEANT_AS_KEY = re.compile(r"in?demp|clientorderid")


async def read_order(request: Request, quote_of: Callable[[str, str], OrderQuote]) -> tuple[NewOrder, Guard]:
    """The order a request asks for, from its query or from its JSON body, under a fresh id, and the worst price at
    which it is to be placed. `quote_of` reads the token of a quote, for a client.

    Raises PayloadTooLarge, UnsupportedMediaType, InvalidRequest, which names every member that is wrong, and what
    `quote_of` raises.
    """
    body = await request.body()
    if request.query:
        if body:
            raise InvalidRequest.of("body", "must be empty when the order is in the query")
        given: dict[str, object] = dict(single_parameters(request, [each.name for each in PARAMETERS]))
    else:
        if body or "content-type" in request.headers:
            require_json(request)
        if not body:
            raise InvalidRequest.of("body", 'is empty; send {"currency": "EUR", "amount": "69.00"} or use the query')
        given = json_members(body)
    reasons: Reasons = []
    members = MEMBERS_BY_QUOTE if "quote" in given else MEMBERS
    found = read_members(given, members, reasons)
    key, header_key = found["client_order_id"], _header_key(request, reasons)
    wrong_names = misspelt_keys(dict.fromkeys(request.headers))
    reasons += [(name, "is not read: the header for a key is Idempotency-Key") for name in wrong_names]
    if key is not None and header_key is not None and key != header_key and not reasons:
        reasons.append(("client_order_id", "differs from the Idempotency-Key header"))
    reasons += unknown(given, members, "an order" if members is MEMBERS else "an order by quote")
    if {"max_exchange_rate", "min_bitcoin_amount"} <= given.keys() and members is MEMBERS:
        reasons.append(("min_bitcoin_amount", "may not stand beside max_exchange_rate: give one of them"))
    if reasons:
        raise InvalidRequest.of_all(reasons)
    key = header_key if key is None else key
    if members is MEMBERS_BY_QUOTE:
        return _by_quote(quote_of(found["quote"], request.caller.client), key, found), NO_GUARD
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
    return order, Guard(found["max_exchange_rate"], found["min_bitcoin_amount"])


def _by_quote(quote: OrderQuote, key: str | None, found: Mapping[str, Any]) -> NewOrder:
    """The order that is what the quote says. It has the quote's reference, or else one of its own."""
    reference = found["reference"] if quote.reference is None else quote.reference
    if found["reference"] not in (None, reference):
        raise InvalidRequest.of("reference", "differs from the quote's")
    return NewOrder(
        new_order_id(), quote.client, key, quote.currency, quote.amount_cents, reference, found["metadata"], quote=quote
    )


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
_BODY_EXAMPLE = {"currency": "USD", "amount": 600, "reference": "invoice 7", "metadata": {"shop": "12"}}
PLACE_ORDER = operation(
    "Place a buy order",
    ("The order is stored, on disk.", _EXAMPLE),
    errors=(
        IdempotencyKeyReused,
        QuoteInvalid,
        QuoteNotFound,
        QuoteExpired,
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
    "it is judged as any order, and not placed. With the token of a `quote` it is what the quote says, and may be sent "
    "again without a key.",
    tag="orders",
    query=PARAMETERS,
    parameters=[{"name": "Idempotency-Key", "in": "header", "schema": KEY_SCHEMA}],
    body={
        "schema": {
            "oneOf": [
                body_schema(MEMBERS) | {"not": {"required": [MAX_RATE.name, MIN_BITCOIN.name]}},
                body_schema(MEMBERS_BY_QUOTE),
            ]
        },
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
