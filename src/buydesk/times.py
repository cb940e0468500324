"""Times as the desk writes them (UTC, ISO 8601, six fractional digits, ``Z``), and its clock."""

import asyncio
import time
from datetime import UTC, datetime
from functools import lru_cache

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock:
    """What time it is, and waiting. Tests put one in its place that they move (`tests/clock.py`)."""

    def now(self) -> datetime:
        """The wall clock, in UTC; it may be set while the desk runs."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds on a clock that nobody sets, since some moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Waits this long."""
        await asyncio.sleep(seconds)


CLOCK = Clock()
utc_now = CLOCK.now


# Every order of a batch has the same times.
@lru_cache(maxsize=64)
def format_time(moment: datetime) -> str:
    """``2026-01-31T09:05:00.000000Z``: always the same width, so that text sorts as time does."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return f"{moment.isoformat(timespec='microseconds')[:-6]}Z"


def parse_time(text: str) -> datetime:
    """The moment of an ISO 8601 text with a zone, in the years 1 to 9999 in UTC; raises ValueError."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is UTC:
            return moment
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be an ISO 8601 time with a zone, such as 2026-01-31T09:05:00.000000Z")
