"""Kraken: the public ticker of one exchange that trades bitcoin for all our currencies, asked in one request."""

from collections.abc import Callable, Mapping
from datetime import datetime

import aiohttp
import msgspec

from buydesk import __version__
from buydesk.errors import SourceFailed
from buydesk.money import Currency, NotMoney, parse_rate
from buydesk.prices import Observation, Quote
from buydesk.settings import Settings
from buydesk.times import utc_now

NAME = "kraken"
ANSWER_BYTES_MAX = 64 * 1024
# The middle of a book wider than this is nobody's price.
SPREAD_PERCENT_MAX = 10
_ASKED_PAIRS = "XBTUSD,XBTEUR,XBTGBP"
# Kraken answers under its own names of the pairs.
_PAIRS = {Currency.EUR: "XXBTZEUR", Currency.GBP: "XXBTZGBP", Currency.USD: "XXBTZUSD"}
_REASON_CHARS_MAX = 200


class Kraken:
    """PriceSource, at `settings.kraken_url`. `session_factory` makes the connection pool, at the first call."""

    name = NAME

    def __init__(
        self,
        settings: Settings,
        session_factory: Callable[[], aiohttp.ClientSession] | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._url = settings.kraken_url.rstrip("/") + "/0/public/Ticker"
        self._timeout = aiohttp.ClientTimeout(
            total=settings.source_seconds_max, sock_connect=settings.connect_seconds_max
        )
        self._new_session = session_factory or _new_session
        self._now = now
        self._session: aiohttp.ClientSession | None = None

    async def quotes(self) -> Observation:
        """The quotes of all currencies, observed when they were asked for; raises SourceFailed."""
        if self._session is None:
            self._session = self._new_session()
        asked_at = self._now()
        try:
            async with self._session.get(
                self._url, params={"pair": _ASKED_PAIRS}, timeout=self._timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise SourceFailed(f"Kraken answered with status {response.status}.")
                body = await _read(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise SourceFailed(f"Kraken gave no answer ({type(error).__name__}).") from error
        return Observation(tuple(parse(body, asked_at)))

    async def close(self) -> None:
        """Closes the connection pool."""
        if self._session is not None:
            await self._session.close()


def parse(body: bytes, observed_at: datetime) -> list[Quote]:
    """The quotes in an answer, one for each currency; raises SourceFailed with everything that is wrong with it."""
    try:
        answer = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        raise SourceFailed("Kraken's answer is not JSON.") from error
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), list):
        raise SourceFailed("Kraken's answer has not the shape of one: there is no list `error`.")
    if answer["error"]:
        raise SourceFailed(f"Kraken answered with an error: {ascii(answer['error'])[:_REASON_CHARS_MAX]}.")
    pairs = answer.get("result")
    if not isinstance(pairs, dict):
        raise SourceFailed("Kraken's answer has not the shape of one: there is no object `result`.")
    quotes, reasons = [], []
    for currency, pair in _PAIRS.items():
        try:
            quotes.append(_quote(currency, pairs, pair, observed_at))
        except ValueError as error:
            reasons.append(f"{pair} {error}")
    if reasons:
        raise SourceFailed(f"Kraken's answer cannot be used: {'; '.join(reasons)}.")
    return quotes


def _quote(currency: Currency, pairs: Mapping[str, object], pair: str, observed_at: datetime) -> Quote:
    """Raises ValueError with what is wrong with the pair."""
    ticker = pairs.get(pair)
    if ticker is None:
        raise ValueError("is missing")
    bid_e8, ask_e8 = _price(ticker, "b", "bid"), _price(ticker, "a", "ask")
    if bid_e8 > ask_e8:
        raise ValueError("has a bid above its ask")
    if (ask_e8 - bid_e8) * 100 > bid_e8 * SPREAD_PERCENT_MAX:
        raise ValueError(f"has an ask more than {SPREAD_PERCENT_MAX} % above its bid")
    return Quote(NAME, currency, bid_e8, ask_e8, observed_at)


def _price(ticker: object, member: str, meaning: str) -> int:
    """`a` and `b` are lists that begin with the price, as text."""
    level = ticker.get(member) if isinstance(ticker, dict) else None
    if not isinstance(level, list) or not level:
        raise ValueError(f"has no {meaning}")
    if not isinstance(level[0], str):
        raise ValueError(f"has no text as its {meaning}")
    try:
        return parse_rate(level[0])
    except NotMoney as error:
        raise ValueError(f"has a wrong {meaning}: it {error}") from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise SourceFailed(f"Kraken's answer has more than {ANSWER_BYTES_MAX} bytes.")
    return body


def _new_session() -> aiohttp.ClientSession:
    # An answer of this size needs no compression, and one that is not unpacked cannot grow beyond its bound.
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"buydesk/{__version__}", "Accept-Encoding": "identity"},
        auto_decompress=False,
    )
