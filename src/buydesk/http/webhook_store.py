"""Webhooks between db_proxy and process_buy_orders."""

import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import Response

from buydesk.clients.registry import CLIENT_PATTERN, parse_client
from buydesk.errors import (
    ClientNotFound,
    DeskError,
    InvalidRequest,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
    TooManyWebhooks,
    WebhookNotFound,
)
from buydesk.events.model import (
    DELIVERIES_KEPT,
    EVENT_TYPES,
    AnyWebhookChange,
    CreateWebhook,
    Delivery,
    Secret,
    Totals,
    Turn,
    Webhook,
    WebhookStore,
)
from buydesk.http.app import Service
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.members import Member, decode_body, read_query, whole_number
from buydesk.http.openapi import Json, id_in_path, operation
from buydesk.http.pages import id_of
from buydesk.http.prices import wrong_members_named
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.orders.life import Closed
from buydesk.orders.model import NUMBER_MAX
from buydesk.reading import read
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens

TURN_BYTES_MAX = 256 * 1024
TAKEN_AT_ONCE_MAX = 1000


class _Take(msgspec.Struct):
    lease: uuid.UUID
    keys: list[str]
    limit: Annotated[int, msgspec.Meta(ge=1, le=TAKEN_AT_ONCE_MAX)]
    lease_seconds: float


class _Renew(msgspec.Struct):
    leases: Annotated[dict[uuid.UUID, uuid.UUID], msgspec.Meta(max_length=TAKEN_AT_ONCE_MAX)]
    lease_seconds: float


class _Report(msgspec.Struct):
    lease: uuid.UUID
    lease_seconds: float
    turn: Turn


class _Keys(msgspec.Struct):
    keys: list[str]


def _what(text: str) -> Literal["placed"] | Closed:
    for known in ("placed", "settled", "cancelled"):
        if text == known:
            return known
    raise ValueError("must be placed, settled or cancelled")


_CLIENT = Member("client", parse_client, {"type": "string", "pattern": CLIENT_PATTERN}, "Whose.", is_required=True)
_WHAT = Member("what", _what, {"type": "string", "enum": ["placed", "settled", "cancelled"]}, is_required=True)
BEFORE = whole_number("before", "The newest below this number.", NUMBER_MAX, default=NUMBER_MAX)
LIMIT = whole_number("limit", "At most so many.", DELIVERIES_KEPT, default=50)
WEBHOOK_ID = id_in_path("webhook_id")
_HOOK_ID = uuid.UUID("5c9f1d1e-7a3b-4c56-9d8e-2f4a6b8c0d1e")
EXAMPLE_WEBHOOK = Webhook(
    _HOOK_ID,
    EXAMPLE_ORDER.client,
    "https://shop.example/hooks/buydesk",
    EVENT_TYPES,
    "the shop's ledger",
    EXAMPLE_ORDER.created_at,
    [Secret(1, "3f2a9c41d07be655", None)],
    None,
    7,
    0,
    EXAMPLE_ORDER.created_at,
)
EXAMPLE_DELIVERY = Delivery(
    f"{EXAMPLE_ORDER.id}.placed", "order.placed", 7, EXAMPLE_ORDER.created_at, 1, "delivered", 200, 84, 7
)
_EXAMPLE_CREATE = CreateWebhook(
    *(EXAMPLE_WEBHOOK.client, _HOOK_ID, EXAMPLE_WEBHOOK.url, EVENT_TYPES, "the shop's ledger", "3f2a9c41d07be655")
)
_EXAMPLE_TURN = Turn(_HOOK_ID, 7, 0, 0, None, False, [EXAMPLE_DELIVERY])


def _operation(summary: str, example: object, *errors: type[DeskError], body: object = None, **given: Any) -> Json:
    """An operation of process_buy_orders; one without a body reads."""
    sent = None if body is None else {"schema": {"type": "object"}, "example": msgspec.to_builtins(body)}
    return operation(
        summary,
        ("OK", example),
        errors=(*errors, OutcomeUnknown if body else InvalidRequest, LedgerUnavailable, Overloaded),
        description="Needs `Authorization: Bearer <processing token>`.",
        tag="internal",
        is_internal=True,
        body=sent,
        **given,
    )


_CHANGE = _operation(
    "Make, change, delete or rewind an endpoint, or give it a new secret",
    EXAMPLE_WEBHOOK,
    *(WebhookNotFound, TooManyWebhooks, ClientNotFound),
    body=_EXAMPLE_CREATE,
)
_LIST = _operation("Endpoints of a client", {"data": [EXAMPLE_WEBHOOK]}, query=(_CLIENT,))
_GET = _operation(
    "An endpoint of a client", EXAMPLE_WEBHOOK, WebhookNotFound, query=(_CLIENT,), parameters=[WEBHOOK_ID]
)
_DELIVERIES = _operation(
    "The last attempts to deliver to an endpoint, the newest first",
    {"data": [EXAMPLE_DELIVERY]},
    query=(_CLIENT, BEFORE, LIMIT),
    parameters=[WEBHOOK_ID],
)
_NOTE = _operation("Note an attempt that was no part of a turn", {}, body=EXAMPLE_DELIVERY, parameters=[WEBHOOK_ID])
_SEQUENCE = _operation(
    "The number of an event among its client's, or null",
    {"sequence": 7},
    query=(_CLIENT, _WHAT),
    parameters=[id_in_path("order_id")],
)
_TAKE = _operation(
    "Lease endpoints whose turn it is to a replica",
    {"data": [EXAMPLE_WEBHOOK]},
    body=_Take(EXAMPLE_ORDER.id, ["3f2a9c41d07be655"], 100, 10),
)
_RENEW = _operation(
    "Make leases last: of these endpoints", {"data": [_HOOK_ID]}, body=_Renew({_HOOK_ID: EXAMPLE_ORDER.id}, 10)
)
_REPORT = _operation(
    "Store what a replica tells of a turn, if it counts",
    {"counts": True},
    body=_Report(EXAMPLE_ORDER.id, 10, _EXAMPLE_TURN),
)
_TOTALS = _operation("How all endpoints are", Totals(3, 1, 0, 0), body=_Keys(["3f2a9c41d07be655"]))


def add_webhook_store_routes(app: Service, store: WebhookStore, settings: Settings) -> None:
    """The routes for process_buy_orders."""
    _add_endpoints(app, store, tokens(settings.processing_tokens))
    _add_turns(app, store, tokens(settings.processing_tokens))


async def _document(request: Request, may_process: tuple[str, ...]) -> object:
    require_token(request, may_process)
    require_json(request)
    return decode_body(await request.body(TURN_BYTES_MAX))


def _add_endpoints(app: Service, store: WebhookStore, may_process: tuple[str, ...]) -> None:
    async def change(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            asked: AnyWebhookChange = read(AnyWebhookChange, document, "body")  # type: ignore[arg-type]
        return MsgspecResponse(await store.change(asked))

    async def webhooks(request: Request) -> Response:
        require_token(request, may_process)
        return MsgspecResponse({"data": await store.webhooks(**read_query(request, _CLIENT))})

    async def webhook(request: Request) -> Response:
        require_token(request, may_process)
        client = read_query(request, _CLIENT)["client"]
        return MsgspecResponse(await store.webhook(client, id_of(request, "webhook_id")))

    async def deliveries(request: Request) -> Response:
        require_token(request, may_process)
        asked = read_query(request, _CLIENT, BEFORE, LIMIT)
        found = await store.deliveries(webhook_id=id_of(request, "webhook_id"), **asked)
        return MsgspecResponse({"data": found})

    async def note(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            delivery = read(Delivery, document, "body")
        await store.note_delivery(id_of(request, "webhook_id"), delivery)
        return MsgspecResponse({})

    async def sequence(request: Request) -> Response:
        require_token(request, may_process)
        asked = read_query(request, _CLIENT, _WHAT)
        return MsgspecResponse({"sequence": await store.sequence_of(order_id=id_of(request, "order_id"), **asked)})

    app.add_direct_route("/webhooks", "GET", webhooks, _LIST)
    app.add_direct_route("/webhooks/changes", "POST", change, _CHANGE)
    app.add_direct_route("/webhooks/{webhook_id}", "GET", webhook, _GET)
    app.add_direct_route("/webhooks/{webhook_id}/deliveries", "GET", deliveries, _DELIVERIES)
    app.add_direct_route("/webhooks/{webhook_id}/deliveries", "POST", note, _NOTE)
    app.add_direct_route("/events/{order_id}", "GET", sequence, _SEQUENCE)


def _add_turns(app: Service, store: WebhookStore, may_process: tuple[str, ...]) -> None:
    async def take(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            asked = read(_Take, document, "body")
        found = await store.take(asked.lease, asked.keys, asked.limit, asked.lease_seconds)
        return MsgspecResponse({"data": found})

    async def renew(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            asked = read(_Renew, document, "body")
        return MsgspecResponse({"data": list(await store.renew(asked.leases, asked.lease_seconds))})

    async def report(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            asked = read(_Report, document, "body")
        return MsgspecResponse({"counts": await store.report(asked.lease, asked.turn, asked.lease_seconds)})

    async def totals(request: Request) -> Response:
        document = await _document(request, may_process)
        with wrong_members_named():
            asked = read(_Keys, document, "body")
        return MsgspecResponse(await store.totals(asked.keys))

    app.add_direct_route("/webhooks/leases", "POST", take, _TAKE)
    app.add_direct_route("/webhooks/renewals", "POST", renew, _RENEW)
    app.add_direct_route("/webhooks/turns", "POST", report, _REPORT)
    app.add_direct_route("/webhooks/totals", "POST", totals, _TOTALS)
