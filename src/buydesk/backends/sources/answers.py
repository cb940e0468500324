"""What an exchange's answer says beside its books: how old it is, when to ask again, what went wrong in its own words.

All of it is a stranger's: it is bounded, and what cannot be read says nothing.
"""

import codecs
import re
from collections.abc import Iterator
from datetime import datetime, timedelta

import aiohttp

from buydesk.observability.clock_skew import http_date
from buydesk.prices.polling import printable
from buydesk.reading import Number, decode_json

# Of an answer that is no 200 so much is read, and so much of its words is told.
ERROR_BYTES_MAX = 4096
WORDS_CHARS_MAX = 120
# What a number of seconds that is larger counts as (RFC 9111, section 1.2.2).
SECONDS_MAX = 2**31 - 1
_SECONDS = re.compile(r"[0-9]+", re.ASCII)
_TOO_MANY, _UNAVAILABLE = 429, 503
# Where exchanges put their words, as text or lists of it. Numbers beside them are for programs.
_WORDS = ("error", "reason", "message", "msg")
_DEPTH_MAX = 3
_TAG = re.compile(r"<[^<>]*>")


class Unusable(ValueError):
    """An answer, or a book in it, that cannot be used; the message says why in a few words."""


def age(response: aiohttp.ClientResponse) -> timedelta:
    """How long a cache on the way has kept the answer, nothing when none has (RFC 9111, section 5.1); raises Unusable
    when it says so in a way that cannot be read."""
    seconds = _seconds(response.headers.get("Age", "0").partition(",")[0])
    if seconds is None:
        raise Unusable("an Age that is no number")
    return timedelta(seconds=seconds)


def retry_after_seconds(response: aiohttp.ClientResponse, now: datetime) -> int | None:
    """When the exchange wants to be asked again (RFC 9110, section 10.2.3), if it has had enough and says so; not 0."""
    if response.status not in (_TOO_MANY, _UNAVAILABLE):
        return None
    written = response.headers.get("Retry-After", "")
    seconds = _seconds(written)
    if seconds is None and (until := http_date(written)) is not None:
        # Both by the exchange's own clock, if it tells what that shows.
        since = http_date(response.headers.get("Date", "")) or now
        seconds = min(max(0, int((until - since).total_seconds())), SECONDS_MAX)
    return seconds or None


async def words_of(response: aiohttp.ClientResponse) -> str:
    """What an answer that is an error says in its own words, "" when there are none."""
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk[: ERROR_BYTES_MAX - len(body)]
            if len(body) == ERROR_BYTES_MAX:
                break
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(bytes(body))
    except (aiohttp.ClientError, OSError, ValueError):  # the status is told all the same
        return ""
    try:
        return words_in(decode_json(text))
    except (ValueError, RecursionError):  # no JSON: a page, or a line of text
        return _told(_TAG.sub(" ", text))


def words_in(answer: object) -> str:
    """What a decoded JSON answer says of an error, "" when it says nothing.

    Known forms: Bitfinex's list that begins with "error", Kraken's list of texts, Bitstamp's lists by member.
    """
    if isinstance(answer, list):
        said = answer[1:] if answer[:1] == ["error"] else []
    else:
        members = answer if isinstance(answer, dict) else {}
        said = [members[name] for name in _WORDS if name in members and not isinstance(members[name], Number)]
    return _told(", ".join(_texts(said, _DEPTH_MAX)))


def _texts(value: object, depth: int) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list | dict) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each, depth - 1)


def _told(words: str) -> str:
    return printable(" ".join(words.split()), WORDS_CHARS_MAX)


def _seconds(written: str) -> int | None:
    """A number of seconds, None if it is none."""
    written = written.strip()
    if not _SECONDS.fullmatch(written):
        return None
    return SECONDS_MAX if len(written) > len(str(SECONDS_MAX)) else min(int(written), SECONDS_MAX)
