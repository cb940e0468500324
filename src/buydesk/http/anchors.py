"""Anchors and confirmations over HTTP: how they are read from a request, documented, and kept."""

from datetime import UTC, datetime

from fastapi import Response

from buydesk.errors import InvalidRequest, LedgerUnavailable, Overloaded
from buydesk.http.app import Service
from buydesk.http.examples import EXAMPLE_RECORD
from buydesk.http.members import decode_body, read_query
from buydesk.http.openapi import operation
from buydesk.http.prices import wrong_members_named
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.money import RATE_SCALE, Currency
from buydesk.prices.anchor_documents import anchors_document, anchors_from
from buydesk.prices.anchors import Anchor, AnchorStore, Confirmation, NewConfirmation, anchors_of
from buydesk.prices.documents import document_of
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens


def parse_anchors(body: bytes) -> dict[Currency, Anchor]:
    """The anchors that a JSON body is; raises InvalidRequest naming what is wrong."""
    with wrong_members_named():
        return anchors_from(decode_body(body))


_ANCHORS = anchors_document(anchors_of(EXAMPLE_RECORD, {}))
_NEW = NewConfirmation(Currency.EUR, 15_000 * RATE_SCALE, 16_000 * RATE_SCALE, "Kraken and the news say so", 15)
EXAMPLE_NEW_CONFIRMATION = document_of(_NEW)
EXAMPLE_CONFIRMATION = document_of(
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
    ("The confirmations", {"data": [EXAMPLE_CONFIRMATION]}),
    errors=(InvalidRequest, *_FAILURES),
    description="Needs `Authorization: Bearer <publishing token>`. Those that have not ended.",
    tag="internal",
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

    app.add_direct_route("/anchors", "GET", get_anchors, GET_ANCHORS)
    app.add_direct_route("/anchors", "PUT", put_anchors, PUT_ANCHORS)
    app.add_direct_route("/confirmations", "GET", get_confirmations, GET_CONFIRMATIONS)
