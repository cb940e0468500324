"""Times as the desk writes them: UTC, ISO 8601, six fractional digits, ``Z``."""

from datetime import UTC, datetime
from functools import lru_cache

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def utc_now() -> datetime:
    """The wall clock, with its zone."""
    return datetime.now(UTC)


# Every order of a batch has the same times.
@lru_cache(maxsize=64)
def format_time(moment: datetime) -> str:
    """``2026-01-31T09:05:00.000000Z``: always the same width, so that text sorts as time does."""
    if moment.tzinfo is not UTC:
        moment = moment.astimezone(UTC)
    return f"{moment.isoformat(timespec='microseconds')[:-6]}Z"


def parse_time(text: str) -> datetime:
    """The moment of an ISO 8601 text with a zone; raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is UTC:
        return moment
    if moment.tzinfo is None:
        raise ValueError("a time needs a zone, such as Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("a time must lie in the years 1 to 9999 in UTC") from error
