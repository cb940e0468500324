"""An order's life over HTTP: how what is to become of orders is read, how orders and events are written for processors,
and documented."""

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from buydesk.errors import (
    DeskError,
    InvalidRequest,
    LedgerUnavailable,
    OrderNotFound,
    OrderStateConflict,
    OutcomeUnknown,
    Overloaded,
    problem,
)
from buydesk.events.documents import EventDocument, told_event
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.members import (
    Member,
    Reasons,
    body_schema,
    json_members,
    read_members,
    read_query,
    unknown,
    whole_number,
)
from buydesk.http.openapi import Json, id_in_path, operation
from buydesk.http.owners import CLIENT, CLIENT_OR_DESK, Owner, owner
from buydesk.http.requests import Request
from buydesk.http.responses import encode
from buydesk.orders.life import CLOSED_AT_ONCE_MAX, TEXT_CHARS_MAX, AcceptedOrders, Closed, Closing, Event, parse_text
from buydesk.orders.life_documents import (
    CLIENTS_MAX,
    accepted_document,
    closing_documents,
    event_documents,
    last_events_document,
    result_document,
)
from buydesk.orders.model import ANONYMOUS, KEY_PATTERN, NUMBER_MAX, Order
from buydesk.orders.representations import desk_document
from buydesk.reading import LINE_PATTERN, is_text

LIST_MAX = 1000
LIST_BYTES_MAX = 1024 * 1024
LIMIT = 100
WAIT_SECONDS_MAX = 20


def _text_for(status: Closed) -> Any:
    def parse(value: object) -> str | None:
        if value is not None and not is_text(value):
            raise ValueError("must be text")
        return parse_text(value, status)

    return parse


def _id(value: object) -> uuid.UUID:
    try:
        return uuid.UUID(value if is_text(value) else "")
    except ValueError as error:
        raise ValueError("must be a UUID") from error


def _text_schema(status: Closed) -> dict[str, object]:
    """A JSON schema of the text with which orders are closed so."""
    kind: object = ["string", "null"] if status == "settled" else "string"
    return {"type": kind, "minLength": 1, "maxLength": TEXT_CHARS_MAX[status], "pattern": LINE_PATTERN}


_ID = Member("id", _id, {"type": "string", "format": "uuid"}, is_required=True)
_REFERENCE = Member(
    "settlement_reference",
    _text_for("settled"),
    _text_schema("settled"),
    "By which the settlement is found again, in a bank's or a wallet's books.",
)
_REASON = Member("reason", _text_for("cancelled"), _text_schema("cancelled"), "Why.", is_required=True)
_TEXT_OF: dict[Closed, Member] = {"settled": _REFERENCE, "cancelled": _REASON}


def read_closing(order_id: str, status: Closed, body: bytes) -> Closing:
    """What a request wants to become of the order of its path; raises InvalidRequest naming every member that is wrong.
    An order can be settled without a body."""
    reasons: Reasons = []
    member = _TEXT_OF[status]
    given = json_members(body) if body or member.is_required else {}
    found = read_members({"id": order_id} | given, (_ID, member), reasons)
    reasons += unknown(given, (member,), "this")
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return Closing(found["id"], status, found[member.name])


def read_closings(status: Closed, body: bytes) -> list[Closing]:
    """What a request wants to become of the orders of its list; raises InvalidRequest naming what is wrong."""
    given = json_members(body)
    orders = given.get("orders")
    if given.keys() != {"orders"} or not isinstance(orders, list) or not 1 <= len(orders) <= LIST_MAX:
        raise InvalidRequest.of("orders", f"must be the only member, a list of 1 to {LIST_MAX}")
    reasons: Reasons = []
    closings = []
    members = (_ID, _TEXT_OF[status])
    for place, each in enumerate(orders):
        wrong: Reasons = []
        document = each if isinstance(each, dict) else {}
        found = read_members(document, members, wrong)
        wrong += unknown(document, members, "an order of the list")
        reasons += [(f"orders.{place}.{name}", reason) for name, reason in wrong]
        closings.append(Closing(found["id"], status, found[members[1].name]))
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return closings


def result(closing: Closing, found: Order | DeskError) -> dict[str, object]:
    """One result of a list: the order, or the problem."""
    if isinstance(found, DeskError):
        return {"problem": problem(found, f"/orders/{closing.order_id}")}
    return {"order": desk_document(found)}


def event_document(event: Event, owner: Owner) -> EventDocument:
    """The event as it is told to who reads for this owner."""
    return told_event(event, owner.document(event.order))


def events_page(events: Sequence[Event], after: int, owner: Owner) -> dict[str, object]:
    """Events as a page; the next one is asked for after `next_after`."""
    next_after = events[-1].sequence if events else after
    return {"data": [event_document(each, owner) for each in events], "next_after": next_after}


def server_sent(events: Sequence[Event], owner: Owner) -> bytes:
    """The events as a part of a stream (HTML standard, section 9.2): each with its number as its `id`. Without any it
    is a comment, which says that somebody is there."""
    if not events:
        return b":\n\n"
    return b"".join(
        b"id: %d\nevent: %b\ndata: %b\n\n" % (each.sequence, each.type.encode(), encode(each))
        for each in (event_document(event, owner) for event in events)
    )


def _accepted(value: object) -> str:
    if value != "accepted":
        raise ValueError("must be accepted: only open orders are listed")
    return "accepted"


_AFTER = whole_number("after", "The lowest desk numbers above this one.", NUMBER_MAX, lowest=0, default=0)
_LIMIT = whole_number("limit", "At most so many.", LIST_MAX, default=LIMIT)
_STATUS = Member("status", _accepted, {"type": "string", "enum": ["accepted"], "default": "accepted"})
_SEQUENCE = whole_number("after", "The events after this number.", NUMBER_MAX, lowest=0, default=0)
_WAIT = whole_number("wait", "Seconds to wait for an event when there is none.", WAIT_SECONDS_MAX, lowest=0, default=0)


def read_accepted(request: Request) -> tuple[int, int]:
    """After which number open orders are asked for, and how many at most; raises InvalidRequest."""
    found = read_query(request, _STATUS, _AFTER, _LIMIT)
    return found["after"], found["limit"]


def read_after(request: Request) -> tuple[str | None, int, int]:
    """Whose events another service asks for, after which number, and how many at most; raises InvalidRequest."""
    found = read_query(request, _SEQUENCE, _LIMIT, CLIENT_OR_DESK)
    return found["client"], found["after"], found["limit"]


class EventsRequest(NamedTuple):
    """Which events are asked for, and how."""

    owner: Owner
    after: int
    limit: int
    wait_seconds: float
    is_stream: bool


def read_events(request: Request) -> EventsRequest:
    """Which events are asked for: those after `after`, or after `Last-Event-ID`, which a client of a stream sends when
    it comes back and which counts then; raises InvalidRequest, InsufficientScope."""
    found = read_query(request, _SEQUENCE, _LIMIT, _WAIT, CLIENT)
    whose = owner(request.caller, found["client"])
    after = found["after"]
    last = request.headers.get("last-event-id")
    if last:
        try:
            after = _SEQUENCE.parse(last)
        except ValueError as error:
            raise InvalidRequest.of("Last-Event-ID", str(error)) from error
    accepts = (request.headers.get("accept") or "").lower()
    return EventsRequest(whose, after, found["limit"], found["wait"], "text/event-stream" in accepts)


_SETTLED = msgspec.structs.replace(
    EXAMPLE_ORDER, status="settled", settlement_reference="bank-7", closed_at=EXAMPLE_ORDER.created_at
)
_CANCELLED = msgspec.structs.replace(
    EXAMPLE_ORDER, status="cancelled", reason="The client asked for it.", closed_at=EXAMPLE_ORDER.created_at
)
_AWAY = (LedgerUnavailable, Overloaded)


def _close_operation(act: str, status: Closed, closed: Order) -> Json:
    member = _TEXT_OF[status]
    return operation(
        f"{act} an order",
        (f"The order, {status}", desk_document(closed)),
        errors=(OrderNotFound, OrderStateConflict, OutcomeUnknown, *_AWAY),
        description="The same act with the same text has the same answer; another one is a conflict. After a "
        "lost answer (`outcome_unknown`) send it again.",
        tag="orders",
        parameters=[id_in_path("order_id")],
        body={"schema": body_schema((member,)), "example": {member.name: getattr(closed, member.name)}},
        is_body_required=member.is_required,
    )


def _close_list_operation(act: str, status: Closed, closed: Order) -> Json:
    members = (_ID, _TEXT_OF[status])
    schema = {
        "type": "object",
        "required": ["orders"],
        "additionalProperties": False,
        "properties": {"orders": {"type": "array", "minItems": 1, "maxItems": LIST_MAX, "items": body_schema(members)}},
    }
    example = {"id": closed.id, members[1].name: getattr(closed, members[1].name)}
    missing = Closing(EXAMPLE_ORDER.price_id, status, None)
    return operation(
        f"{act} up to {LIST_MAX} orders",
        (
            "One result each, in order",
            {"data": [result(missing, OrderNotFound("No order has this id.")), {"order": desk_document(closed)}]},
        ),
        errors=_AWAY,
        description=f"As if they were sent one by one: some may fail, and the others are {status}.",
        tag="orders",
        body={"schema": schema, "example": {"orders": [msgspec.to_builtins(example)]}},
    )


SETTLE_ONE = _close_operation("Settle", "settled", _SETTLED)
CANCEL_ONE = _close_operation("Cancel", "cancelled", _CANCELLED)
SETTLE_MANY = _close_list_operation("Settle", "settled", _SETTLED)
CANCEL_MANY = _close_list_operation("Cancel", "cancelled", _CANCELLED)
GET_ACCEPTED = operation(
    "Open orders, oldest first",
    ("The orders", {"data": [desk_document(EXAMPLE_ORDER)], "next_after": EXAMPLE_ORDER.number}),
    errors=(InvalidRequest, *_AWAY),
    description="Ask again after `next_after`, until it stays the same: a page may have few orders or none.",
    tag="orders",
    query=(_STATUS, _AFTER, _LIMIT),
)
GET_EVENTS = operation(
    "Events after a number, oldest first",
    ("The events", events_page([Event(1, EXAMPLE_ORDER), Event(2, _SETTLED)], 0, Owner(EXAMPLE_ORDER.client, False))),
    errors=(InvalidRequest, *_AWAY),
    description="The caller's own; `sequence` counts these, without gaps. For another `client`, or all of the desk "
    "(which it is for the processing token without a `client`), an order also has `client` and `desk_number`. With "
    "`Accept: text/event-stream` the same as a stream without an end; `Last-Event-ID` goes on where it broke off.",
    tag="events",
    query=(_SEQUENCE, _LIMIT, _WAIT, CLIENT),
)
# Between the desk's own services.
_NEEDS = "Needs `Authorization: Bearer <processing token>`."
_CLOSINGS = {
    "type": "array",
    "maxItems": CLOSED_AT_ONCE_MAX,
    "items": {
        "oneOf": [
            {
                "type": "object",
                "required": ["order_id", "status", "text"],
                "properties": {
                    "order_id": {"type": "string", "format": "uuid"},
                    "status": {"const": status},
                    "text": _text_schema(status),
                },
            }
            for status in _TEXT_OF
        ]
    },
}
CLOSE = operation(
    "Settle and cancel orders",
    ("One result each, in order", [result_document(_SETTLED), result_document(OrderNotFound("No order has this id."))]),
    errors=(OutcomeUnknown, *_AWAY),
    description=f"{_NEEDS} `text` is the settlement's reference, or the reason of a cancellation.",
    tag="internal",
    body={
        "schema": _CLOSINGS,
        "example": msgspec.to_builtins(closing_documents([Closing(_SETTLED.id, "settled", "bank-7")])),
    },
    is_internal=True,
)
ACCEPTED = operation(
    "Open orders, oldest first",
    ("The orders", accepted_document(AcceptedOrders([EXAMPLE_ORDER], EXAMPLE_ORDER.number))),
    errors=(InvalidRequest, *_AWAY),
    description=_NEEDS,
    tag="internal",
    query=(_STATUS, _AFTER, _LIMIT),
    is_internal=True,
)
EVENTS = operation(
    "Events after a number, oldest first",
    ("The events", event_documents([Event(1, EXAMPLE_ORDER)])),
    errors=(InvalidRequest, *_AWAY),
    description=_NEEDS,
    tag="internal",
    query=(_SEQUENCE, _LIMIT, CLIENT_OR_DESK),
    is_internal=True,
)
_NAME_SCHEMA = {"type": "string", "pattern": KEY_PATTERN}
LAST_EVENTS = operation(
    "The numbers of the newest events, of the desk and of clients",
    ("The numbers", last_events_document({None: 7, ANONYMOUS: 2})),
    errors=_AWAY,
    description=f"{_NEEDS} 0 where there is no event.",
    tag="internal",
    body={
        "schema": {
            "type": "object",
            "required": ["clients"],
            "properties": {"clients": {"type": "array", "maxItems": CLIENTS_MAX, "items": _NAME_SCHEMA}},
        },
        "example": {"clients": [ANONYMOUS]},
    },
    is_internal=True,
)
