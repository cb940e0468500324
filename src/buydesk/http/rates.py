"""Counts of requests between services over HTTP: the route, and how it is documented."""

from typing import Annotated

import msgspec
from fastapi import Response

from buydesk.clients.rates import COUNTER_CHARS_MAX, LOTS_MAX, PER_MINUTE_MAX, Count, Lot, RateStore
from buydesk.errors import RatesUnavailable
from buydesk.http.app import Service
from buydesk.http.members import decode_body, read_query
from buydesk.http.openapi import operation
from buydesk.http.prices import wrong_members_named
from buydesk.http.requests import Request, require_json, require_token
from buydesk.http.responses import MsgspecResponse
from buydesk.reading import read
from buydesk.settings.model import Settings
from buydesk.settings.types import tokens

LOTS_BYTES_MAX = 64 * 1024


class _Lots(msgspec.Struct):
    lots: Annotated[list[Lot], msgspec.Meta(max_length=LOTS_MAX)]


_NUMBER = {"type": "integer", "minimum": 0, "maximum": PER_MINUTE_MAX}
_LOT_SCHEMA = {
    "type": "object",
    "properties": {
        "counter": {"type": "string", "minLength": 1, "maxLength": COUNTER_CHARS_MAX},
        "per_minute": _NUMBER | {"minimum": 1},
        "requests": _NUMBER,
    },
    "required": ["counter", "per_minute", "requests"],
}
COUNT_REQUESTS = operation(
    "Count requests that were let through",
    (
        "One count each: what was taken, and the requests in this minute and in the one before",
        {"data": [Count(6, 54, 9, 12.5)]},
    ),
    errors=(RatesUnavailable,),
    description="Needs `Authorization: Bearer <counting token>`. Each lot is taken as far as there is room below its "
    "limit; one without requests only asks. `seconds` are left of this minute; the one before counts the less the "
    "fewer they are.",
    tag="internal",
    body={
        "schema": {
            "type": "object",
            "properties": {"lots": {"type": "array", "maxItems": LOTS_MAX, "items": _LOT_SCHEMA}},
            "required": ["lots"],
        },
        "example": {"lots": [Lot("orders:client:shop", 60, 6)]},
    },
    is_internal=True,
)


def add_rate_routes(app: Service, rates: RateStore, settings: Settings) -> None:
    """The route for the services that callers call."""
    may_count = tokens(settings.counting_tokens)

    async def count(request: Request) -> Response:
        require_token(request, may_count)
        require_json(request)
        read_query(request)
        with wrong_members_named():
            given = read(_Lots, decode_body(await request.body(LOTS_BYTES_MAX)), "body")
        return MsgspecResponse({"data": await rates.take(given.lots)})

    app.add_direct_route("/rates/", "POST", count, COUNT_REQUESTS)
