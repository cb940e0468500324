"""Anchors and confirmations over HTTP: how they are read from a request, documented, and kept."""

from datetime import UTC, datetime

from fastapi import Response

from buydesk.errors import InvalidRequest, LedgerUnavailable, Overloaded
from buydesk.http.app import Service
from buydesk.http.examples import EXAMPLE_RECORD
from buydesk.http.members import Member, body_schema, decode_body, json_members, read_members, read_query, unknown
from buydesk.http.openapi import operation
from buydesk.http.prices import wrong_members_named
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.money import CURRENCIES, CURRENCIES_TEXT, RATE_SCALE, Currency, parse_rate
from buydesk.prices.anchor_documents import anchors_document, anchors_from
from buydesk.prices.anchors import (
    CONFIRMED_MINUTES_MAX,
    WHY_CHARS_MAX,
    Anchor,
    AnchorStore,
    Confirmation,
    NewConfirmation,
    anchors_of,
)
from buydesk.prices.documents import document_of
from buydesk.reading import Number, is_text
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens


def parse_anchors(body: bytes) -> dict[Currency, Anchor]:
    """The anchors that a JSON body is; raises InvalidRequest naming what is wrong."""
    with wrong_members_named():
        return anchors_from(decode_body(body))


def _text(value: object) -> str:
    if not is_text(value):
        raise ValueError("must be text")
    return value


def _currency(value: object) -> Currency:
    if not is_text(value) or value not in CURRENCIES:
        raise ValueError(f"must be one of {CURRENCIES_TEXT}")
    return CURRENCIES[value]


def _rate_e8(value: object) -> int:
    return parse_rate(_text(value))


def _whole_number(value: object) -> int:
    if not isinstance(value, Number) or not value.isdecimal() or len(value) > _DIGITS_MAX:
        raise ValueError("must be a whole number")
    return int(value)


_DIGITS_MAX = 18  # of a number that Python reads without a limit of its own
_RATE_SCHEMA = {"type": "string", "description": "Decimal text, both ends included.", "examples": ["15000.00"]}
_MEMBERS = (
    Member("currency", _currency, {"type": "string", "enum": list(Currency)}, is_required=True),
    Member("from", _rate_e8, _RATE_SCHEMA, is_required=True),
    Member("to", _rate_e8, _RATE_SCHEMA, is_required=True),
    Member("why", _text, {"type": "string", "minLength": 1, "maxLength": WHY_CHARS_MAX}, is_required=True),
    Member(
        "minutes", _whole_number, {"type": "integer", "minimum": 1, "maximum": CONFIRMED_MINUTES_MAX}, is_required=True
    ),
)


def parse_confirmation(body: bytes) -> NewConfirmation:
    """The confirmation that a JSON body asks for; raises InvalidRequest naming every member that is wrong. Whether it
    may be kept, `require_confirmable` says."""
    given = json_members(body)
    reasons = unknown(given, _MEMBERS, "a confirmation")
    found = read_members(given, _MEMBERS, reasons)
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return NewConfirmation(found["currency"], found["from"], found["to"], found["why"], found["minutes"])


_ANCHORS = anchors_document(anchors_of(EXAMPLE_RECORD, {}))
_NEW = NewConfirmation(Currency.EUR, 15_000 * RATE_SCALE, 16_000 * RATE_SCALE, "Kraken and the news say so", 15)
_CONFIRMATION = document_of(
    Confirmation(_NEW.currency, _NEW.low_e8, _NEW.high_e8, _NEW.why, datetime(2026, 1, 31, 9, 20, tzinfo=UTC))
)
_FAILURES = (LedgerUnavailable, Overloaded)
GET_ANCHORS = operation(
    "The last published price of each currency",
    ("The anchors", _ANCHORS),
    errors=(InvalidRequest, *_FAILURES),
    description="Needs `Authorization: Bearer <publishing token>`. A price far from it is sold at only when an "
    "operator has confirmed it.",
    tag="internal",
    is_internal=True,
)
PUT_ANCHORS = operation(
    "Keep the last published price of each currency",
    ("The anchors as they are kept now", _ANCHORS),
    errors=_FAILURES,
    description="Needs `Authorization: Bearer <publishing token>`. A later one that is kept already stays, and so do "
    "those of other currencies.",
    tag="internal",
    body={"schema": {"type": "object"}, "example": _ANCHORS},
    is_internal=True,
)
GET_CONFIRMATIONS = operation(
    "What operators have confirmed that a bitcoin may cost now",
    ("The confirmations", {"data": [_CONFIRMATION]}),
    errors=(InvalidRequest, *_FAILURES),
    description="Needs `Authorization: Bearer <publishing token>`. Those that have not ended.",
    tag="internal",
    is_internal=True,
)
POST_CONFIRMATION = operation(
    "Confirm what a bitcoin may cost",
    ("The confirmation as it is kept", _CONFIRMATION),
    errors=_FAILURES,
    description="Needs `Authorization: Bearer <publishing token>`. It holds from now on for so many minutes, and is "
    "kept for ever.",
    tag="internal",
    body={"schema": body_schema(_MEMBERS), "example": document_of(_NEW)},
    is_internal=True,
)


def add_anchor_routes(app: Service, anchors: AnchorStore, settings: Settings) -> None:
    """The routes for whoever publishes prices."""
    may_publish = tokens(settings.publishing_tokens)

    def require_publisher(request: Request) -> None:
        require_token(request, may_publish)
        read_query(request)

    async def get_anchors(request: Request) -> Response:
        require_publisher(request)
        return MsgspecResponse(anchors_document(await anchors.anchors()))

    async def put_anchors(request: Request) -> Response:
        require_publisher(request)
        require_json(request)
        await anchors.keep_anchors(parse_anchors(await request.body()))
        return MsgspecResponse(anchors_document(await anchors.anchors()))

    async def get_confirmations(request: Request) -> Response:
        require_publisher(request)
        return MsgspecResponse({"data": [document_of(each) for each in await anchors.confirmations()]})

    async def confirm(request: Request) -> Response:
        require_publisher(request)
        require_json(request)
        return MsgspecResponse(document_of(await anchors.confirm(parse_confirmation(await request.body()))))

    app.add_direct_route("/anchors", "GET", get_anchors, GET_ANCHORS)
    app.add_direct_route("/anchors", "PUT", put_anchors, PUT_ANCHORS)
    app.add_direct_route("/confirmations", "GET", get_confirmations, GET_CONFIRMATIONS)
    app.add_direct_route("/confirmations", "POST", confirm, POST_CONFIRMATION)
