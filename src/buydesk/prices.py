"""Prices: quotes, the price record made of them, the freshness rule; the ports PriceBoard and PriceSource."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol, TypeVar

from buydesk.errors import PriceStale, PriceSuperseded, PriceUnavailable, SourceFailed
from buydesk.money import Currency, format_rate, parse_rate
from buydesk.reading import read_currency, read_id, read_list, read_object, read_text, read_time
from buydesk.times import format_time

Feed = Literal["sandbox", "live"]

HISTORY_MINUTES_MAX = 24 * 60
# For so long after its observation the last record is kept: to show history, and to tell stale from none.
KEPT_FOR = timedelta(minutes=HISTORY_MINUTES_MAX)
_RETRY_AFTER_SECONDS = 5

_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Quote:
    """What one source asked and bid for a bitcoin (`rate_e8` units) and when that was observed."""

    source: str
    currency: Currency
    bid_e8: int
    ask_e8: int
    observed_at: datetime

    @property
    def mid_e8(self) -> int:
        """The middle of bid and ask; half of 10^-8 is rounded up."""
        return -(-(self.bid_e8 + self.ask_e8) // 2)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A source, or one of its quotes, that was not used, and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class PriceRecord:
    """The market price at one moment, with its proof.

    `as_of` is when the oldest quote used was observed. The record may be used until `expires_at` and not longer.
    `replayed_from` is the historic minute a sandbox record shows; None on the live feed.
    """

    id: uuid.UUID
    as_of: datetime
    expires_at: datetime
    feed: Feed
    rates_e8: Mapping[Currency, int]
    used: tuple[Quote, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    replayed_from: datetime | None = None

    def require_fresh(self, now: datetime) -> None:
        """The freshness rule: raises PriceStale once `expires_at` has come. Reading a stale record is an error."""
        if now >= self.expires_at:
            raise stale(self.as_of, self.expires_at)

    def shortened(self, ttl: timedelta, now: datetime) -> "PriceRecord":
        """The record, valid for `ttl` from now at the most; nothing ever makes it valid for longer than it was."""
        return replace(self, expires_at=min(self.expires_at, now + ttl))


@dataclass(frozen=True, slots=True)
class Observation:
    """What a source says when it is asked. `replayed_from` is the historic minute it replays; None for a market."""

    quotes: tuple[Quote, ...]
    replayed_from: datetime | None = None


class NotARecord(ValueError):
    """The document is not a price record: `member` says where, `reason` why."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member = member
        self.reason = reason


class PriceSource(Protocol):
    """Somewhere quotes come from."""

    name: str

    async def quotes(self) -> Observation:
        """The present quotes; raises SourceFailed."""
        ...

    async def close(self) -> None: ...


class PriceBoard(Protocol):
    """Where the current price record hangs, and those of the last day."""

    async def publish(self, record: PriceRecord) -> None:
        """Hangs a record; raises PriceSuperseded if a newer one hangs already, PriceBoardUnavailable.

        One from the future (`observed_by`) is not newer: it gives way, and leaves the history.
        The record that hangs may be published again: of its two `expires_at` the earlier one holds.
        """
        ...

    async def latest(self) -> PriceRecord:
        """The valid record; raises PriceUnavailable (none within a day, or of the future), PriceStale,
        PriceBoardUnavailable."""
        ...

    async def history(self, minutes: int) -> Sequence[PriceRecord]:
        """The records observed within the last `minutes` (1 to HISTORY_MINUTES_MAX), oldest first."""
        ...

    async def check(self) -> None:
        """Raises PriceBoardUnavailable when the board cannot be used."""
        ...

    async def close(self) -> None: ...


def stale(as_of: datetime, expires_at: datetime) -> PriceStale:
    """The refusal to show a price that has expired."""
    return PriceStale(
        f"The last price was observed at {format_time(as_of)} and could be used until {format_time(expires_at)}.",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
        as_of=format_time(as_of),
        expires_at=format_time(expires_at),
    )


def superseded(hanging_as_of: datetime) -> PriceSuperseded:
    """The refusal to hang a record in the place of a newer one."""
    text = format_time(hanging_as_of)
    return PriceSuperseded(f"A record observed at {text} hangs already.", as_of=text)


def valid_record(hanging: PriceRecord | None, now: datetime, skew_seconds_max: float) -> PriceRecord:
    """The record that hangs, if it may be used now; raises PriceUnavailable if there is none, or PriceStale.

    One from the future (`observed_by`) is none: the clock was set back since, and its `expires_at` means nothing.
    """
    if hanging is None or now - hanging.as_of >= KEPT_FOR or hanging.as_of > observed_by(now, skew_seconds_max):
        raise PriceUnavailable(
            "No price has been observed within the last day.", retry_after_seconds=_RETRY_AFTER_SECONDS
        )
    hanging.require_fresh(now)
    return hanging


def observed_by(now: datetime, skew_seconds_max: float) -> datetime:
    """The latest `as_of` that a record can have now. A later one is from the future, and any record replaces it."""
    return now + timedelta(seconds=skew_seconds_max)


def require_plausible(
    record: PriceRecord, feed: Feed, ttl_seconds_max: float, skew_seconds_max: float, now: datetime
) -> None:
    """Raises NotARecord for a record of another feed, one from the future and one valid for longer than allowed.

    Whatever the settings or the clock of its sender are, none of these may become a price.
    """
    if record.feed != feed:
        raise NotARecord("feed", f"must be {feed}, the feed of this desk")
    if record.as_of > observed_by(now, skew_seconds_max):
        raise NotARecord("as_of", f"must not lie more than {skew_seconds_max:g} s in the future")
    if record.expires_at <= record.as_of:
        raise NotARecord("expires_at", "must be later than as_of")
    if record.expires_at - record.as_of > timedelta(seconds=ttl_seconds_max):
        raise NotARecord("expires_at", f"must not be more than {ttl_seconds_max:g} s after as_of")


def price_record(
    quotes: Sequence[Quote],
    rejected: Sequence[Rejection],
    feed: Feed,
    ttl: timedelta,
    replayed_from: datetime | None = None,
) -> PriceRecord:
    """The record that one source's quotes make; raises SourceFailed unless every currency has exactly one quote."""
    by_currency = {quote.currency: quote for quote in quotes}
    missing = [currency.value for currency in Currency if currency not in by_currency]
    if missing:
        raise SourceFailed(f"There is no usable quote for {', '.join(missing)}.")
    if len(quotes) > len(by_currency):
        raise SourceFailed("There is more than one quote for a currency.")
    as_of = min(quote.observed_at for quote in quotes)
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + ttl,
        feed=feed,
        rates_e8={currency: by_currency[currency].mid_e8 for currency in Currency},
        used=tuple(by_currency.values()),
        rejected=tuple(rejected),
        replayed_from=replayed_from,
    )


def record_document(record: PriceRecord) -> dict[str, object]:
    """The record as JSON members; `record_from` reads them back."""
    return {
        "id": str(record.id),
        "as_of": format_time(record.as_of),
        "expires_at": format_time(record.expires_at),
        "feed": record.feed,
        "replayed_from": format_time(record.replayed_from) if record.replayed_from else None,
        "rates": {currency.value: format_rate(rate_e8) for currency, rate_e8 in record.rates_e8.items()},
        "sources": {
            "used": [
                {
                    "source": quote.source,
                    "currency": quote.currency.value,
                    "bid": format_rate(quote.bid_e8),
                    "ask": format_rate(quote.ask_e8),
                    "observed_at": format_time(quote.observed_at),
                }
                for quote in record.used
            ],
            "rejected": [{"source": each.source, "reason": each.reason} for each in record.rejected],
        },
    }


def record_from(document: object) -> PriceRecord:
    """The record of a document made by `record_document`; further members are ignored.

    Raises NotARecord for anything else.
    """
    record = _read({"record": document}, "record", read_object)
    sources = _read(record, "sources", read_object)
    rates = _read(record, "rates", read_object)
    return PriceRecord(
        id=_read(record, "id", read_id),
        as_of=_read(record, "as_of", read_time),
        expires_at=_read(record, "expires_at", read_time),
        feed=_read(record, "feed", _feed),
        replayed_from=_read(record, "replayed_from", lambda value: None if value is None else read_time(value)),
        rates_e8={currency: _read(rates, currency.value, _rate, "rates.") for currency in Currency},
        used=tuple(
            Quote(
                _read(quote, "source", read_text, where),
                _read(quote, "currency", read_currency, where),
                _read(quote, "bid", _rate, where),
                _read(quote, "ask", _rate, where),
                _read(quote, "observed_at", read_time, where),
            )
            for where, quote in _items(sources, "used")
        ),
        rejected=tuple(
            Rejection(_read(each, "source", read_text, where), _read(each, "reason", read_text, where))
            for where, each in _items(sources, "rejected")
        ),
    )


def _read(document: Mapping[str, object], name: str, reader: Callable[[object], _Read], where: str = "") -> _Read:
    """A member through its reader; whatever is wrong with it becomes NotARecord with the path of the member."""
    if name not in document:
        raise NotARecord(where + name, "is missing")
    try:
        return reader(document[name])
    except ValueError as error:
        raise NotARecord(where + name, str(error)) from error


def _items(sources: Mapping[str, object], name: str) -> list[tuple[str, Mapping[str, object]]]:
    """The objects of a list below `sources`, each with the prefix of its members' paths."""
    items = _read(sources, name, read_list, "sources.")
    where = f"sources.{name}."
    by_number = {str(number): item for number, item in enumerate(items)}
    return [(f"{where}{number}.", _read(by_number, number, read_object, where)) for number in by_number]


def _feed(value: object) -> Feed:
    if value not in ("sandbox", "live"):
        raise ValueError("must be sandbox or live")
    return value


def _rate(value: object) -> int:
    return parse_rate(read_text(value))
