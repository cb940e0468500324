"""Reading of JSON: documents of strangers as they were written, members by what they must be. All raises ValueError."""

import json
import uuid
from collections import Counter
from datetime import datetime
from typing import TypeGuard

import msgspec

from buydesk.money import CURRENCIES, CURRENCIES_TEXT, Currency
from buydesk.times import parse_time


class Number(str):
    """A JSON number as it was written: it must never pass through a float."""

    __slots__ = ()


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text, and no number."""
    return isinstance(value, str) and not isinstance(value, Number)


class Repeated(ValueError):
    """An object has members of the same name: `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"repeats {', '.join(names)}")
        self.names = names


def decode_json(text: str) -> object:
    """The document of a JSON text, its numbers as `Number`. Raises Repeated, ValueError for what is no JSON, and
    RecursionError for what is nested too deeply."""
    return _JSON.decode(text)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise Repeated([name for name in counts if counts[name] > 1])
    return members


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


_JSON = json.JSONDecoder(object_pairs_hook=_distinct, parse_float=Number, parse_int=Number, parse_constant=_no_number)


def read_object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


def read_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return value


def read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def read_integer(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError("must be an integer")
    return value


def read_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def read_currency(value: object) -> Currency:
    currency = CURRENCIES.get(read_text(value))
    if currency is None:
        raise ValueError(f"must be one of {CURRENCIES_TEXT}")
    return currency


def read_id(value: object) -> uuid.UUID:
    try:
        return msgspec.convert(read_text(value), uuid.UUID)
    except msgspec.ValidationError as error:
        raise ValueError("must be a UUID") from error


def read_time(value: object) -> datetime:
    text = read_text(value)
    try:
        return parse_time(text)
    except ValueError as error:
        raise ValueError("must be an ISO 8601 time with a zone, such as 2026-01-31T09:05:00.000000Z") from error
