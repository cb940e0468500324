"""Asking one price source: its time limit, its breaker, and what is known of it.

A source is hostile input: whatever it does, asking it ends within its time limit, costs a bounded amount of memory and
raises nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from buydesk.errors import SourceFailed
from buydesk.prices.model import Observation, PriceSource, Quote, Rejection, SourceState
from buydesk.prices.rule import is_price
from buydesk.settings import Settings
from buydesk.times import utc_now

# A source that failed so often in a row is left alone for a while.
FAILURES_BEFORE_REST = 3
# What a source says ends up in the record: so many quotes and rejections, and so many characters of a reason.
ANSWER_ITEMS_MAX = 12
REASON_CHARS_MAX = 200

_log = logging.getLogger(__name__)


class AskedSource:
    """A source, as it is asked tick by tick. `failures_total` counts the calls that failed, not those left out.

    `clock` counts seconds, monotonically.
    """

    def __init__(
        self,
        source: PriceSource,
        settings: Settings,
        *,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = source.name
        self.failures_total = 0
        self._source = source
        self._seconds_max = settings.source_seconds_max
        self._rest_seconds_min = settings.source_rest_seconds
        self._rest_seconds_max = settings.source_rest_seconds_max
        self._now = now
        self._clock = clock
        self._call: asyncio.Task[Observation | Exception] | None = None
        self._problem = "has not been asked yet"
        self._failures = 0
        self._last_error = ""
        self._failed_at: datetime | None = None
        self._rest_seconds = 0.0
        self._rests_until = clock()
        self._quotes: tuple[Quote, ...] = ()

    async def ask(self) -> Observation:
        """What the source says now; without quotes, and with the reason as a rejection, when that is nothing usable.

        While the source rests it is not asked. After its rest one call is let through: if that fails too, the next rest
        is twice as long.
        """
        if self._clock() < self._rests_until:
            return self._nothing(f"is left alone after {self._failures} failures in a row; the last: {self._problem}")
        try:
            seen = _checked(self.name, await self._answer())
        except Exception as error:
            self._fail(error)
            return self._nothing(self._problem)
        self._problem, self._failures, self._rest_seconds = "", 0, 0.0
        self._quotes = seen.quotes
        return seen

    def state(self, unused: str = "") -> SourceState:
        """How the source is; `unused` says why quotes of its last answer were not used."""
        rest_seconds = self._rests_until - self._clock()
        return SourceState(
            source=self.name,
            detail=self._problem or unused,
            failures=self._failures,
            # What is no rate cannot be written down.
            mids_e8={each.currency: each.mid_e8 for each in self._quotes if is_price(each)} if self._quotes else None,
            quoted_at=min((quote.observed_at for quote in self._quotes), default=None),
            last_error=self._last_error,
            failed_at=self._failed_at,
            resting_until=self._now() + timedelta(seconds=rest_seconds) if rest_seconds > 0 else None,
        )

    async def _answer(self) -> Observation:
        """The source's answer, in time; raises SourceFailed, and whatever else the source raises."""
        if self._call is not None and not self._call.done():
            # It was cancelled and goes on all the same: another call would be one more, for ever.
            raise SourceFailed("is still busy with an earlier call")
        # A task of its own: not even a call that cannot be cancelled is waited for any longer.
        self._call = call = asyncio.create_task(_outcome(self._source))
        try:
            await asyncio.wait([call], timeout=self._seconds_max)
        finally:
            call.cancel()
        if not call.done():
            raise SourceFailed(f"gave no answer within {self._seconds_max:g} s")
        self._call = None
        outcome = call.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _fail(self, error: Exception) -> None:
        if isinstance(error, SourceFailed):
            self._problem = _short(error.detail.removeprefix(f"{self.name} ").rstrip("."))
        else:
            self._problem = f"failed ({type(error).__name__})"
            _log.info("%s failed in a way that is not foreseen", self.name, exc_info=error)
        self._last_error, self._failed_at = self._problem, self._now()
        self._failures += 1
        self.failures_total += 1
        if self._failures >= FAILURES_BEFORE_REST:
            longer = max(self._rest_seconds_min, 2 * self._rest_seconds)
            self._rest_seconds = min(longer, self._rest_seconds_max)
            self._rests_until = self._clock() + self._rest_seconds

    def _nothing(self, reason: str) -> Observation:
        return Observation((), (Rejection(self.name, reason),))


async def _outcome(source: PriceSource) -> Observation | Exception:
    """What became of the call. As a value: of a call that is given up nobody fetches an exception."""
    try:
        return await source.quotes()
    except Exception as error:
        return error
    except BaseException as error:  # a source ends neither this process nor, by a cancellation of its own, the loop
        return SourceFailed(f"failed ({type(error).__name__})")


def _checked(name: str, seen: Observation) -> Observation:
    """The answer, bounded, under the source's own name only; raises SourceFailed, and anything if it is no answer."""
    if len(seen.quotes) + len(seen.rejected) > ANSWER_ITEMS_MAX:
        raise SourceFailed(f"said more than {ANSWER_ITEMS_MAX} things at once")
    rejected = tuple(Rejection(name, _short(each.reason)) for each in seen.rejected)
    if not seen.quotes:
        raise SourceFailed("; ".join(["gave no quotes", *(each.reason for each in rejected)]))
    quotes = tuple(replace(quote, source=name, observed_at=_utc(quote.observed_at)) for quote in seen.quotes)
    return Observation(quotes, rejected, seen.replayed_from)


def _short(reason: str) -> str:
    """A reason that can be written down: an exchange's own words may hold what is no text at all."""
    return "".join(char if char.isprintable() else "?" for char in reason[:REASON_CHARS_MAX])


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise SourceFailed("told a time without a zone")
    return moment.astimezone(UTC)
