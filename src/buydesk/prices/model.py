"""Prices: quotes, the price record made of them, the freshness rule; the ports PriceStore and PriceSource.

How quotes become a record is `rule`'s, how a record is written as JSON `documents`'.
"""

import math
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal, Protocol

import msgspec

from buydesk.errors import DeskError, PriceStale, PriceSuperseded, PriceUnavailable, PriceUnsettled
from buydesk.money import Currency
from buydesk.reading import Moment, RateE8, Rates, WrongMember
from buydesk.settings.types import EXTRA_SOURCES, LIVE_SOURCES
from buydesk.times import format_time

Feed = Literal["sandbox", "live"]
# Nobody else's quotes are in a price, whoever signed it. Those that are asked only where a setting names them count
# everywhere: a service whose setting differs would otherwise sell nothing.
SOURCES: Mapping[Feed, tuple[str, ...]] = {
    "live": (*LIVE_SOURCES, *EXTRA_SOURCES),
    "sandbox": ("sandbox-1", "sandbox-2", "sandbox-3", "sandbox-4", "sandbox-5"),
}

RULE_VERSION = 2
HISTORY_MINUTES_MAX = 24 * 60
HISTORY_POINTS_MAX = 1000
# No setting allows more, and dates can still be computed with this many seconds.
Limit = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
# For so long after its observation the last record is kept: to show history, and to tell stale from none.
KEPT_FOR = timedelta(minutes=HISTORY_MINUTES_MAX)
# How long a client is asked to wait when it is refused because there is no price.
RETRY_AFTER_SECONDS = 5


class Written(msgspec.Struct, frozen=True, rename=lambda name: name.removesuffix("_e8")):
    """What is written as JSON and read again (`documents`): rates as decimal text, without the name's suffix."""


class Quote(Written, frozen=True, omit_defaults=True):
    """What one source asked and bid for a bitcoin (`rate_e8` units) and when that was observed.

    A source that tells no time of its own proves that it is alive only by change: `changed_at` is when its book of
    the currency was different last, EPOCH before that was seen; None for one with a clock, and in records by the first
    version of the rule.
    """

    source: str
    currency: Currency
    bid_e8: RateE8
    ask_e8: RateE8
    observed_at: Moment
    changed_at: Moment | None = None

    @property
    def mid_e8(self) -> int:
        """The middle of bid and ask; half of 10^-8 is rounded up."""
        return -(-(self.bid_e8 + self.ask_e8) // 2)


class RejectedQuote(Written, frozen=True):
    """A source that gave no quotes, or one of its quotes that was not used, and why."""

    source: str
    reason: str
    quote: Quote | None = None


class Rule(Written, frozen=True):
    """The limits of the pricing rule (`rule.decide`). RULE_VERSION changes whenever the rule itself does.

    Limits in bp are basis points, a hundredth of a percent.
    """

    quote_age_seconds_max: Limit
    spread_bp_max: Limit
    deviation_bp_max: Limit
    sources_min: Limit
    version: Limit = RULE_VERSION


class Signature(Written, frozen=True):
    """Who made a price record: the public key, and the signature of the record as it was when it ended at `expires_at`
    (`signing`)."""

    key: str
    value: str
    expires_at: Moment


class UnsettledRate(Written, frozen=True):
    """Why nothing is sold in a currency, at no older price either: the price (`rate_e8` units) that the quotes prove is
    doubted or, where it is None, they prove none and contradict the last one."""

    rate_e8: RateE8 | None
    reason: str


class PriceRecord(Written, frozen=True):
    """The market price at one moment, with its proof: all quotes there were, the rule and when it was applied.

    `rates_e8` are of the currencies that may be sold at; `missing` and `unsettled` say why another one may not be.
    `bids_e8` and `asks_e8` are the medians of the quotes used. In records by the first version of the rule the last
    four are empty. `as_of` is when the oldest quote used was observed. The record may be used until `expires_at` and
    not longer. `replayed_from` is the historic minute a sandbox record shows; None on the live feed. `rule` and
    `decided_at` are None for records of the time before there was a rule, `signature` for those from before they were
    signed: these prove nothing.
    """

    id: uuid.UUID
    as_of: Moment
    expires_at: Moment
    feed: Feed
    rates_e8: Rates
    used: tuple[Quote, ...] = ()
    rejected: tuple[RejectedQuote, ...] = ()
    replayed_from: Moment | None = None
    rule: Rule | None = None
    decided_at: Moment | None = None
    signature: Signature | None = None
    bids_e8: Rates = msgspec.field(default_factory=dict)
    asks_e8: Rates = msgspec.field(default_factory=dict)
    missing: Mapping[Currency, str] = msgspec.field(default_factory=dict)
    unsettled: Mapping[Currency, UnsettledRate] = msgspec.field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.id)  # its rates are a mapping, which has none

    @property
    def made_at(self) -> datetime:
        """When the price was decided: by this records are newer or older. `as_of` may step back from one to the next,
        when a source that was not used before tells an older time."""
        return self.decided_at or self.as_of

    def problem_of(self, currency: Currency) -> DeskError:
        """Why nothing is sold at this record in a currency that it has no rate of."""
        if currency in self.unsettled:
            return self.unsettled_problem([currency])
        reason = self.missing.get(currency, "it is none of the record's currencies")
        detail = f"There is no price in {currency}: {reason}."
        return PriceUnavailable(detail, retry_after_seconds=RETRY_AFTER_SECONDS)

    def unsettled_problem(self, currencies: Collection[Currency]) -> PriceUnsettled:
        """The refusal to sell at the prices of these currencies, which are unsettled."""
        reasons = {each.value: self.unsettled[each].reason for each in currencies}
        said = "; ".join(f"{each} {reason}" for each, reason in reasons.items())
        return PriceUnsettled(
            f"The price is not sold at yet: {said}.",
            retry_after_seconds=RETRY_AFTER_SECONDS,
            as_of=format_time(self.as_of),
            currencies=reasons,
        )

    def shortened(self, ttl: timedelta, now: datetime) -> "PriceRecord":
        """The record, valid for at most `ttl` from now; nothing ever makes it valid for longer than it was."""
        return msgspec.structs.replace(self, expires_at=min(self.expires_at, now + ttl))

    def point(self) -> "PricePoint":
        """What history keeps of the record."""
        return PricePoint(self.id, self.as_of, self.rates_e8, self.replayed_from)


class SourceResponse(msgspec.Struct, frozen=True):
    """What a source says when it is asked: its quotes, and what of its answer could not be used.

    `replayed_from` is the historic minute it replays; None for a market. `fingerprint` is the same as long as all that
    the source said is the same; None for one with a clock of its own. For `retry_after_seconds`, if it said so, it does
    not want to be asked again.
    """

    quotes: tuple[Quote, ...]
    rejected: tuple[RejectedQuote, ...] = ()
    replayed_from: datetime | None = None
    fingerprint: bytes | None = None
    retry_after_seconds: int | None = None


class PricePoint(Written, frozen=True):
    """A price record, as far as a chart needs it."""

    id: uuid.UUID
    as_of: Moment
    rates_e8: Rates
    replayed_from: Moment | None = None


class SourceStatus(Written, frozen=True):
    """How a source is. `detail` says what is wrong, "" when all of its last quotes were used.

    `mids_e8` are of its last quotes, observed at `quoted_at`, however long ago: None before the first. `failures`
    counts the last calls in a row that failed; `last_error` is what was wrong the last time one did, at `failed_at`,
    however long ago. Until `resting_until` it is left alone: its breaker is open, or it asked for that.
    """

    source: str
    detail: str
    failures: int = 0
    mids_e8: Rates | None = None
    quoted_at: Moment | None = None
    resting_until: Moment | None = None
    last_error: str = ""
    failed_at: Moment | None = None


class FeedStatus(Written, frozen=True):
    """How all sources were when they were last asked. `problem` says why that gave no price, "" if it did."""

    at: Moment
    feed: Feed
    problem: str
    sources: tuple[SourceStatus, ...]


class PriceSource(Protocol):
    """Somewhere quotes come from."""

    name: str

    async def quotes(self) -> SourceResponse:
        """The present quotes; raises SourceFailed, with `retry_after_seconds` if it said when to ask again."""
        ...

    async def close(self) -> None: ...


class PriceStore(Protocol):
    """Holds the current price record, and those of the last day."""

    async def publish(self, record: PriceRecord) -> PriceRecord:
        """Makes a record the current one and returns it as stored; raises PriceSuperseded if the current one is newer
        (`made_at`), PriceStoreUnavailable.

        One from the future (`latest_time`) is not newer: it gives way, and so does another one of the same moment. The
        history keeps no point observed later than the current record. The current record may be published again, and
        stays as it was.
        """
        ...

    async def latest(self) -> PriceRecord:
        """The valid record; raises PriceUnavailable (none within a day, or only one from the future), PriceStale,
        PriceStoreUnavailable."""
        ...

    async def history(self, minutes: int, points: int) -> Sequence[PricePoint]:
        """Records observed within the last `minutes` (1 to HISTORY_MINUTES_MAX), oldest first, the latest among them.

        Those from the future (`latest_time`) are left out. When there are more than `points` (1 to
        HISTORY_POINTS_MAX): the last one of each `history_span`, of as many spans, the newest. Costs as much as the
        points returned, however many records there are. Raises PriceStoreUnavailable.
        """
        ...

    async def put_feed_status(self, state: FeedStatus) -> None:
        """Stores how the sources are, in the place of the status before; raises PriceStoreUnavailable."""
        ...

    async def feed_status(self) -> FeedStatus:
        """The last status; raises PriceUnavailable when there is none of the last day, PriceStoreUnavailable."""
        ...

    async def check(self) -> None:
        """Raises PriceStoreUnavailable when the store cannot be used."""
        ...

    async def close(self) -> None: ...


def stale(as_of: datetime, expires_at: datetime) -> PriceStale:
    """The refusal to show a price that has expired."""
    return PriceStale(
        f"The last price was observed at {format_time(as_of)} and could be used until {format_time(expires_at)}.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
        as_of=format_time(as_of),
        expires_at=format_time(expires_at),
    )


def superseded(current_made_at: datetime) -> PriceSuperseded:
    """The refusal to publish a record in the place of a newer one."""
    text = format_time(current_made_at)
    return PriceSuperseded(f"A record that was decided at {text} is published already.", decided_at=text)


def valid_record(current: PriceRecord | None, now: datetime, skew_seconds_max: float) -> PriceRecord:
    """The current record, if it may be used now; raises PriceUnavailable if there is none, or PriceStale.

    One from the future (`latest_time`) is none: the clock was set back since, and its `expires_at` means nothing.
    """
    if current is None or now - current.as_of >= KEPT_FOR or current.made_at > latest_time(now, skew_seconds_max):
        raise PriceUnavailable("No price has been proven within the last day.", retry_after_seconds=RETRY_AFTER_SECONDS)
    if now >= current.expires_at:
        raise stale(current.as_of, current.expires_at)
    return current


@dataclass(frozen=True, slots=True)
class UsablePrice:
    """A record, and `until` when it may be used on a monotonic clock, in seconds.

    Validity is counted down on that clock from when the record was first seen: a wall clock that steps back does not
    make it valid for longer.
    """

    record: PriceRecord
    until: float

    @classmethod
    def seen(cls, record: PriceRecord, now: datetime, moment: float, before: "UsablePrice | None") -> "UsablePrice":
        """The record as seen at `moment`, when the wall clock shows `now`; `before` is what was seen last."""
        until = moment + (record.expires_at - now).total_seconds()
        if before is not None and before.record.id == record.id:
            until = min(until, before.until)
        return cls(record, until)

    def usable(self, moment: float) -> PriceRecord:
        """The record; raises PriceStale when it may not be used any more."""
        if moment >= self.until:
            raise stale(self.record.as_of, self.record.expires_at)
        return self.record


def seconds_to_next_tick(last_tick_at: datetime, interval_seconds: float, now: datetime) -> int:
    """How long a client that was refused for the lack of a price does well to wait: until the price of the next tick
    is at create_buy_order, about a second after it. At least 1."""
    into_interval = max(0.0, (now - last_tick_at).total_seconds()) % interval_seconds  # clocks differ
    return math.ceil(interval_seconds - into_interval) + 1


def recent_feed_status(status: FeedStatus | None, now: datetime) -> FeedStatus:
    """The status, if it is of the last day; raises PriceUnavailable."""
    if status is None or now - status.at >= KEPT_FOR:
        raise PriceUnavailable(
            "The price sources have no status of the last day.", retry_after_seconds=RETRY_AFTER_SECONDS
        )
    return status


def history_span(minutes: int, points: int) -> timedelta:
    """How long one of `points` equal spans of so many minutes is, in whole microseconds.

    Spans begin at multiples of it since the epoch: the points of a chart stay where they are from one look to the next.
    """
    return timedelta(minutes=minutes) / points


def latest_time(now: datetime, skew_seconds_max: float) -> datetime:
    """The latest time that a record can bear now. One with a later one is from the future, and any record replaces
    it."""
    return now + timedelta(seconds=skew_seconds_max)


def require_plausible(
    record: PriceRecord, feed: Feed, ttl_seconds_max: float, skew_seconds_max: float, now: datetime
) -> None:
    """Raises WrongMember for a record of another feed, one from the future and one valid for longer than allowed.

    Whatever the settings or the clock of its sender are, none of these may become a price.
    """
    if record.feed != feed:
        raise WrongMember("feed", f"must be {feed}, the feed of this desk")
    for member, moment in (("as_of", record.as_of), ("decided_at", record.made_at)):
        if moment > latest_time(now, skew_seconds_max):
            raise WrongMember(member, f"must not lie more than {skew_seconds_max:g} s in the future")
    if record.expires_at <= record.as_of:
        raise WrongMember("expires_at", "must be later than as_of")
    if record.expires_at - record.as_of > timedelta(seconds=ttl_seconds_max):
        raise WrongMember("expires_at", f"must not be more than {ttl_seconds_max:g} s after as_of")


def require_plausible_status(state: FeedStatus, feed: Feed, skew_seconds_max: float, now: datetime) -> None:
    """Raises WrongMember for the state of another feed, and for one from the future."""
    if state.feed != feed:
        raise WrongMember("feed", f"must be {feed}, the feed of this desk")
    if state.at > latest_time(now, skew_seconds_max):
        raise WrongMember("at", f"must not lie more than {skew_seconds_max:g} s in the future")
