"""Refusals on record over HTTP: how they are asked for and documented."""

from fastapi import Response

from buydesk.errors import InsufficientScope, InvalidRequest, LedgerUnavailable, Overloaded
from buydesk.http.app import Endpoint
from buydesk.http.examples import EXAMPLE_ORDER
from buydesk.http.members import read_query, whole_number
from buydesk.http.openapi import operation
from buydesk.http.owners import CLIENT, owner
from buydesk.http.requests import Request
from buydesk.http.responses import MsgspecResponse
from buydesk.orders.refusals import REFUSALS_MAX, Refusal, RefusalReads, refusal_document

LIMIT = whole_number("limit", "At most so many.", REFUSALS_MAX, default=100)
EXAMPLE_REFUSAL = Refusal(
    EXAMPLE_ORDER.created_at,
    EXAMPLE_ORDER.client,
    EXAMPLE_ORDER.id,
    None,
    "exposure_cap_exceeded",
    EXAMPLE_ORDER.currency,
    EXAMPLE_ORDER.amount_cents,
)
GET_REFUSALS = operation(
    "What was refused, newest first",
    ("The refusals", {"data": [refusal_document(EXAMPLE_REFUSAL)]}),
    errors=(InsufficientScope, InvalidRequest, LedgerUnavailable, Overloaded),
    description="Orders of the caller that the ledger refused: `code` says why. Kept for 30 days at most, of 60 a "
    "minute and client; those of the last second may be missing.",
    tag="orders",
    query=(LIMIT, CLIENT),
)


def refusals_route(refusals: RefusalReads) -> Endpoint:
    """Answers with the caller's refusals or, for who may read all, those of another client or all."""

    async def get_refusals(request: Request) -> Response:
        found = read_query(request, LIMIT, CLIENT)
        whose = owner(request.caller, found["client"])
        return MsgspecResponse(
            {"data": [refusal_document(each) for each in await refusals.refusals(whose.client, found["limit"])]}
        )

    return get_refusals
