"""Polling one price source: its time limit, its circuit breaker, whether it is alive, and its status.

A source is hostile input: whatever it does, polling it ends within its time limit, costs a bounded amount of memory and
raises nothing.
"""

import asyncio
import logging
from collections import deque
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from buydesk.errors import SourceFailed
from buydesk.money import Currency
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse, SourceStatus
from buydesk.prices.rule import is_price
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, EPOCH, Clock

# The circuit breaker opens when a source has failed so often in a row.
FAILURES_BEFORE_OPEN = 3
# What a source says ends up in the record: at most this many quotes and rejections, and characters of a reason.
ANSWER_ITEMS_MAX = 12
REASON_CHARS_MAX = 200
# So many different answers are remembered, a quarter of an hour of them: caches that take turns with old ones show
# nothing new.
ANSWERS_REMEMBERED = 64

_log = logging.getLogger(__name__)


class SourcePoller:
    """Polls a source, tick by tick. `failures_total` counts the calls that failed, not those left out; `is_frozen` when
    the last answer had been the same for too long."""

    def __init__(self, source: PriceSource, settings: Settings, *, clock: Clock = CLOCK) -> None:
        self.name = source.name
        self.failures_total = 0
        self._source = source
        self._settings = settings
        self._changes = _Changes(settings.unchanged_seconds_max(source.name))
        self._clock = clock
        self._running_call: asyncio.Task[SourceResponse | Exception] | None = None
        self._problem = "has not been asked yet"
        self._failures = 0
        self._last_error = ""
        self._failed_at: datetime | None = None
        self._cooldown_seconds = 0.0
        self._open_until = self._wanted_at = clock.monotonic()
        self._may_rest = True
        self.is_frozen = False
        self._quotes: tuple[Quote, ...] = ()

    async def poll(self, *, may_rest: bool = True) -> SourceResponse:
        """What the source says now; without quotes, and with the reason as a rejection, when that is nothing usable.

        While the circuit breaker is open the source is not asked if it `may_rest`, because the others made a price
        without it; without a price every source is asked, except one that said when it wants to be asked again. After
        the cool-down one call is let through: if that fails too, the next cool-down is twice as long. An answer that
        has been the same for too long is set aside until it changes; that is no failure of the call.
        """
        self._may_rest = may_rest
        if reason := self._left_alone():
            return self._without_quotes(reason)
        try:
            seen = _checked(self.name, await self._call_source())
        except Exception as error:
            self._record_failure(error)
            return self._without_quotes(self._problem)
        self._failures, self._cooldown_seconds, self._open_until = 0, 0.0, self._clock.monotonic()
        self._keep_to(seen.retry_after_seconds)
        self._problem = self._changes.take(seen.fingerprint, self._clock.monotonic(), self._clock.now())
        self.is_frozen = bool(self._problem)
        if self.is_frozen:
            self._last_error, self._failed_at = self._problem, self._clock.now()
            return self._without_quotes(self._problem)
        seen = self._changes.dated(seen)
        self._quotes = seen.quotes
        return seen

    def state(self, unused: str = "") -> SourceStatus:
        """How the source is; `unused` says why quotes of its last answer were not used."""
        left_seconds = self._left_alone_until() - self._clock.monotonic()
        return SourceStatus(
            source=self.name,
            detail=self._problem or unused,
            failures=self._failures,
            # What is no rate cannot be written down.
            mids_e8={each.currency: each.mid_e8 for each in self._quotes if is_price(each)} if self._quotes else None,
            quoted_at=min((quote.observed_at for quote in self._quotes), default=None),
            last_error=self._last_error,
            failed_at=self._failed_at,
            resting_until=self._clock.now() + timedelta(seconds=left_seconds) if left_seconds > 0 else None,
        )

    def _left_alone(self) -> str:
        """Why the source is not asked now, "" if it is."""
        moment = self._clock.monotonic()
        if moment < self._wanted_at:
            return f"wants to be asked again in {self._wanted_at - moment:.0f} s" + (
                f"; the last: {self._problem}" if self._problem else ""
            )
        if moment < self._left_alone_until():
            return f"is left alone after {self._failures} failures in a row; the last: {self._problem}"
        return ""

    def _left_alone_until(self) -> float:
        return max(self._open_until, self._wanted_at) if self._may_rest else self._wanted_at

    def _keep_to(self, retry_after_seconds: int | None) -> None:
        """Leaves the source alone for as long as it said, within the longest rest."""
        if retry_after_seconds is not None:
            self._wanted_at = self._clock.monotonic() + min(
                retry_after_seconds, self._settings.source_cooldown_seconds_max
            )

    async def _call_source(self) -> SourceResponse:
        """The source's answer, in time; raises SourceFailed, and whatever else the source raises."""
        if self._running_call is not None and not self._running_call.done():
            # It was cancelled and goes on all the same: another call would be one more, for ever.
            raise SourceFailed("is still busy with an earlier call")
        # A task of its own: not even a call that cannot be cancelled is waited for any longer.
        self._running_call = call = asyncio.create_task(_result_of(self._source))
        try:
            await asyncio.wait([call], timeout=self._settings.source_seconds_max)
        finally:
            call.cancel()
        if not call.done():
            raise SourceFailed(f"gave no answer within {self._settings.source_seconds_max:g} s")
        self._running_call = None
        outcome = call.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _record_failure(self, error: Exception) -> None:
        if isinstance(error, SourceFailed):
            self._problem = printable(error.detail.removeprefix(f"{self.name} ").rstrip("."))
            self._keep_to(error.retry_after_seconds)
        else:
            self._problem = f"failed ({type(error).__name__})"
            _log.info("%s failed in a way that is not foreseen", self.name, exc_info=error)
        self._last_error, self._failed_at = self._problem, self._clock.now()
        self._failures += 1
        self.failures_total += 1
        is_open = self._clock.monotonic() < self._open_until  # it was asked all the same: that rest is long enough
        if self._failures >= FAILURES_BEFORE_OPEN and not is_open:
            longer = max(self._settings.source_cooldown_seconds, 2 * self._cooldown_seconds)
            self._cooldown_seconds = min(longer, self._settings.source_cooldown_seconds_max)
            self._open_until = self._clock.monotonic() + self._cooldown_seconds

    def _without_quotes(self, reason: str) -> SourceResponse:
        return SourceResponse((), (RejectedQuote(self.name, reason),))


class _Changes:
    """When what a source answers was different last. It says nothing of one with a clock of its own."""

    def __init__(self, unchanged_seconds_max: float) -> None:
        self._unchanged_seconds_max = unchanged_seconds_max
        self._known: deque[bytes] = deque(maxlen=ANSWERS_REMEMBERED)
        self._moment = 0.0
        self._at = EPOCH
        self._books: dict[Currency, tuple[tuple[int, int], datetime]] = {}

    def take(self, fingerprint: bytes | None, moment: float, now: datetime) -> str:
        """Takes in an answer, the first of which counts as a change; why it proves nothing any more, "" if it does."""
        if fingerprint is None:
            return ""
        if fingerprint not in self._known:
            self._known.append(fingerprint)
            self._moment, self._at = moment, now
        seconds = moment - self._moment
        return f"has given the same answer for {seconds:.0f} s" if seconds > self._unchanged_seconds_max else ""

    def dated(self, seen: SourceResponse) -> SourceResponse:
        """The answer, each quote of which says when the source's book of the currency was seen to change: not later
        than it was observed. That another pair moves says nothing of this one."""
        if seen.fingerprint is None:
            return seen
        quotes = []
        for quote in seen.quotes:
            book = quote.bid_e8, quote.ask_e8
            before = self._books.get(quote.currency)
            if before is None:  # or a source that stands still would prove its time by our restart
                self._books[quote.currency] = before = book, EPOCH
            elif before[0] != book:
                self._books[quote.currency] = before = book, quote.observed_at
            quotes.append(replace(quote, changed_at=min(before[1], self._at, quote.observed_at)))
        return replace(seen, quotes=tuple(quotes))


async def _result_of(source: PriceSource) -> SourceResponse | Exception:
    """What became of the call. As a value: of a call that is given up nobody fetches an exception."""
    try:
        return await source.quotes()
    except Exception as error:
        return error
    except BaseException as error:  # a source ends neither this process nor, by a cancellation of its own, the loop
        return SourceFailed(f"failed ({type(error).__name__})")


def _checked(name: str, seen: SourceResponse) -> SourceResponse:
    """The answer, bounded, under the source's own name only; raises SourceFailed, and anything if it is no answer."""
    if len(seen.quotes) + len(seen.rejected) > ANSWER_ITEMS_MAX:
        raise SourceFailed(f"said more than {ANSWER_ITEMS_MAX} things at once")
    rejected = tuple(RejectedQuote(name, printable(each.reason)) for each in seen.rejected)
    if not seen.quotes:
        raise SourceFailed("; ".join(["gave no quotes", *(each.reason for each in rejected)]))
    quotes = tuple(replace(quote, source=name, observed_at=_utc(quote.observed_at)) for quote in seen.quotes)
    return replace(seen, quotes=quotes, rejected=rejected)


def printable(reason: str, chars_max: int = REASON_CHARS_MAX) -> str:
    """A reason that can be written down: an exchange may have sent characters that cannot be shown."""
    return "".join(char if char.isprintable() else "?" for char in reason[:chars_max])


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise SourceFailed("gave a time without a zone")
    return moment.astimezone(UTC)
