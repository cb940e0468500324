"""Keys between services over HTTP: the routes, and how they are documented."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from fastapi import Response

from buydesk.clients.keys import ID_PATTERN
from buydesk.clients.model import KEY_READERS, NOTED_AT_ONCE_MAX, KeyStore, StoredKey
from buydesk.errors import InvalidRequest, LedgerUnavailable, Overloaded
from buydesk.http.app import Service
from buydesk.http.members import decode_body
from buydesk.http.openapi import operation
from buydesk.http.prices import wrong_members_named
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.reading import read
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens

_ID = re.compile(ID_PATTERN)


def read_key_id(request: Request) -> str:
    """The id of a key in the path; raises InvalidRequest."""
    if not _ID.fullmatch(request.parameter):
        raise InvalidRequest.of("id", "must be the id of a key")
    return request.parameter


class _Used(msgspec.Struct):
    ids: Annotated[list[Annotated[str, msgspec.Meta(pattern=ID_PATTERN)]], msgspec.Meta(max_length=NOTED_AT_ONCE_MAX)]


_USED_SCHEMA = {
    "type": "object",
    "properties": {
        "ids": {"type": "array", "maxItems": NOTED_AT_ONCE_MAX, "items": {"type": "string", "pattern": ID_PATTERN}}
    },
    "required": ["ids"],
}
_EXAMPLE = StoredKey(
    "0dq4VmB9xK",
    "anonymous",
    bytes(32),
    ["orders:create", "orders:read"],
    [],
    None,
    None,
    datetime(2026, 1, 31, tzinfo=UTC).date(),
)
_PARAMETERS: list[Any] = [
    {"name": "key_id", "in": "path", "required": True, "schema": {"type": "string", "pattern": ID_PATTERN}}
]
GET_KEY = operation(
    "The key with an id",
    ("The key, or null", {"key": _EXAMPLE}),
    errors=(InvalidRequest, LedgerUnavailable, Overloaded),
    description="`digest` is the SHA-256 of its text, in Base64.",
    tag="internal",
    parameters=_PARAMETERS,
    is_internal=True,
)
NOTE_KEYS_USED = operation(
    "Note that keys were used today",
    ("It is noted", {}),
    errors=(LedgerUnavailable, Overloaded),
    tag="internal",
    body={"schema": _USED_SCHEMA, "example": {"ids": [_EXAMPLE.id]}},
    is_internal=True,
)


def add_key_routes(app: Service, keys: KeyStore, settings: Settings) -> None:
    """The routes for the services that callers call."""
    may_ask = tuple(token for name in KEY_READERS for token in tokens(getattr(settings, name)))

    async def key(request: Request) -> Response:
        require_token(request, may_ask)
        return MsgspecResponse({"key": await keys.key(read_key_id(request))})

    async def note_used(request: Request) -> Response:
        require_token(request, may_ask)
        require_json(request)
        with wrong_members_named():
            used = read(_Used, decode_body(await request.body()), "body")
        await keys.note_used(used.ids)
        return MsgspecResponse({})

    app.add_direct_route("/keys/{key_id}", "GET", key, GET_KEY)
    app.add_direct_route("/keys/used", "POST", note_used, NOTE_KEYS_USED)
