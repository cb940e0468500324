"""Price records, points and the state of the sources as JSON documents, and back."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from buydesk.money import Currency, format_rate, parse_rate
from buydesk.prices.model import (
    Feed,
    FeedStatus,
    NotARecord,
    PricePoint,
    PriceRecord,
    Quote,
    RejectedQuote,
    Rule,
    Signature,
    SourceStatus,
)
from buydesk.reading import read_currency, read_id, read_integer, read_list, read_object, read_text, read_time
from buydesk.times import format_time

# No setting allows more, and dates can still be computed with this many seconds.
_LIMIT_MAX = 1_000_000

_Read = TypeVar("_Read")


def record_document(record: PriceRecord) -> dict[str, object]:
    """The record as JSON members; `record_from` reads them back."""
    return {
        "id": str(record.id),
        "as_of": format_time(record.as_of),
        "expires_at": format_time(record.expires_at),
        "feed": record.feed,
        "replayed_from": format_time(record.replayed_from) if record.replayed_from else None,
        "rates": _rates_document(record.rates_e8),
        "sources": {
            "used": [_quote_document(quote) for quote in record.used],
            "rejected": [
                {"source": each.source, "reason": each.reason, "quote": each.quote and _quote_document(each.quote)}
                for each in record.rejected
            ],
        },
        "rule": record.rule and asdict(record.rule),
        "decided_at": record.decided_at and format_time(record.decided_at),
        "signature": record.signature and _signature_document(record.signature),
    }


def record_from(document: object) -> PriceRecord:
    """The record of a document made by `record_document`; further members are ignored.

    Raises NotARecord for anything else.
    """
    record = _read({"record": document}, "record", read_object)
    sources = _read(record, "sources", read_object)
    return PriceRecord(
        id=_read(record, "id", read_id),
        as_of=_read(record, "as_of", read_time),
        expires_at=_read(record, "expires_at", read_time),
        feed=_read(record, "feed", _feed),
        replayed_from=_optional(record, "replayed_from", read_time),
        rates_e8=_rates(_read(record, "rates", read_object), "rates."),
        used=tuple(_quote(quote, where) for where, quote in _items(sources, "used")),
        rejected=tuple(_rejection(each, where) for where, each in _items(sources, "rejected")),
        rule=_optional(record, "rule", _rule),
        decided_at=_optional(record, "decided_at", read_time),
        signature=_optional(record, "signature", _signature),
    )


def point_document(point: PricePoint) -> dict[str, object]:
    """The point as JSON members; `point_from` reads them back."""
    return {
        "id": str(point.id),
        "as_of": format_time(point.as_of),
        "rates": _rates_document(point.rates_e8),
        "replayed_from": point.replayed_from and format_time(point.replayed_from),
    }


def point_from(document: object) -> PricePoint:
    """The point of a document made by `point_document`; raises NotARecord for anything else."""
    point = _read({"point": document}, "point", read_object)
    return PricePoint(
        _read(point, "id", read_id),
        _read(point, "as_of", read_time),
        _rates(_read(point, "rates", read_object), "rates."),
        _optional(point, "replayed_from", read_time),
    )


def feed_status_document(state: FeedStatus) -> dict[str, object]:
    """The state of the sources as JSON members; `feed_status_from` reads them back."""
    return {
        "at": format_time(state.at),
        "feed": state.feed,
        "problem": state.problem,
        "sources": [
            {
                "source": each.source,
                "detail": each.detail,
                "failures": each.failures,
                "mids": each.mids_e8 and _rates_document(each.mids_e8),
                "quoted_at": each.quoted_at and format_time(each.quoted_at),
                "resting_until": each.resting_until and format_time(each.resting_until),
                "last_error": each.last_error,
                "failed_at": each.failed_at and format_time(each.failed_at),
            }
            for each in state.sources
        ],
    }


def feed_status_from(document: object) -> FeedStatus:
    """The state of a document made by `feed_status_document`; raises NotARecord for anything else."""
    state = _read({"state": document}, "state", read_object)
    return FeedStatus(
        _read(state, "at", read_time),
        _read(state, "feed", _feed),
        _read(state, "problem", read_text),
        tuple(_source_state(each, where) for where, each in _items(state, "sources", "")),
    )


def _read(document: Mapping[str, object], name: str, reader: Callable[[object], _Read], where: str = "") -> _Read:
    """A member through its reader; whatever is wrong with it becomes NotARecord with the path of the member."""
    if name not in document:
        raise NotARecord(where + name, "is missing")
    try:
        return reader(document[name])
    except NotARecord:  # of a member further in, which it names
        raise
    except ValueError as error:
        raise NotARecord(where + name, str(error)) from error


def _optional(
    document: Mapping[str, object], name: str, reader: Callable[[Any], _Read], where: str = ""
) -> _Read | None:
    """A member that may be null or missing: documents of earlier versions have less."""
    return None if document.get(name) is None else _read(document, name, reader, where)


def _items(
    document: Mapping[str, object], name: str, where: str = "sources."
) -> list[tuple[str, Mapping[str, object]]]:
    """The objects of a list, each with the prefix of its members' paths."""
    items = _read(document, name, read_list, where)
    where = f"{where}{name}."
    by_number = {str(number): item for number, item in enumerate(items)}
    return [(f"{where}{number}.", _read(by_number, number, read_object, where)) for number in by_number]


def _quote_document(quote: Quote) -> dict[str, object]:
    return {
        "source": quote.source,
        "currency": quote.currency.value,
        "bid": format_rate(quote.bid_e8),
        "ask": format_rate(quote.ask_e8),
        "observed_at": format_time(quote.observed_at),
    }


def _quote(quote: Mapping[str, object], where: str) -> Quote:
    return Quote(
        _read(quote, "source", read_text, where),
        _read(quote, "currency", read_currency, where),
        _read(quote, "bid", _rate, where),
        _read(quote, "ask", _rate, where),
        _read(quote, "observed_at", read_time, where),
    )


def _rejection(rejection: Mapping[str, object], where: str) -> RejectedQuote:
    quote = _optional(rejection, "quote", read_object, where)
    return RejectedQuote(
        _read(rejection, "source", read_text, where),
        _read(rejection, "reason", read_text, where),
        None if quote is None else _quote(quote, f"{where}quote."),
    )


def _source_state(state: Mapping[str, object], where: str) -> SourceStatus:
    mids = _optional(state, "mids", read_object, where)
    return SourceStatus(
        _read(state, "source", read_text, where),
        _read(state, "detail", read_text, where),
        _read(state, "failures", read_integer, where),
        None if mids is None else _rates(mids, f"{where}mids."),
        _optional(state, "quoted_at", read_time, where),
        _optional(state, "resting_until", read_time, where),
        _optional(state, "last_error", read_text, where) or "",
        _optional(state, "failed_at", read_time, where),
    )


def _rule(value: object) -> Rule:
    rule = read_object(value)
    return Rule(**{field.name: _read(rule, field.name, _limit, "rule.") for field in fields(Rule)})


def _signature_document(signature: Signature) -> dict[str, str]:
    return {"key": signature.key, "value": signature.value, "expires_at": format_time(signature.expires_at)}


def _signature(value: object) -> Signature:
    signature, where = read_object(value), "signature."
    return Signature(
        _read(signature, "key", read_text, where),
        _read(signature, "value", read_text, where),
        _read(signature, "expires_at", read_time, where),
    )


def _limit(value: object) -> int:
    limit = read_integer(value)
    if not 0 <= limit <= _LIMIT_MAX:
        raise ValueError(f"must be between 0 and {_LIMIT_MAX}")
    return limit


def _rates_document(rates_e8: Mapping[Currency, int]) -> dict[str, str]:
    return {currency.value: format_rate(rate_e8) for currency, rate_e8 in rates_e8.items()}


def _rates(rates: Mapping[str, object], where: str) -> dict[Currency, int]:
    """Those that there are: a record is older than a currency that was added since."""
    return {currency: _read(rates, currency.value, _rate, where) for currency in Currency if currency.value in rates}


def _feed(value: object) -> Feed:
    if value not in ("sandbox", "live"):
        raise ValueError("must be sandbox or live")
    return value


def _rate(value: object) -> int:
    return parse_rate(read_text(value))
