"""Reading: the members of JSON documents between services; a ValueError says what a value must be."""

import uuid
from datetime import datetime

import msgspec

from buydesk.money import CURRENCIES, CURRENCIES_TEXT, Currency
from buydesk.times import parse_time


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
