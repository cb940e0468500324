"""Prices over HTTP: how a record and the status of the sources are read from a request, and how all is documented."""

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import msgspec

from buydesk.errors import (
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    PriceStale,
    PriceStoreUnavailable,
    PriceSuperseded,
    PriceUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from buydesk.http.examples import EXAMPLE_RECORD, EXAMPLE_STATUS
from buydesk.http.openapi import INTERNAL, error_responses, number_parameter, response_example
from buydesk.http.requests import require_utf8
from buydesk.money import Currency
from buydesk.prices.coindesk import CODES, currentprice, currentprice_of
from buydesk.prices.documents import (
    feed_status_document,
    feed_status_from,
    point_document,
    record_document,
    record_from,
)
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

HISTORY_MINUTES = 60
HISTORY_POINTS = 240
_Read = TypeVar("_Read")


def parse_record(body: bytes, settings: Settings, now: datetime) -> PriceRecord:
    """The record that a JSON body is; raises InvalidRequest naming what is wrong.

    A record that is no proven price here (`require_proven`) is wrong too.
    """

    def proven(document: object) -> PriceRecord:
        new = record_from(document)
        require_proven(new, settings, now)
        return new

    return _parsed(body, proven)


def parse_state(body: bytes, settings: Settings, now: datetime) -> FeedStatus:
    """The state of the sources that a JSON body is; raises InvalidRequest naming what is wrong.

    One that is not plausible here (`require_plausible_status`) is wrong too.
    """

    def plausible(document: object) -> FeedStatus:
        state = feed_status_from(document)
        require_plausible_status(state, settings.price_feed, settings.clock_skew_seconds_max, now)
        return state

    return _parsed(body, plausible)


def _parsed(body: bytes, reader: Callable[[object], _Read]) -> _Read:
    require_utf8(body)
    try:
        return reader(msgspec.json.decode(body))
    except WrongMember as error:
        raise InvalidRequest.of(error.member, error.reason) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest.of("body", "must be JSON") from error


_NO_PRICE = error_responses(PriceUnavailable, PriceStale, PriceStoreUnavailable)
GET_RECORD = {
    "summary": "The current price record",
    "description": "Valid until `expires_at` and not longer; never an old price. With its proof: the quotes used and "
    "rejected, the rule and when it was applied. Beside the exact record it has the members of CoinDesk's retired "
    "document.",
    "responses": response_example("The price", record_document(EXAMPLE_RECORD) | currentprice(EXAMPLE_RECORD))
    | _NO_PRICE,
}
GET_CURRENTPRICE = {
    "summary": "The current price, exactly in the shape of CoinDesk's retired document",
    "responses": response_example("The price", currentprice(EXAMPLE_RECORD)) | _NO_PRICE,
}
GET_CURRENTPRICE_OF = {
    "summary": "The current price in dollars and one currency, in the shape of CoinDesk's retired document",
    "parameters": [
        {
            "name": "code",
            "in": "path",
            "required": True,
            "description": "The currency, in any letter case.",
            "schema": {"type": "string", "enum": sorted(CODES)},
            "example": "EUR",
        }
    ],
    "responses": response_example("The price", currentprice_of(EXAMPLE_RECORD, Currency.EUR))
    | error_responses(NotFound)
    | _NO_PRICE,
}
GET_HISTORY = {
    "summary": "Past prices, oldest first",
    "description": "Those observed within the last `minutes`, the latest among them. When there are more than "
    "`points`: the last one of each span of `minutes` / `points`. Spans begin at multiples of their length: the points "
    "of a chart stay where they are from one look to the next.",
    "parameters": [
        number_parameter("minutes", "How many minutes back.", HISTORY_MINUTES_MAX, HISTORY_MINUTES),
        number_parameter("points", "At most this many.", HISTORY_POINTS_MAX, HISTORY_POINTS),
    ],
    "responses": response_example("The prices", {"data": [point_document(EXAMPLE_RECORD.point())]})
    | error_responses(InvalidRequest, PriceStoreUnavailable),
}
GET_SOURCES = {
    "summary": "How the price sources are",
    "description": "As they were when they were last asked: the last quotes of each, what is wrong with it, and until "
    "when it is left alone. `problem` says why there was no new price then.",
    "responses": response_example("The state of all sources", feed_status_document(EXAMPLE_STATUS))
    | error_responses(InvalidRequest, PriceUnavailable, PriceStoreUnavailable),
}
POST_SOURCES = {
    "summary": "Tell how the price sources are (internal)",
    "description": "Needs `Authorization: Bearer <publishing token>`. Replaces the status before.",
    "security": INTERNAL,
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}, "example": feed_status_document(EXAMPLE_STATUS)}
        },
    },
    "responses": response_example("The status as stored", feed_status_document(EXAMPLE_STATUS))
    | error_responses(Unauthorized, InvalidRequest, PayloadTooLarge, UnsupportedMediaType, PriceStoreUnavailable),
}
POST_RECORD = {
    "summary": "Publish a price record (internal)",
    "description": "Needs `Authorization: Bearer <publishing token>`, and the record a signature by api_updater. "
    "Publishing the current record again is fine and changes nothing.",
    "security": INTERNAL,
    "parameters": [
        number_parameter(
            "ttl",
            "Seconds from now after which the record is not valid any more. Only ever shortens, and only a new record.",
            PRICE_TTL_SECONDS_MAX,
        )
    ],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "example": record_document(EXAMPLE_RECORD)}},
    },
    "responses": response_example("The record as published", record_document(EXAMPLE_RECORD))
    | error_responses(
        Unauthorized, InvalidRequest, PayloadTooLarge, UnsupportedMediaType, PriceSuperseded, PriceStoreUnavailable
    ),
}
