"""What operators read and change, and refusals on record, between db_proxy and the services that ask it."""

from typing import Any

import msgspec
from fastapi import Response

from buydesk.clients.audit import Act
from buydesk.clients.model import StoredKey
from buydesk.clients.registry import (
    CLIENT_PATTERN,
    CLIENTS_MAX,
    AnyChange,
    Client,
    ConfirmPrice,
    Desk,
    Pause,
    Registry,
    ShownKey,
    parse_client,
)
from buydesk.errors import (
    CapBelowUsed,
    ClientExists,
    ClientNotFound,
    InsufficientScope,
    InvalidRequest,
    KeyEnded,
    KeyNotFound,
    KeyRefused,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
)
from buydesk.http.app import Service
from buydesk.http.members import Member, decode_body, read_query, whole_number
from buydesk.http.openapi import operation
from buydesk.http.owners import CLIENT_OR_DESK
from buydesk.http.prices import wrong_members_named
from buydesk.http.refusals import EXAMPLE_REFUSAL, LIMIT
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.orders.model import NUMBER_MAX
from buydesk.orders.refusals import RefusalReads, refusal_document
from buydesk.prices.anchors import require_confirmable
from buydesk.reading import read
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens
from buydesk.times import EPOCH

ACTS_MAX = 1000
NAME_SCHEMA = {"type": "string", "pattern": CLIENT_PATTERN}
NAME_IN_PATH = {"name": "name", "in": "path", "required": True, "schema": NAME_SCHEMA}


def name_of(request: Request) -> str:
    """The client of the path; raises InvalidRequest."""
    try:
        return parse_client(request.parameter)
    except ValueError as error:
        raise InvalidRequest.of("name", str(error)) from error


class _Change(msgspec.Struct):
    by: ShownKey
    why: str
    change: AnyChange


EXAMPLE_CLIENT = Client("shop", 10**9, None, False, None, {"EUR": 100_000}, 2_041_875, 7, 1, {"EUR": 75})
EXAMPLE_DESK = Desk(True, 10**10, 2_041_875, False, False, 7)
EXAMPLE_KEY = StoredKey("0dq4VmB9xK", "shop", bytes(32), ["orders:create", "orders:read"], [], None, None, None)
EXAMPLE_ACT = Act(
    *(1, EPOCH, "operator/7Kd02mPq4z", "192.0.2.7", "desk paused", "desk", "an exchange reports a fork"),
    *('{"paused": false}', '{"paused": true}', bytes(32)),
)
AFTER = whole_number("after", "Those after this number.", NUMBER_MAX, lowest=0, default=0)
AFTER_NAME = Member("after", parse_client, NAME_SCHEMA, "Those after this name.", default="")
LIST_LIMIT = whole_number("limit", "At most so many.", CLIENTS_MAX, default=100)
ACTS_LIMIT = whole_number("limit", "At most so many.", ACTS_MAX, default=100)
CHANGE_ERRORS = (
    *(InsufficientScope, ClientNotFound, KeyNotFound, ClientExists, KeyEnded, CapBelowUsed),
    *(OutcomeUnknown, LedgerUnavailable, Overloaded),
)
_READ = (InvalidRequest, LedgerUnavailable, Overloaded)
_BY = {"text": "bd_live_…", "address": "192.0.2.7"}


def _list(summary: str, example: object, **query: Any) -> dict[str, Any]:
    return operation(summary, ("Those", {"data": [example]}), errors=_READ, tag="internal", is_internal=True, **query)


CHANGE = operation(
    "Do what an operator's key permits",
    ("It is done", {"said": {"cap_satoshi": 10**10, "cap_counts_open": False, "paused": True}}),
    errors=(KeyRefused, *CHANGE_ERRORS),
    description="The database itself looks whether the key permits it, and keeps a record of it.",
    tag="internal",
    body={
        "schema": {"type": "object"},
        "example": msgspec.to_builtins({"by": _BY, "why": "a fork", "change": Pause()}),
    },
    is_internal=True,
)
DESK = operation("The desk as it is", ("Satoshi", EXAMPLE_DESK), errors=_READ, tag="internal", is_internal=True)
CLIENTS = _list("Clients by name", EXAMPLE_CLIENT, query=(AFTER_NAME, LIST_LIMIT))
CLIENT = operation(
    "One client",
    ("The client", EXAMPLE_CLIENT),
    errors=(ClientNotFound, *_READ),
    tag="internal",
    parameters=[NAME_IN_PATH],
    is_internal=True,
)
KEYS = _list("Keys, of a client or all", EXAMPLE_KEY, query=(CLIENT_OR_DESK, LIST_LIMIT))
ACTS = _list("What operators did", msgspec.to_builtins(EXAMPLE_ACT), query=(AFTER, ACTS_LIMIT))
REFUSALS = _list("What was refused", refusal_document(EXAMPLE_REFUSAL), query=(LIMIT, CLIENT_OR_DESK))


def add_registry_routes(app: Service, registry: Registry[ShownKey], refusals: RefusalReads, settings: Settings) -> None:
    """The routes for operate_desk, and what was refused for those who read orders too."""
    may_operate = tokens(settings.operating_tokens)
    may_read = (*tokens(settings.reading_tokens), *may_operate)

    async def change(request: Request) -> Response:
        require_token(request, may_operate)
        require_json(request)
        with wrong_members_named():
            asked = read(_Change, decode_body(await request.body()), "body")
        if isinstance(asked.change, ConfirmPrice):
            require_confirmable(asked.change.confirmation(asked.why))
        return MsgspecResponse({"said": await registry.change(asked.change, asked.why, asked.by)})

    async def desk(request: Request) -> Response:
        require_token(request, may_operate)
        read_query(request)
        return MsgspecResponse(await registry.desk())

    async def clients(request: Request) -> Response:
        require_token(request, may_operate)
        return MsgspecResponse({"data": await registry.clients(**read_query(request, AFTER_NAME, LIST_LIMIT))})

    async def client(request: Request) -> Response:
        require_token(request, may_operate)
        read_query(request)
        return MsgspecResponse(await registry.client(name_of(request)))

    async def keys(request: Request) -> Response:
        require_token(request, may_operate)
        return MsgspecResponse({"data": await registry.keys(**read_query(request, CLIENT_OR_DESK, LIST_LIMIT))})

    async def acts(request: Request) -> Response:
        require_token(request, may_operate)
        return MsgspecResponse({"data": await registry.acts(**read_query(request, AFTER, ACTS_LIMIT))})

    async def refused(request: Request) -> Response:
        require_token(request, may_read)
        found = await refusals.refusals(**read_query(request, LIMIT, CLIENT_OR_DESK))
        return MsgspecResponse({"data": list(map(refusal_document, found))})

    app.add_direct_route("/changes", "POST", change, CHANGE)
    app.add_direct_route("/desk", "GET", desk, DESK)
    app.add_direct_route("/clients", "GET", clients, CLIENTS)
    app.add_direct_route("/clients/{name}", "GET", client, CLIENT)
    app.add_direct_route("/keys", "GET", keys, KEYS)
    app.add_direct_route("/acts", "GET", acts, ACTS)
    app.add_direct_route("/refusals", "GET", refused, REFUSALS)
