"""Operators' acts over HTTP: how each is read, and how what they read and change is written."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from buydesk.clients.audit import Act
from buydesk.clients.keys import ID_PATTERN
from buydesk.clients.model import NewKey, StoredKey
from buydesk.clients.rates import PER_MINUTE_MAX
from buydesk.clients.registry import (
    Client,
    ClientState,
    Desk,
    DeskState,
    Limits,
    parse_client,
    parse_network,
    parse_scope,
)
from buydesk.clients.scopes import SCOPES
from buydesk.errors import InvalidRequest
from buydesk.http.members import Member, Reasons, json_members, read_members, unknown
from buydesk.http.order_members import AMOUNT_TEXT_SCHEMA
from buydesk.http.registry import NAME_SCHEMA
from buydesk.http.requests import Request, require_json
from buydesk.money import (
    CURRENCIES,
    CURRENCIES_TEXT,
    MARKUP_BP_MAX,
    Currency,
    format_btc,
    format_cents,
    parse_amount,
    parse_btc,
    parse_markup,
    parse_rate,
)
from buydesk.orders.model import Exposure
from buydesk.prices.anchors import CONFIRMED_MINUTES_MAX, WHY_CHARS_MAX, NewConfirmation
from buydesk.reading import LINE_PATTERN, Number, is_text, parse_line
from buydesk.settings.types import QUOTE_SECONDS_MAX, QUOTE_SECONDS_MIN
from buydesk.times import format_time, parse_time, utc_now

OVERLAP_SECONDS = 24 * 3600
OVERLAP_SECONDS_MAX = 90 * 24 * 3600
NETWORKS_MAX = 100
_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0{1,18})?", re.ASCII)  # 7.0 is an integer too, says JSON Schema
_COUNTS = {"open": True, "stored": False}


def _text(value: object) -> str:
    if not is_text(value):
        raise ValueError("must be text")
    return value


def _or_none(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _client(value: object) -> str:
    return parse_client(_text(value))


def _btc(value: object) -> int:
    return parse_btc(_text(value))


def whole_number_up_to(highest: int, lowest: int = 1) -> Callable[[object], int]:
    """Reads a member that is a whole number from `lowest` to `highest`, a JSON number."""

    def parse(value: object) -> int:
        digits = _whole_text(value)
        if not digits or not lowest <= int(digits) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(digits)

    return parse


def _by_currency(what: str, parse: Callable[[object], int]) -> Callable[[object], dict[Currency, int | None]]:
    """Reads an object of such values by currency, null for one that is to go; what is wrong with one says `parse`."""

    def parse_all(value: object) -> dict[Currency, int | None]:
        if not isinstance(value, dict):
            raise ValueError(f"must be an object of {what} by currency")
        found: dict[Currency, int | None] = {}
        for name, each in value.items():
            if name not in CURRENCIES:
                raise ValueError(f"may have {CURRENCIES_TEXT}, not {name[:20]}")
            try:
                found[CURRENCIES[name]] = None if each is None else parse(each)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
        return found

    return parse_all


def _amount_cents(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("must be an amount as text, or null")
    return parse_amount(value)


def _markup_bp(value: object) -> int:
    return parse_markup(_whole_text(value))


def _whole_text(value: object) -> str:
    """The digits of a JSON number that is a whole one, "" for anything else."""
    number = _WHOLE.fullmatch(value) if isinstance(value, Number) else None
    return number[1] if number else ""


def _scopes(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of scopes")
    return sorted({parse_scope(_text(each)) for each in value})


def _networks(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > NETWORKS_MAX:
        raise ValueError(f"must be a list of at most {NETWORKS_MAX} networks")
    return [parse_network(_text(each)) for each in value]


def _end(value: object) -> datetime:
    moment = parse_time(_text(value))
    if moment <= utc_now():
        raise ValueError("must be in the future")
    return moment


def _more_than_0(value: object) -> int:
    if not (satoshi := _btc(value)):
        raise ValueError("must be more than 0")
    return satoshi


def _currency(value: object) -> Currency:
    if not is_text(value) or value not in CURRENCIES:
        raise ValueError(f"must be one of {CURRENCIES_TEXT}")
    return CURRENCIES[value]


def _rate_e8(value: object) -> int:
    return parse_rate(_text(value))


def _open_only(value: object) -> bool:
    if not is_text(value) or value not in _COUNTS:
        raise ValueError("must be open or stored")
    return _COUNTS[value]


_NUMBER = {"type": ["integer", "null"], "minimum": 1, "maximum": PER_MINUTE_MAX}
_BTC = {
    "type": "string",
    "pattern": r"^[0-9]{1,7}(\.[0-9]{1,8})?$",
    "examples": ["1.5"],
    "description": "BTC, as decimal text.",
}
_BTC_OR_NULL = _BTC | {"type": ["string", "null"]}
_RATE = Member("rate_per_minute", _or_none(whole_number_up_to(PER_MINUTE_MAX)), _NUMBER, default=msgspec.UNSET)
WHY = Member(
    "why",
    lambda value: parse_line(_text(value), WHY_CHARS_MAX),
    {"type": "string", "minLength": 1, "maxLength": WHY_CHARS_MAX, "pattern": LINE_PATTERN},
    is_required=True,
)
NAME = Member("client", _client, NAME_SCHEMA, is_required=True)
LIMITS = (
    Member("cap", _or_none(_btc), _BTC_OR_NULL, default=msgspec.UNSET),
    Member("largest_order", _or_none(_more_than_0), _BTC_OR_NULL, default=msgspec.UNSET),
    Member(
        "daily_limits",
        _by_currency("amounts", _amount_cents),
        {
            "type": "object",
            "propertyNames": {"enum": list(Currency)},
            "additionalProperties": AMOUNT_TEXT_SCHEMA | {"type": ["string", "null"]},
            "examples": [{"EUR": "1000.00"}],
        },
        default=msgspec.UNSET,
    ),
    Member(
        "markup_bp",
        _by_currency("basis points", _markup_bp),
        {
            "type": "object",
            "propertyNames": {"enum": list(Currency)},
            "additionalProperties": {"type": ["integer", "null"], "minimum": 0, "maximum": MARKUP_BP_MAX},
            "description": "On the market's rate, in 0.01 %; null for the desk's own.",
            "examples": [{"EUR": 75}],
        },
        default=msgspec.UNSET,
    ),
    Member(
        "quote_seconds_max",
        _or_none(whole_number_up_to(QUOTE_SECONDS_MAX, QUOTE_SECONDS_MIN)),
        _NUMBER
        | {
            "minimum": QUOTE_SECONDS_MIN,
            "maximum": QUOTE_SECONDS_MAX,
            "description": "How long its quotes may be valid; null for the desk's own.",
        },
        default=msgspec.UNSET,
    ),
    _RATE,
)
NEW_KEY = (
    NAME,
    Member(
        "scopes",
        _scopes,
        {"type": "array", "minItems": 1, "items": {"type": "string", "enum": sorted(SCOPES)}},
        is_required=True,
    ),
    Member(
        "allow_from", _networks, {"type": "array", "maxItems": NETWORKS_MAX, "items": {"type": "string"}}, default=()
    ),
    Member("expires_at", _or_none(_end), {"type": ["string", "null"], "format": "date-time"}),
    _RATE._replace(default=None),
)
OF_CLIENT = NAME._replace(is_required=False, description="Of this client; without it, all.")
OVERLAP = Member(
    "overlap_seconds",
    whole_number_up_to(OVERLAP_SECONDS_MAX),
    {"type": "integer", "minimum": 1, "maximum": OVERLAP_SECONDS_MAX, "default": OVERLAP_SECONDS},
    default=OVERLAP_SECONDS,
)
CAP = Member("cap", _btc, _BTC, is_required=True)
_RATE_TEXT = {
    "type": "string",
    "pattern": r"^[1-9][0-9]{0,8}(\.[0-9]{1,8})?$",
    "description": "Decimal text, both ends included; `to` is at most half as much again as `from`.",
    "examples": ["15000.00"],
}
CONFIRMATION = (
    Member("currency", _currency, {"type": "string", "enum": list(Currency)}, is_required=True),
    Member("from", _rate_e8, _RATE_TEXT, is_required=True),
    Member("to", _rate_e8, _RATE_TEXT, is_required=True),
    Member(
        "minutes",
        whole_number_up_to(CONFIRMED_MINUTES_MAX),
        {"type": "integer", "minimum": 1, "maximum": CONFIRMED_MINUTES_MAX},
        is_required=True,
    ),
    WHY,
)
COUNTS = (
    Member("client", _or_none(_client), NAME_SCHEMA | {"type": ["string", "null"]}),
    Member("counts", _open_only, {"type": "string", "enum": list(_COUNTS)}, is_required=True),
)


async def read_act(request: Request, *members: Member) -> dict[str, Any]:
    """The members of an act's body; raises InvalidRequest naming every one that is wrong."""
    require_json(request)
    given = json_members(await request.body())
    reasons: Reasons = []
    found = read_members(given, members, reasons)
    reasons += unknown(given, members, "this")
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return found


def limits_of(found: Mapping[str, Any]) -> Limits:
    """The limits among the members."""
    return Limits(
        cap_satoshi=found["cap"],
        order_satoshi_max=found["largest_order"],
        rate_per_minute=found["rate_per_minute"],
        daily_cents_max=found["daily_limits"],
        markup_bp=found["markup_bp"],
        quote_seconds_max=found["quote_seconds_max"],
    )


def new_key_of(found: Mapping[str, Any]) -> NewKey:
    """The key that the members describe."""
    return NewKey(**{each.name: found[each.name] for each in NEW_KEY})


def confirmation_of(found: Mapping[str, Any]) -> NewConfirmation:
    """The confirmation that the members describe. Whether it may be kept, `require_confirmable` says."""
    return NewConfirmation(found["currency"], found["from"], found["to"], found["why"], found["minutes"])


def client_document(client: Client) -> dict[str, object]:
    """A client, for operators."""
    bought = {"orders": client.orders, "used": format_btc(client.used_satoshi)}
    return {**set_of_client(client.name, client), **bought, "keys": client.keys}


def set_of_client(name: str, found: Client | ClientState) -> dict[str, object]:
    """What is set of a client."""
    return {
        "client": name,
        "cap": _btc_text(found.cap_satoshi),
        "cap_counts": _counts_text(open_only=found.cap_counts_open),
        "largest_order": _btc_text(found.order_satoshi_max),
        "daily_limits": {currency: format_cents(cents) for currency, cents in found.daily_cents_max.items()},
        "markup_bp": found.markup_bp,
        "quote_seconds_max": found.quote_seconds_max,
        "rate_per_minute": found.rate_per_minute,
    }


def set_of_desk(found: DeskState) -> dict[str, object]:
    """What is set of the desk."""
    return {
        "paused": found.paused,
        "cap": format_btc(found.cap_satoshi),
        "cap_counts": _counts_text(open_only=found.cap_counts_open),
    }


def key_document(key: StoredKey) -> dict[str, object]:
    """A key, for operators: all but what is stored of its text."""
    return {
        "id": key.id,
        "client": key.client,
        "scopes": key.scopes,
        "allow_from": key.allow_from,
        "expires_at": _time_text(key.expires_at),
        "revoked_at": _time_text(key.revoked_at),
        "last_used_on": key.last_used_on,
        "rate_per_minute": key.rate_per_minute,
    }


def desk_document(desk: Desk) -> dict[str, object]:
    """The desk, for operators."""
    return {
        "livemode": desk.livemode,
        "paused": desk.paused,
        **Exposure(desk.cap_satoshi, desk.used_satoshi, desk.orders).facts(),
        "cap_counts": _counts_text(open_only=desk.cap_counts_open),
        "orders": desk.orders,
    }


def act_document(act: Act) -> dict[str, object]:
    """An act of the record."""
    document: dict[str, object] = msgspec.to_builtins(act)
    return document | {"at": format_time(act.at), "hash": act.hash.hex()}


def _counts_text(*, open_only: bool) -> str:
    return "open" if open_only else "stored"


def _btc_text(satoshi: int | None) -> str | None:
    return None if satoshi is None else format_btc(satoshi)


def _time_text(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


KEY_ID: dict[str, object] = {
    "name": "key_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": ID_PATTERN},
}
