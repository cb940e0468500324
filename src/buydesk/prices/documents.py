"""Price records, points and the state of the sources as JSON documents, and back."""

import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from buydesk.money import Currency, format_rate
from buydesk.prices.model import FeedStatus, PricePoint, PriceRecord, Quote, RejectedQuote, Written
from buydesk.reading import read
from buydesk.times import format_time


class _Sources(msgspec.Struct):
    """Where a record's document has its quotes."""

    used: tuple[Quote, ...]
    rejected: tuple[RejectedQuote, ...]


class _WithSources(msgspec.Struct):
    sources: _Sources


def record_document(record: PriceRecord) -> dict[str, object]:
    """The record as JSON members; `record_from` reads them back."""
    document = document_of(record)
    document["sources"] = {name: document.pop(name) for name in ("used", "rejected")}
    if record.rule is None or record.rule.version == 1:  # as they were signed
        for name in ("bids", "asks", "missing", "unsettled"):
            del document[name]
    return document


def record_from(document: object) -> PriceRecord:
    """The record of a document made by `record_document`; further members are ignored.

    Raises WrongMember for anything else.
    """
    record = read(PriceRecord, document, "record")
    sources = read(_WithSources, document).sources
    return msgspec.structs.replace(record, used=sources.used, rejected=sources.rejected)


def point_from(document: object) -> PricePoint:
    """The point of a document made by `document_of`; raises WrongMember for anything else."""
    return read(PricePoint, document, "point")


def feed_status_from(document: object) -> FeedStatus:
    """The state of a document made by `document_of`; raises WrongMember for anything else."""
    return read(FeedStatus, document, "state")


def document_of(written: Written) -> dict[str, Any]:
    """What is written as JSON members, under their names in documents, values as text."""
    names = zip(written.__struct_fields__, written.__struct_encode_fields__, strict=True)
    members = {shown: _value(getattr(written, name), name) for name, shown in names}
    if written.__struct_config__.omit_defaults:
        return {name: value for name, value in members.items() if value is not None}
    return members


def _value(value: Any, name: str) -> object:
    """The value of the member `name`, by whose suffix rates are known."""
    if write := _WRITERS.get(type(value)):
        return write(value)
    if isinstance(value, int) and name.endswith("_e8"):
        return format_rate(value)
    if isinstance(value, tuple):
        return [document_of(each) for each in value]
    return document_of(value) if isinstance(value, Written) else value


def _by_currency(values: Mapping[Currency, Any]) -> dict[str, object]:
    """Rates, or what else there is for each currency."""
    return {currency.value: _value(value, "rate_e8") for currency, value in values.items()}


_WRITERS: dict[type, Callable[[Any], object]] = {
    str: str,
    Currency: str,
    uuid.UUID: str,
    datetime: format_time,
    dict: _by_currency,
}
