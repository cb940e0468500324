"""Prices over HTTP: how a record and the status of the sources are read from a request, and how all is documented."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from buydesk.errors import (
    InvalidRequest,
    NotFound,
    PriceStale,
    PriceStoreUnavailable,
    PriceSuperseded,
    PriceUnavailable,
    PriceUnsettled,
)
from buydesk.http.examples import EXAMPLE_RECORD, EXAMPLE_STATUS
from buydesk.http.members import decode_body, whole_number
from buydesk.http.openapi import operation
from buydesk.money import Currency
from buydesk.prices.coindesk import CODES, currentprice, currentprice_of
from buydesk.prices.documents import document_of, feed_status_from, record_document, record_from
from buydesk.prices.model import (
    HISTORY_MINUTES_MAX,
    HISTORY_POINTS_MAX,
    FeedStatus,
    PriceRecord,
    require_plausible_status,
)
from buydesk.prices.verification import require_proven
from buydesk.reading import WrongMember
from buydesk.settings.model import PRICE_TTL_SECONDS_MAX, Settings

RECORD_BYTES_MAX = 256 * 1024


def parse_record(body: bytes, settings: Settings, now: datetime) -> PriceRecord:
    """The record that a JSON body is; raises InvalidRequest naming what is wrong.

    A record that is no proven price here (`require_proven`) is wrong too.
    """
    with wrong_members_named():
        record = record_from(decode_body(body))
        require_proven(record, settings, now)
        return record


def parse_state(body: bytes, settings: Settings, now: datetime) -> FeedStatus:
    """The state of the sources that a JSON body is; raises InvalidRequest naming what is wrong.

    One that is not plausible here (`require_plausible_status`) is wrong too.
    """
    with wrong_members_named():
        state = feed_status_from(decode_body(body))
        require_plausible_status(state, settings.price_feed, settings.clock_skew_seconds_max, now)
        return state


@contextmanager
def wrong_members_named() -> Iterator[None]:
    """Makes InvalidRequest of WrongMember."""
    try:
        yield
    except WrongMember as error:
        raise InvalidRequest.of(error.member, error.reason) from error


MINUTES = whole_number("minutes", "How many minutes back.", HISTORY_MINUTES_MAX, default=60)
POINTS = whole_number("points", "At most this many.", HISTORY_POINTS_MAX, default=240)
TTL = whole_number(
    "ttl",
    "Seconds from now after which the record is not valid any more. Only ever shortens, and only a new record.",
    PRICE_TTL_SECONDS_MAX,
)
_NO_PRICE = (PriceUnavailable, PriceStale, PriceUnsettled, PriceStoreUnavailable)
_RECORD = record_document(EXAMPLE_RECORD)
_STATUS = document_of(EXAMPLE_STATUS)
GET_RECORD = operation(
    "The current price record",
    ("The price", _RECORD | currentprice(EXAMPLE_RECORD)),
    errors=_NO_PRICE,
    description="Valid until `expires_at` and not longer; never an old price. With its proof: the quotes used and "
    "rejected, the rule and when it was applied. Beside the exact record it has the members of CoinDesk's retired "
    "document.",
)
GET_CURRENTPRICE = operation(
    "The current price, exactly in the shape of CoinDesk's retired document",
    ("The price", currentprice(EXAMPLE_RECORD)),
    errors=_NO_PRICE,
)
GET_CURRENTPRICE_OF = operation(
    "The current price in dollars and one currency, in the shape of CoinDesk's retired document",
    ("The price", currentprice_of(EXAMPLE_RECORD, Currency.EUR)),
    errors=(NotFound, *_NO_PRICE),
    parameters=[
        {
            "name": "code",
            "in": "path",
            "required": True,
            "description": "The currency, in any letter case.",
            "schema": {"type": "string", "enum": sorted(CODES)},
            "example": "EUR",
        }
    ],
)
GET_HISTORY = operation(
    "Past prices, oldest first",
    ("The prices", {"data": [document_of(EXAMPLE_RECORD.point())]}),
    errors=(InvalidRequest, PriceStoreUnavailable),
    description="Those observed within the last `minutes`, the latest among them. When there are more than "
    "`points`: the last one of each span of `minutes` / `points`. Spans begin at multiples of their length: the points "
    "of a chart stay where they are from one look to the next.",
    query=(MINUTES, POINTS),
)
GET_SOURCES = operation(
    "How the price sources are",
    ("The state of all sources", _STATUS),
    errors=(InvalidRequest, PriceUnavailable, PriceStoreUnavailable),
    description="As they were when they were last asked: the last quotes of each, what is wrong with it, and until "
    "when it is left alone. `problem` says why there was no new price then.",
)
POST_SOURCES = operation(
    "Tell how the price sources are (internal)",
    ("The status as stored", _STATUS),
    errors=(PriceStoreUnavailable,),
    description="Needs `Authorization: Bearer <publishing token>`. Replaces the status before.",
    body={"schema": {"type": "object"}, "example": _STATUS},
    is_internal=True,
)
POST_RECORD = operation(
    "Publish a price record (internal)",
    ("The record as published", _RECORD),
    errors=(PriceSuperseded, PriceStoreUnavailable),
    description="Needs `Authorization: Bearer <publishing token>`, and the record a signature by api_updater. "
    "Publishing the current record again is fine and changes nothing.",
    query=(TTL,),
    body={"schema": {"type": "object"}, "example": _RECORD},
    is_internal=True,
)
