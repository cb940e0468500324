"""Prices: quotes, the price record made of them, the freshness rule; the ports PriceBoard and PriceSource."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, Protocol, cast

from buydesk.errors import PriceStale, SourceFailed
from buydesk.money import Currency, format_rate, parse_rate
from buydesk.times import format_time, parse_time

Feed = Literal["sandbox", "live"]

HISTORY_MINUTES_MAX = 24 * 60


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


class PriceSource(Protocol):
    """Somewhere quotes come from."""

    name: str

    async def quotes(self) -> Sequence[Quote]:
        """The present quotes; raises SourceFailed."""
        ...

    async def close(self) -> None: ...


class PriceBoard(Protocol):
    """Where the current price record hangs, and those of the last day."""

    async def publish(self, record: PriceRecord) -> None:
        """Hangs a record; raises PriceSuperseded if a newer one hangs already, PriceBoardUnavailable."""
        ...

    async def latest(self) -> PriceRecord:
        """The valid record; raises PriceUnavailable (none within a day), PriceStale, PriceBoardUnavailable."""
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
        retry_after_seconds=5,
        as_of=format_time(as_of),
        expires_at=format_time(expires_at),
    )


def price_record(quotes: Sequence[Quote], rejected: Sequence[Rejection], feed: Feed, ttl: timedelta) -> PriceRecord:
    """The record that one source's quotes make; raises SourceFailed unless every currency has exactly one quote."""
    by_currency = {quote.currency: quote for quote in quotes}
    missing = [currency.value for currency in Currency if currency not in by_currency]
    if missing:
        raise SourceFailed(f"There is no usable quote for {', '.join(missing)}.")
    as_of = min(quote.observed_at for quote in quotes)
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + ttl,
        feed=feed,
        rates_e8={currency: by_currency[currency].mid_e8 for currency in Currency},
        used=tuple(by_currency.values()),
        rejected=tuple(rejected),
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

    Raises ValueError or TypeError or LookupError, with what is wrong, for anything else.
    """
    members = cast("Mapping[str, object]", _typed(document, dict))
    feed = members["feed"]
    if feed not in ("sandbox", "live"):
        raise ValueError("feed: must be sandbox or live")
    sources = cast("Mapping[str, list[Mapping[str, str]]]", _typed(members["sources"], dict))
    rates = cast("Mapping[str, str]", _typed(members["rates"], dict))
    replayed_from = members["replayed_from"]
    return PriceRecord(
        id=uuid.UUID(_text(members["id"])),
        as_of=parse_time(_text(members["as_of"])),
        expires_at=parse_time(_text(members["expires_at"])),
        feed=feed,
        replayed_from=None if replayed_from is None else parse_time(_text(replayed_from)),
        rates_e8={currency: parse_rate(_text(rates[currency])) for currency in Currency},
        used=tuple(
            Quote(
                _text(quote["source"]),
                Currency(quote["currency"]),
                parse_rate(_text(quote["bid"])),
                parse_rate(_text(quote["ask"])),
                parse_time(_text(quote["observed_at"])),
            )
            for quote in sources["used"]
        ),
        rejected=tuple(Rejection(_text(each["source"]), _text(each["reason"])) for each in sources["rejected"]),
    )


def _text(value: object) -> str:
    return cast("str", _typed(value, str))


def _typed(value: object, kind: type) -> object:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
