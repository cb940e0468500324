"""What all exchanges have in common: they are asked within limits, and believed nothing that is not a price.

An exchange is described in a small file of its own: what is asked for, and where a currency's book is in the answer.
An answer is a stranger's. Its bytes and its time are bounded, it leads nowhere else, and nothing in it becomes a float:
a number in it stays as it was written. Whether a book is too old, too wide or crossed is the rule's to judge
(`prices.rule`), so that the record shows it.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from http.client import responses

import aiohttp

from buydesk import __version__
from buydesk.backends.sources.answers import Unusable, age, retry_after_seconds, words_in, words_of
from buydesk.errors import SourceFailed
from buydesk.money import Currency, NotMoney, parse_rate
from buydesk.observability.clock_skew import ClockMonitor, http_date
from buydesk.prices.model import PriceSource, Quote, RejectedQuote, SourceResponse
from buydesk.reading import Number, Repeated, decode_json, is_text
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock
from buydesk.way_out import UnusableProxy, proxy_for

ANSWER_BYTES_MAX = 64 * 1024
DIGEST_BYTES = 16
# How long an exchange's address is kept: a slow name server must not delay the other sources at every tick.
_DNS_SECONDS = 300
# A request ends before its source would be given up: one of several that is slow does not cost the others' quotes.
REQUEST_SHARE_MAX = 0.9


@dataclass(frozen=True, slots=True)
class Book:
    """The best bid and ask for a bitcoin (`rate_e8` units); `time` is the exchange's own, None if it tells none.

    A `warning` of the exchange is told, and the book is used all the same.
    """

    bid_e8: int
    ask_e8: int
    time: datetime | None = None
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What there is to know about an exchange.

    `requests` are paths, with their queries, and the currencies whose books their answers hold. `book` finds the one of
    a currency in an answer (a decoded JSON document, its numbers as Number), raises Unusable, and does nothing else.
    """

    name: str
    requests: Mapping[str, tuple[Currency, ...]]
    book: Callable[[object, Currency], Book]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one request gave. `wrong` says why a currency has no quote, or what is wrong though it has one; `digest` is
    of all that was answered, None if that has no book or its own time."""

    quotes: Sequence[Quote]
    wrong: Mapping[Currency, str]
    digest: bytes | None = None
    retry_after_seconds: int | None = None


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
        # Of each request's last answer: one that fails is no sign of life.
        self._digests: dict[str, bytes] = {}

    async def quotes(self) -> SourceResponse:
        """The quotes of the currencies that it has a usable book of; raises SourceFailed when there is none at all."""
        asked = self._exchange.requests
        answers = await asyncio.gather(*(self._ask(path, currencies) for path, currencies in asked.items()))
        self._digests |= {path: each.digest for path, each in zip(asked, answers, strict=True) if each.digest}
        quotes = tuple(quote for answer in answers for quote in answer.quotes)
        wrong = {currency: reason for answer in answers for currency, reason in answer.wrong.items()}
        longest = max((each.retry_after_seconds for each in answers if each.retry_after_seconds), default=None)
        if not quotes:
            raise SourceFailed(f"{self.name} gave no quote: {_listed(wrong)}.", retry_after_seconds=longest)
        return SourceResponse(
            quotes,
            tuple(RejectedQuote(self.name, f"{currency}: {reason}") for currency, reason in wrong.items()),
            fingerprint=b"".join(self._digests[path] for path in asked if path in self._digests) or None,
            retry_after_seconds=longest,
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

    async def _ask(self, path: str, currencies: tuple[Currency, ...]) -> _Answer:
        asked_at, moment = self._clock.now(), self._clocks.moment()
        try:
            proxy = proxy_for(self._url)
            async with self._pool().get(
                self._url + path, timeout=self._timeout, allow_redirects=False, proxy=proxy
            ) as response:
                if response.status != 200:
                    return await self._refused(response, currencies)
                body = await _body(response)
                if not _is_kept(response):  # or the date is of when a cache got it
                    self._clocks.hear_date(self.name, response.headers.get("Date"), moment)
                seen_at = asked_at - self._age(response, asked_at)
        except (Unusable, UnusableProxy) as error:
            return _Answer((), dict.fromkeys(currencies, str(error)))
        except aiohttp.ClientHttpProxyError as error:
            return _Answer((), dict.fromkeys(currencies, f"the proxy refuses with status {error.status}"))
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            return _Answer((), dict.fromkeys(currencies, f"no answer ({type(error).__name__})"))
        books, wrong = parse(self._exchange, body, currencies)
        quotes, own_off = [], self._clocks.own_off().rstrip(".")
        for currency, book in books.items():
            if book.warning:
                wrong[currency] = f"a warning: {book.warning}"
            if own_off and seen_at < asked_at:  # or the exchange would be blamed for an old answer
                wrong[currency] = f"our clock is off: {own_off}"
            if book.time is not None and book.time - asked_at > self._skew:
                ahead = f"a time more than {self._skew.total_seconds():g} s"
                wrong[currency] = (
                    f"{ahead} ahead of ours, which is off: {own_off}" if own_off else f"{ahead} in the future"
                )
            else:
                # An own time may lie a little ahead of ours, as clocks do: we saw it no later than now.
                observed_at = seen_at if book.time is None else min(book.time, seen_at)
                quotes.append(Quote(self.name, currency, book.bid_e8, book.ask_e8, observed_at))
        has_clock = not books or any(book.time for book in books.values())
        return _Answer(quotes, wrong, None if has_clock else blake2b(body, digest_size=DIGEST_BYTES).digest())

    async def _refused(self, response: aiohttp.ClientResponse, currencies: tuple[Currency, ...]) -> _Answer:
        status = f"status {response.status} {responses.get(response.status, '')}".rstrip()
        words = await words_of(response)
        return _Answer(
            (),
            dict.fromkeys(currencies, f"{status}: {words}" if words else status),
            retry_after_seconds=retry_after_seconds(response, self._clock.now()),
        )

    def _age(self, response: aiohttp.ClientResponse, asked_at: datetime) -> timedelta:
        """How old the answer was when it was asked for, as far as it says so; raises Unusable.

        Its Date makes it older where clocks that differ as much as allowed do not explain it, and never younger.
        """
        date = http_date(response.headers.get("Date", ""))
        by_date = timedelta(0) if date is None else asked_at - date - self._skew
        return max(age(response), by_date)


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
            words = words_in(answer)
            missing[currency] = f"an error: {words}" if words else str(error)
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


def _is_kept(response: aiohttp.ClientResponse) -> bool:
    """Whether a cache on the way says that it has kept the answer."""
    return "Age" in response.headers or "HIT" in response.headers.get("X-Cache", "").upper()


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The body; raises Unusable, and what aiohttp raises."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise Unusable(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return bytes(body)


def _listed(wrong: Mapping[Currency, str]) -> str:
    """The reasons; one that all currencies share is given once."""
    if len(set(wrong.values())) == 1:
        return next(iter(wrong.values()))
    return "; ".join(f"{currency}: {reason}" for currency, reason in wrong.items())
