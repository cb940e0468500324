"""Polling one price source: its time limit, its circuit breaker, and its status.

A source is hostile input: whatever it does, polling it ends within its time limit, costs a bounded amount of memory and
raises nothing.
"""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from buydesk.errors import SourceFailed
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse, SourceStatus
from buydesk.prices.rule import is_price
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

# The circuit breaker opens when a source has failed so often in a row.
FAILURES_BEFORE_OPEN = 3
# What a source says ends up in the record: at most this many quotes and rejections, and characters of a reason.
ANSWER_ITEMS_MAX = 12
REASON_CHARS_MAX = 200

_log = logging.getLogger(__name__)


class SourcePoller:
    """Polls a source, tick by tick. `failures_total` counts the calls that failed, not those left out."""

    def __init__(self, source: PriceSource, settings: Settings, *, clock: Clock = CLOCK) -> None:
        self.name = source.name
        self.failures_total = 0
        self._source = source
        self._settings = settings
        self._clock = clock
        self._running_call: asyncio.Task[SourceResponse | Exception] | None = None
        self._problem = "has not been asked yet"
        self._failures = 0
        self._last_error = ""
        self._failed_at: datetime | None = None
        self._cooldown_seconds = 0.0
        self._open_until = clock.monotonic()
        self._quotes: tuple[Quote, ...] = ()

    async def poll(self) -> SourceResponse:
        """What the source says now; without quotes, and with the reason as a rejection, when that is nothing usable.

        While the circuit breaker is open the source is not asked. After the cool-down one call is let through: if that
        fails too, the next cool-down is twice as long.
        """
        if self._clock.monotonic() < self._open_until:
            return self._without_quotes(
                f"is left alone after {self._failures} failures in a row; the last: {self._problem}"
            )
        try:
            seen = _checked(self.name, await self._call_source())
        except Exception as error:
            self._record_failure(error)
            return self._without_quotes(self._problem)
        self._problem, self._failures, self._cooldown_seconds = "", 0, 0.0
        self._quotes = seen.quotes
        return seen

    def state(self, unused: str = "") -> SourceStatus:
        """How the source is; `unused` says why quotes of its last answer were not used."""
        left_seconds = self._open_until - self._clock.monotonic()
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
            self._problem = _short(error.detail.removeprefix(f"{self.name} ").rstrip("."))
        else:
            self._problem = f"failed ({type(error).__name__})"
            _log.info("%s failed in a way that is not foreseen", self.name, exc_info=error)
        self._last_error, self._failed_at = self._problem, self._clock.now()
        self._failures += 1
        self.failures_total += 1
        if self._failures >= FAILURES_BEFORE_OPEN:
            longer = max(self._settings.source_cooldown_seconds, 2 * self._cooldown_seconds)
            self._cooldown_seconds = min(longer, self._settings.source_cooldown_seconds_max)
            self._open_until = self._clock.monotonic() + self._cooldown_seconds

    def _without_quotes(self, reason: str) -> SourceResponse:
        return SourceResponse((), (RejectedQuote(self.name, reason),))


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
    rejected = tuple(RejectedQuote(name, _short(each.reason)) for each in seen.rejected)
    if not seen.quotes:
        raise SourceFailed("; ".join(["gave no quotes", *(each.reason for each in rejected)]))
    quotes = tuple(replace(quote, source=name, observed_at=_utc(quote.observed_at)) for quote in seen.quotes)
    return SourceResponse(quotes, rejected, seen.replayed_from)


def _short(reason: str) -> str:
    """A reason that can be written down: an exchange may have sent characters that cannot be shown."""
    return "".join(char if char.isprintable() else "?" for char in reason[:REASON_CHARS_MAX])


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise SourceFailed("gave a time without a zone")
    return moment.astimezone(UTC)
