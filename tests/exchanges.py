"""Stand-ins for the five exchanges, on loopback: answers in the recorded shape, with pair, price and time made up.

`async with exchanges() as stand_ins` serves all five until it is left; `stand_ins.env` or `stand_ins.settings` leads a
desk to them. Every answer is synthetic: of the recordings in `data/recorded` only the shape is left.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from aiohttp import web

from buydesk.money import CURRENCIES, Currency

RECORDED = Path(__file__).parent / "data" / "recorded"
MIDS = {Currency.EUR: Decimal("41191.91"), Currency.GBP: Decimal("35330.89"), Currency.USD: Decimal("48478.88")}
HALF_SPREAD = Decimal("0.05")
_DRIP_SECONDS = 0.05

Books = Mapping[Currency, tuple[str, str]]  # bid and ask, as text


class StandIn:
    """One exchange. What is set on it holds for its next answers; `heal` undoes all of it but `stop`.

    Its bid and ask lie HALF_SPREAD below and above `mids` times `factor`, the other way round when `crossed`. `status`
    is of every answer, `garbage` the body instead of the real one; `slow` drips one that never ends. Its own time is
    the present one, or `frozen_at`; Kraken and Bitfinex tell none.
    """

    def __init__(self, name: str, mids: Mapping[Currency, Decimal]) -> None:
        self.name = name
        self.mids = mids
        self.asked = 0  # requests so far
        self._port = 0
        self._runner: web.AppRunner | None = None
        self.heal()

    def heal(self) -> None:
        """Every fault is over."""
        self.factor = Decimal(1)
        self.crossed = False
        self.status = 200
        self.garbage: bytes | None = None
        self.slow = False
        self.frozen_at: datetime | None = None

    @property
    def url(self) -> str:
        """The same from its first start on."""
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listens, at the same address as before."""
        app = web.Application()
        app.router.add_get(PATHS[self.name], self._answer)
        self._stopping = asyncio.Event()
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Cuts every connection and refuses new ones, until it is started again."""
        if self._runner is not None:
            self._stopping.set()
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.slow:
            return await self._drip(request)
        now = self.frozen_at or datetime.now(UTC)
        body = _ANSWERS[self.name](request, self._books(), now) if self.garbage is None else self.garbage
        return web.Response(status=self.status, body=body, content_type="application/json")

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while not self._stopping.is_set():
                await response.write(b" ")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _DRIP_SECONDS)
        return response

    def _books(self) -> Books:
        half = -HALF_SPREAD if self.crossed else HALF_SPREAD
        mids = {currency: mid * self.factor for currency, mid in self.mids.items()}
        return {currency: (f"{mid - half:.2f}", f"{mid + half:.2f}") for currency, mid in mids.items()}


class StandIns(dict[str, StandIn]):
    """All five by their names. `mids` are shared: change one, and it changes at all five."""

    def __init__(self) -> None:
        self.mids = dict(MIDS)
        super().__init__({name: StandIn(name, self.mids) for name in PATHS})

    @property
    def settings(self) -> dict[str, Any]:
        """Overrides for Settings."""
        return {f"{name}_url": each.url for name, each in self.items()}

    @property
    def env(self) -> dict[str, str]:
        """Environment of a desk."""
        return {f"BUYDESK_{name.upper()}": url for name, url in self.settings.items()}

    def heal(self) -> None:
        """Every fault at every exchange is over."""
        for each in self.values():
            each.heal()


@contextlib.asynccontextmanager
async def exchanges() -> AsyncIterator[StandIns]:
    """All five, listening until it is left."""
    stand_ins = StandIns()
    try:
        for each in stand_ins.values():
            await each.start()
        yield stand_ins
    finally:
        for each in stand_ins.values():
            await each.stop()


def recorded(name: str, number: int = 0) -> Any:
    """The answer of a recording, its numbers as JSON's are in Python."""
    return json.loads((RECORDED / f"{name}.json").read_text())[number]["httpResponse"]


def kraken_answer(books: Books) -> bytes:
    """Synthetic: no recording has all our pairs."""
    pairs = {}
    for currency, (bid, ask) in books.items():
        ticker = recorded("kraken")["result"]["XXBTZEUR"]
        ticker["b"][0], ticker["a"][0] = bid, ask
        pairs[f"XXBTZ{currency}"] = ticker
    return json.dumps({"error": [], "result": pairs}).encode()


def coinbase_answer(bid: str, ask: str, time: str) -> bytes:
    """Synthetic: the recording is of BTC-USDT."""
    return json.dumps(recorded("coinbaseexchange") | {"bid": bid, "ask": ask, "time": time}).encode()


def bitstamp_answer(bid: str, ask: str, timestamp: str) -> bytes:
    """Synthetic: the recording is of btcusdt."""
    return json.dumps(recorded("bitstamp") | {"bid": bid, "ask": ask, "timestamp": timestamp}).encode()


def bitfinex_answer(books: Books) -> bytes:
    """Synthetic: the recording has no tBTCEUR and no tBTCGBP. Bid and ask are written into it as they are."""
    rest = [json.dumps(number) for number in recorded("bitfinex")[0]]
    rows = [",".join((f'"tBTC{currency}"', bid, rest[2], ask, *rest[4:])) for currency, (bid, ask) in books.items()]
    return f"[{','.join(f'[{row}]' for row in rows)}]".encode()


def gemini_answer(bid: str, ask: str, timestamp: str, currency: str = "EUR") -> bytes:
    """Synthetic: the recording is of BTCUSD; the recorded volumes stay. `timestamp` is written into it as it is."""
    answer = recorded("gemini") | {"bid": bid, "ask": ask}
    volume = answer["volume"]
    answer["volume"] = {"BTC": volume["BTC"], currency: volume["USD"], "timestamp": "@"}
    return json.dumps(answer).replace('"@"', timestamp).encode()


def _book(request: web.Request, books: Books) -> tuple[str, str]:
    """Of the pair in the path, when it is one of ours."""
    currency = CURRENCIES.get(request.match_info["currency"].upper())
    if currency is None:
        raise web.HTTPNotFound
    return books[currency]


PATHS = {
    "kraken": "/0/public/Ticker",
    "coinbase": "/products/BTC-{currency}/ticker",
    "bitstamp": "/api/v2/ticker/btc{currency}/",
    "bitfinex": "/v2/tickers",
    "gemini": "/v1/pubticker/btc{currency}",
}
_ANSWERS: dict[str, Callable[[web.Request, Books, datetime], bytes]] = {
    "kraken": lambda _, books, __: kraken_answer(books),
    "coinbase": lambda request, books, now: coinbase_answer(
        *_book(request, books), now.isoformat(timespec="microseconds").replace("+00:00", "Z")
    ),
    "bitstamp": lambda request, books, now: bitstamp_answer(*_book(request, books), str(int(now.timestamp()))),
    "bitfinex": lambda _, books, __: bitfinex_answer(books),
    "gemini": lambda request, books, now: gemini_answer(
        *_book(request, books), str(int(now.timestamp() * 1000)), request.match_info["currency"].upper()
    ),
}
