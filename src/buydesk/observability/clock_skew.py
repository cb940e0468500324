"""ClockMonitor: whether this process's clock agrees with those that it hears of, and if not, whose is off.

Every answer over HTTP is dated (RFC 9110, section 6.6.1), PostgreSQL and Redis say what time it is when they are asked.
Nobody's clock is right by itself: those that agree with most others are.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from buydesk.errors import ClockSkewed
from buydesk.times import CLOCK, Clock

RETRY_AFTER_SECONDS = 5
# A date in HTTP is cut to the second.
HTTP_DATE_SECONDS = 1.0
# What a clock said so long ago says nothing of it any more.
KEPT_SECONDS = 600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClockReading:
    """That a clock showed between `low` and `high` (seconds since 1970) when our monotonic clock showed `moment`."""

    moment: float
    low: float
    high: float

    def at(self, moment: float) -> "ClockReading":
        """What it shows then, if it has run as ours has."""
        since = moment - self.moment
        return ClockReading(moment, self.low + since, self.high + since)

    def also(self, other: "ClockReading") -> "ClockReading":
        """Both together; the other one alone when they exclude each other, because the clock was set meanwhile."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return ClockReading(other.moment, low, high) if low <= high else other

    def ahead_of(self, shown: float) -> float:
        """By how many seconds it is certainly ahead of a clock that shows this (since 1970), negative when behind."""
        return max(0.0, self.low - shown) + min(0.0, self.high - shown)


class ClockMonitor:
    """What the process called `own` hears of others' clocks."""

    def __init__(self, own: str, skew_seconds_max: float, clock: Clock = CLOCK) -> None:
        self._own = own
        self._skew_seconds_max = skew_seconds_max
        self._clock = clock
        self._heard: dict[str, ClockReading] = {}
        self._off: Collection[str] = frozenset()

    def moment(self) -> float:
        """Before somebody is asked for the time: what `hear` wants to know of that."""
        return self._clock.monotonic()

    def hear(self, whose: str, shown: datetime, asked_at: float, cut_to_seconds: float = 0.0) -> None:
        """Takes in what a clock showed after it was asked and before now."""
        moment = self._clock.monotonic()
        low = shown.timestamp()
        heard = ClockReading(moment, low, low + cut_to_seconds + moment - asked_at)
        before = self._heard.get(whose)
        self._heard[whose] = heard if before is None else before.at(moment).also(heard)

    def hear_date(self, whose: str, header: str | None, asked_at: float) -> None:
        """Takes in the Date of an answer; one that is missing or none says nothing."""
        shown = http_date(header or "")
        if shown is not None:
            self.hear(whose, shown, asked_at, HTTP_DATE_SECONDS)

    async def check(self) -> None:
        """Raises ClockSkewed when our own clock is off. Others that are off are logged, and so reported."""
        ahead = self._ahead()
        off, said = verdict(self._own, ahead, self._skew_seconds_max)
        if off != self._off:  # by how much they are changes all the time
            _log.warning("%s", said) if off else _log.info("The clocks agree again.")
        self._off = off
        if self._own in off:
            raise ClockSkewed(said, retry_after_seconds=RETRY_AFTER_SECONDS)

    def require_agreement_with(self, whose: str) -> None:
        """Raises ClockSkewed when that clock and ours differ, whichever is off."""
        ahead = self._ahead()
        if abs(ahead.get(whose, 0.0)) > self._skew_seconds_max:
            said = verdict(self._own, ahead, self._skew_seconds_max)[1]
            raise ClockSkewed(said, retry_after_seconds=RETRY_AFTER_SECONDS)

    def own_off(self) -> str:
        """In words, that our own clock is off, "" unless most others say so."""
        off, said = verdict(self._own, self._ahead(), self._skew_seconds_max)
        return said if self._own in off else ""

    def _ahead(self) -> dict[str, float]:
        """By how many seconds each clock that was heard of lately is ahead of ours."""
        moment, now = self._clock.monotonic(), self._clock.now().timestamp()
        recent = {whose: heard for whose, heard in self._heard.items() if moment - heard.moment <= KEPT_SECONDS}
        return {whose: heard.at(moment).ahead_of(now) for whose, heard in recent.items()}


def http_date(written: str) -> datetime | None:
    """The moment of a date as HTTP writes it, None if it is none."""
    try:
        moment = parsedate_to_datetime(written)
        return None if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def verdict(own: str, ahead: Mapping[str, float], skew_seconds_max: float) -> tuple[Collection[str], str]:
    """Which clocks are off, and that in words, "" when all agree.

    `ahead` are the seconds by which others are ahead of ours. The largest group that agrees is right; where there are
    several as large, nobody can say which is, and those that differ from ours are named.
    """
    shown = {own: 0.0, **ahead}
    groups = {
        frozenset(each for each, seconds in shown.items() if 0 <= seconds - first <= skew_seconds_max)
        for first in shown.values()
    }
    size = max(map(len, groups))
    if size == len(shown):
        return frozenset(), ""
    right, *others = (group for group in groups if len(group) == size)
    if others:
        differing = {each: f"{each} ({_apart(seconds, own)})" for each, seconds in sorted(ahead.items()) if seconds}
        said = f"The clocks of {own} and {', '.join(differing.values())} differ, and it is not known which is off."
        return frozenset(differing), said
    middle = sum(shown[each] for each in right) / size
    off = shown.keys() - right
    agreeing = ", ".join(sorted(right))
    said = " ".join(f"The clock of {each} is {_apart(shown[each] - middle, agreeing)}." for each in sorted(off))
    return frozenset(off), said


def _apart(seconds: float, whose: str) -> str:
    return f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} {whose}"
