"""What all exchanges have in common: they are asked within limits, and believed nothing that is not a price.

An exchange is described in a small file of its own: what is asked for, and where a currency's book is in the answer.
An answer is a stranger's. Its bytes and its time are bounded, it leads nowhere else, and nothing in it becomes a float:
a number in it stays as it was written. Whether a book is too old, too wide or crossed is the rule's to judge
(`prices.rule`), so that the record shows it.
"""

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.client import responses

import aiohttp

from buydesk import __version__
from buydesk.errors import SourceFailed
from buydesk.money import Currency, NotMoney, parse_rate
from buydesk.observability.clock_skew import ClockMonitor
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse
from buydesk.reading import Number, Repeated, decode_json, is_text
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

ANSWER_BYTES_MAX = 64 * 1024
_SECONDS = re.compile(r"[0-9]+", re.ASCII)
# What a number of seconds that is larger counts as (RFC 9111, section 1.2.2).
_SECONDS_MAX = 2**31 - 1
# How long an exchange's address is kept: a slow name server must not delay the other sources at every tick.
_DNS_SECONDS = 300
# A request ends before its source would be given up: one of several that is slow does not cost the others' quotes.
REQUEST_SHARE_MAX = 0.9


class Unusable(ValueError):
    """An answer, or a book in it, that cannot be used; the message says why in a few words of ours."""


@dataclass(frozen=True, slots=True)
class Book:
    """The best bid and ask for a bitcoin (`rate_e8` units); `time` is the exchange's own, None if it tells none."""

    bid_e8: int
    ask_e8: int
    time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """What there is to know about an exchange.

    `requests` are paths, with their queries, and the currencies whose books their answers hold. `book` finds the one of
    a currency in an answer (a decoded JSON document, its numbers as Number), raises Unusable, and does nothing else.
    """

    name: str
    requests: Mapping[str, tuple[Currency, ...]]
    book: Callable[[object, Currency], Book]


class ExchangeSource(PriceSource):
    """An exchange at an address."""

    def __init__(
        self, exchange: Exchange, url: str, settings: Settings, clock: Clock = CLOCK, clocks: ClockMonitor | None = None
    ) -> None:
        self._clock = clock
        self.name = exchange.name
        self._exchange = exchange
        self._clocks = clocks or ClockMonitor("this process", settings.clock_skew_seconds_max)
        self._url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(
            total=settings.source_seconds_max * REQUEST_SHARE_MAX,
            sock_connect=settings.connect_seconds_max,
            ceil_threshold=math.inf,  # as it is: aiohttp would round 5 s and more up to a whole second
        )
        self._skew = timedelta(seconds=settings.clock_skew_seconds_max)
        self._session: aiohttp.ClientSession | None = None

    async def quotes(self) -> SourceResponse:
        """The quotes of the currencies that it has a usable book of; raises SourceFailed when there is none at all."""
        answers = await asyncio.gather(*(self._ask(path, each) for path, each in self._exchange.requests.items()))
        quotes = tuple(quote for found, _ in answers for quote in found)
        missing = {currency: reason for _, reasons in answers for currency, reason in reasons.items()}
        if not quotes:
            raise SourceFailed(f"{self.name} gave no quote: {_listed(missing)}.")
        return SourceResponse(
            quotes, tuple(RejectedQuote(self.name, f"{currency}: {reason}") for currency, reason in missing.items())
        )

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    def _pool(self) -> aiohttp.ClientSession:
        """Made at the first call, because it belongs to the running loop. What is not unpacked cannot grow."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, ttl_dns_cache=_DNS_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={
                    "User-Agent": f"buydesk/{__version__}",
                    "Accept-Encoding": "identity",
                    "Cache-Control": "no-cache",
                },
                auto_decompress=False,
            )
        return self._session

    async def _ask(self, path: str, currencies: tuple[Currency, ...]) -> tuple[list[Quote], dict[Currency, str]]:
        """The quotes, and for each currency without one the reason."""
        asked_at, moment = self._clock.now(), self._clocks.moment()
        try:
            async with self._pool().get(self._url + path, timeout=self._timeout, allow_redirects=False) as response:
                body = await _body(response)
                if "Age" not in response.headers:  # or the date is of when a cache got it
                    self._clocks.hear_date(self.name, response.headers.get("Date"), moment)
                asked_at -= _age(response)
        except Unusable as error:
            return [], dict.fromkeys(currencies, str(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            return [], dict.fromkeys(currencies, f"no answer ({type(error).__name__})")
        books, missing = parse(self._exchange, body, currencies)
        quotes = []
        for currency, book in books.items():
            if book.time is not None and book.time - asked_at > self._skew:
                missing[currency] = f"a time more than {self._skew.total_seconds():g} s in the future"
            else:
                # An own time may lie a little ahead of ours, as clocks do: we saw it no later than now.
                observed_at = asked_at if book.time is None else min(book.time, asked_at)
                quotes.append(Quote(self.name, currency, book.bid_e8, book.ask_e8, observed_at))
        return quotes, missing


def parse(
    exchange: Exchange, body: bytes, currencies: tuple[Currency, ...]
) -> tuple[dict[Currency, Book], dict[Currency, str]]:
    """The books in an answer, and for each currency without one the reason. Raises nothing, whatever the bytes are."""
    books, missing = {}, {}
    try:
        answer = decode_json(body.decode())
    except Repeated:
        return {}, dict.fromkeys(currencies, "an answer that repeats a member")
    except (ValueError, RecursionError):
        return {}, dict.fromkeys(currencies, "the answer is not JSON")
    for currency in currencies:
        try:
            books[currency] = exchange.book(answer, currency)
        except Unusable as error:
            missing[currency] = str(error)
    return books, missing


def member(document: object, name: str) -> object:
    """A member of an object; raises Unusable."""
    if not isinstance(document, dict) or name not in document:
        raise Unusable(f"no member {name}")
    return document[name]


def text(value: object, name: str) -> str:
    """A value that is text, as it is; raises Unusable."""
    if not is_text(value):
        raise Unusable(f"the {name} is not text")
    return value


def number(value: object, name: str) -> str:
    """A value that is a number, as it was written; raises Unusable."""
    if not isinstance(value, Number):
        raise Unusable(f"the {name} is not a number")
    return str(value)


def price(written: str, name: str) -> int:
    """The `rate_e8` of plain decimal text with at most 8 places; raises Unusable."""
    try:
        return parse_rate(written)
    except NotMoney as error:
        raise Unusable(f"the {name} {error}") from error


def _age(response: aiohttp.ClientResponse) -> timedelta:
    """How long a cache on the way has kept the answer, nothing when none has (RFC 9111, section 5.1); raises Unusable
    when it says so in a way that cannot be read."""
    written = response.headers.get("Age", "0").partition(",")[0].strip()
    if not _SECONDS.fullmatch(written):
        raise Unusable("an Age that is no number")
    return timedelta(seconds=_SECONDS_MAX if len(written) > len(str(_SECONDS_MAX)) else min(int(written), _SECONDS_MAX))


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body of a 200; raises Unusable, and what aiohttp raises."""
    if response.status != 200:
        raise Unusable(f"status {response.status} {responses.get(response.status, '')}".rstrip())
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise Unusable(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return bytes(body)


def _listed(missing: Mapping[Currency, str]) -> str:
    """The reasons; one that all currencies share is given once."""
    if len(set(missing.values())) == 1:
        return next(iter(missing.values()))
    return "; ".join(f"{currency}: {reason}" for currency, reason in missing.items())
