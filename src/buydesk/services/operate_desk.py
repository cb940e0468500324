"""operate_desk: the door for operators, never on the internet. Whatever they do is permitted by their key, which the
ledger looks up itself, and on record with who did it, from where and why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from fastapi import Response

from buydesk.clients.registry import (
    AnyChange,
    ClientState,
    CreateClient,
    DeskState,
    LimitClient,
    Limits,
    Pause,
    Registry,
    Resume,
    RevokeKey,
    SetCap,
    SetCapCounts,
    ShownKey,
    confirm_price,
    create_key,
    rotate_key,
)
from buydesk.clients.scopes import Scope
from buydesk.errors import (
    ClientNotFound,
    DeskError,
    InvalidRequest,
    KeyRefused,
    LedgerUnavailable,
    Overloaded,
    Unauthorized,
)
from buydesk.http.anchors import EXAMPLE_CONFIRMATION, EXAMPLE_NEW_CONFIRMATION
from buydesk.http.app import Check, Service, service_app
from buydesk.http.clients import read_key_id
from buydesk.http.members import Member, body_schema, read_query
from buydesk.http.openapi import Json, operation
from buydesk.http.operating import (
    CAP,
    CONFIRMATION,
    COUNTS,
    KEY_ID,
    LIMITS,
    NAME,
    NEW_KEY,
    OF_CLIENT,
    OVERLAP,
    WHY,
    act_document,
    client_document,
    confirmation_of,
    desk_document,
    key_document,
    limits_of,
    new_key_of,
    read_act,
    set_of_client,
    set_of_desk,
)
from buydesk.http.refusals import GET_REFUSALS, refusals_route
from buydesk.http.registry import (
    ACTS_LIMIT,
    AFTER,
    AFTER_NAME,
    CHANGE_ERRORS,
    EXAMPLE_ACT,
    EXAMPLE_CLIENT,
    EXAMPLE_DESK,
    EXAMPLE_KEY,
    LIST_LIMIT,
    NAME_IN_PATH,
    name_of,
)
from buydesk.http.requests import Request
from buydesk.http.responses import MsgspecResponse
from buydesk.observability.reporter import Reporter
from buydesk.orders.refusals import RefusalReads
from buydesk.prices.documents import document_of
from buydesk.reading import read

NAME_OF_SERVICE = "operate_desk"


def create_app(registry: Registry[ShownKey], refusals: RefusalReads, check: Check, reporter: Reporter) -> Service:
    """The service over what operators read and change."""
    app = service_app(NAME_OF_SERVICE, "Clients, keys, the cap, pauses, confirmed prices", {"ledger": check}, reporter)
    acts = _Acts(registry)
    _add_clients(app, acts)
    _add_keys(app, acts)
    _add_desk(app, acts)
    app.add_direct_route("/refusals", "GET", refusals_route(refusals), GET_REFUSALS, needs="orders:read_all")
    return app


class _Acts:
    """Acts as whoever shows the key of a request, which has been found to be one."""

    def __init__(self, registry: Registry[ShownKey]) -> None:
        self.registry = registry

    def by(self, request: Request) -> ShownKey:
        return ShownKey(request.headers["authorization"].partition(" ")[2], str(request.address or "unknown"))

    async def change(self, request: Request, change: AnyChange, why: str) -> Any:
        """What Registry.change returns; raises what it does, but Unauthorized for a key that ended meanwhile."""
        with _refused():
            return await self.registry.change(change, why, self.by(request))


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except KeyRefused as error:
        raise Unauthorized(error.detail) from error


def _add_clients(app: Service, acts: _Acts) -> None:
    registry = acts.registry

    async def get_clients(request: Request) -> Response:
        found = await registry.clients(**read_query(request, AFTER_NAME, LIST_LIMIT))
        return MsgspecResponse({"data": list(map(client_document, found))})

    async def get_client(request: Request) -> Response:
        read_query(request)
        return MsgspecResponse(client_document(await registry.client(name_of(request))))

    async def create_client(request: Request) -> Response:
        given = await read_act(request, NAME, *LIMITS, WHY)
        said = await acts.change(request, CreateClient(given["client"], limits_of(given)), given["why"])
        return MsgspecResponse(set_of_client(given["client"], read(ClientState, said)), 201)

    async def limit_client(request: Request) -> Response:
        name, given = name_of(request), await read_act(request, *LIMITS, WHY)
        limits = limits_of(given)
        if limits == Limits():
            raise InvalidRequest.of("body", "changes no limit")
        said = await acts.change(request, LimitClient(name, limits), given["why"])
        return MsgspecResponse(set_of_client(name, read(ClientState, said)))

    needs: Scope = "clients:manage"
    app.add_direct_route("/clients", "GET", get_clients, GET_CLIENTS, needs=needs)
    app.add_direct_route("/clients", "POST", create_client, POST_CLIENT, needs=needs)
    app.add_direct_route("/clients/{name}", "GET", get_client, GET_CLIENT, needs=needs)
    app.add_direct_route("/clients/{name}", "PATCH", limit_client, PATCH_CLIENT, needs=needs)


def _add_keys(app: Service, acts: _Acts) -> None:
    registry = acts.registry

    async def get_keys(request: Request) -> Response:
        found = await registry.keys(**read_query(request, OF_CLIENT, LIST_LIMIT))
        return MsgspecResponse({"data": list(map(key_document, found))})

    async def post_key(request: Request) -> Response:
        given = await read_act(request, *NEW_KEY, WHY)
        with _refused():
            key = await create_key(registry, new_key_of(given), given["why"], acts.by(request))
        return MsgspecResponse({"id": key.id, "key": key.text}, 201)

    async def post_rotation(request: Request) -> Response:
        key_id, given = read_key_id(request), await read_act(request, OVERLAP, WHY)
        overlap = timedelta(seconds=given["overlap_seconds"])
        with _refused():
            key = await rotate_key(registry, key_id, overlap, given["why"], acts.by(request))
        return MsgspecResponse({"id": key.id, "key": key.text}, 201)

    async def revoke(request: Request) -> Response:
        key_id, given = read_key_id(request), await read_act(request, WHY)
        await acts.change(request, RevokeKey(key_id), given["why"])
        return MsgspecResponse({"id": key_id})

    needs: Scope = "clients:manage"
    app.add_direct_route("/keys", "GET", get_keys, GET_KEYS, needs=needs)
    app.add_direct_route("/keys", "POST", post_key, POST_KEY, needs=needs)
    app.add_direct_route("/keys/{key_id}/rotate", "POST", post_rotation, ROTATE_KEY, needs=needs)
    app.add_direct_route("/keys/{key_id}/revoke", "POST", revoke, REVOKE_KEY, needs=needs)


def _add_desk(app: Service, acts: _Acts) -> None:
    registry = acts.registry

    async def get_desk(request: Request) -> Response:
        read_query(request)
        return MsgspecResponse(desk_document(await registry.desk()))

    async def set_cap(request: Request) -> Response:
        given = await read_act(request, CAP, WHY)
        return _as_set(await acts.change(request, SetCap(given["cap"]), given["why"]))

    async def set_cap_counts(request: Request) -> Response:
        given = await read_act(request, *COUNTS, WHY)
        client = given["client"]
        said = await acts.change(request, SetCapCounts(client, given["counts"]), given["why"])
        return _as_set(said) if client is None else MsgspecResponse(set_of_client(client, read(ClientState, said)))

    async def pause(request: Request) -> Response:
        return _as_set(await acts.change(request, Pause(), (await read_act(request, WHY))["why"]))

    async def resume(request: Request) -> Response:
        return _as_set(await acts.change(request, Resume(), (await read_act(request, WHY))["why"]))

    async def confirm(request: Request) -> Response:
        new = confirmation_of(await read_act(request, *CONFIRMATION))
        with _refused():
            return MsgspecResponse(document_of(await confirm_price(registry, new, acts.by(request))))

    async def get_audit(request: Request) -> Response:
        found = await registry.acts(**read_query(request, AFTER, ACTS_LIMIT))
        return MsgspecResponse({"data": list(map(act_document, found))})

    app.add_direct_route("/desk", "GET", get_desk, GET_DESK, needs="orders:read_all")
    app.add_direct_route("/cap", "POST", set_cap, SET_CAP, needs="desk:cap")
    app.add_direct_route("/cap/counts", "POST", set_cap_counts, SET_CAP_COUNTS, needs="desk:cap")
    app.add_direct_route("/pause", "POST", pause, PAUSE, needs="desk:pause")
    app.add_direct_route("/resume", "POST", resume, RESUME, needs="desk:pause")
    app.add_direct_route("/prices/confirm", "POST", confirm, CONFIRM, needs="prices:confirm")
    app.add_direct_route("/audit", "GET", get_audit, GET_AUDIT, needs="clients:manage")


def _as_set(said: Any) -> Response:
    return MsgspecResponse(set_of_desk(read(DeskState, said)))


_WHY = {"why": "as agreed on Tuesday"}
_DESK = ("What is set then", set_of_desk(DeskState(10**10, False, True)))
_KEY_MADE = ("The key, which is not shown again", {"id": EXAMPLE_KEY.id, "key": "bd_live_…"})
_READ: Sequence[type[DeskError]] = (InvalidRequest, LedgerUnavailable, Overloaded)


def _act(
    summary: str,
    answer: tuple[str, object],
    members: Sequence[Member],
    example: Json,
    *,
    parameters: Sequence[Json] = (),
    status: int = 200,
    tag: str = "desk",
    least: int = 1,
) -> Json:
    return operation(
        summary,
        answer,
        errors=CHANGE_ERRORS,
        tag=tag,
        parameters=parameters,
        body={"schema": {**body_schema(members), "minProperties": least}, "example": example},
        status=status,
    )


def _read(summary: str, answer: tuple[str, object], tag: str = "desk", **documented: Any) -> Json:
    return operation(summary, answer, errors=_READ, tag=tag, **documented)


_LIMITS_EXAMPLE = {"cap": "10", "daily_limits": {"EUR": "1000.00"}, **_WHY}
_CLIENT = client_document(EXAMPLE_CLIENT)
_SET = ("What is set of the client then", set_of_client(EXAMPLE_CLIENT.name, EXAMPLE_CLIENT))
GET_CLIENTS = _read("Clients by name", ("The clients", {"data": [_CLIENT]}), "clients", query=(AFTER_NAME, LIST_LIMIT))
GET_CLIENT = operation(
    "One client", ("The client", _CLIENT), errors=(ClientNotFound, *_READ), tag="clients", parameters=[NAME_IN_PATH]
)
POST_CLIENT = _act(
    "Make a client", _SET, (NAME, *LIMITS, WHY), {"client": "shop", **_LIMITS_EXAMPLE}, status=201, tag="clients"
)
PATCH_CLIENT = _act(
    "Change limits of a client; null takes one away",
    _SET,
    (*LIMITS, WHY),
    _LIMITS_EXAMPLE,
    parameters=[NAME_IN_PATH],
    tag="clients",
    least=2,  # a limit, and why
)
GET_KEYS = _read(
    "Keys, of a client or all",
    ("The keys", {"data": [key_document(EXAMPLE_KEY)]}),
    "keys",
    query=(OF_CLIENT, LIST_LIMIT),
)
POST_KEY = _act(
    "Make a key, of no more scopes than yours",
    _KEY_MADE,
    (*NEW_KEY, WHY),
    {"client": "shop", "scopes": ["orders:create", "orders:read"], **_WHY},
    status=201,
    tag="keys",
)
ROTATE_KEY = _act(
    "Make a key that takes another's place, which ends after the overlap",
    _KEY_MADE,
    (OVERLAP, WHY),
    _WHY,
    parameters=[KEY_ID],
    status=201,
    tag="keys",
)
REVOKE_KEY = _act(
    "End a key now", ("It has ended", {"id": EXAMPLE_KEY.id}), (WHY,), _WHY, parameters=[KEY_ID], tag="keys"
)
GET_DESK = _read(
    "The cap, what is used of it, and whether the desk is paused", ("The desk", desk_document(EXAMPLE_DESK))
)
SET_CAP = _act("Set the cap, not below what is used", _DESK, (CAP, WHY), {"cap": "250", **_WHY})
SET_CAP_COUNTS = _act(
    "Set whether the cap, of the desk or a client, counts open orders only",
    _DESK,
    (*COUNTS, WHY),
    {"counts": "open", **_WHY},
)
PAUSE = _act("Place nothing new; repeats are answered", _DESK, (WHY,), _WHY)
RESUME = _act("Place orders again", _DESK, (WHY,), _WHY)
CONFIRM = _act(
    "Confirm what a bitcoin may cost, for so many minutes",
    ("The confirmation", EXAMPLE_CONFIRMATION),
    CONFIRMATION,
    EXAMPLE_NEW_CONFIRMATION,
)
GET_AUDIT = _read(
    "What operators did, the first act first",
    ("The acts", {"data": [act_document(EXAMPLE_ACT)]}),
    query=(AFTER, ACTS_LIMIT),
)
