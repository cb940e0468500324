"""Stand-ins for the exchanges, on loopback: answers in the recorded shape, with pair, price and time made up.

`async with exchanges() as stand_ins` serves the five that are always asked until it is left, and others by their
names; `stand_ins.env` or `stand_ins.settings` leads a desk to them. Every answer is synthetic: of the recordings in
`data/recorded` only the shape is left.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from buydesk.money import CURRENCIES, Currency
from buydesk.settings.types import LIVE_SOURCES
from buydesk.times import EPOCH

RECORDED = Path(__file__).parent / "data" / "recorded"
MIDS = {Currency.EUR: Decimal("41191.91"), Currency.GBP: Decimal("35330.89"), Currency.USD: Decimal("48478.88")}
HALF_SPREAD = Decimal("0.05")
_DRIP_SECONDS = 0.05

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Books = Mapping[Currency, tuple[str, str]]  # bid and ask, as text


class StandIn:
    """One exchange. What is set on it holds for its next answers; `heal` undoes all of it but `stop`.

    Its bid and ask lie `half_spread` below and above `mids` times `factor`, the other way round when `crossed`, and the
    bid is `bid_factor` times that. `status` and `headers` are of every answer, `garbage` replaces the body;
    `slow` drips one that never ends. Its whole clock, in answers and their Date, is `ahead`. It does not know
    the pairs of currencies that are `delisted`. Its own time is the present one, or `frozen_at`; Bitfinex, Bitvavo,
    Gemini and Kraken tell none, and each answer of theirs differs from the one before in a number that is no price,
    unless it `repeats`.
    """

    def __init__(self, name: str, mids: Mapping[Currency, Decimal]) -> None:
        self.name = name
        self.mids = mids
        self.asked = 0  # requests so far
        self.moves_parts = 0  # of a million, from one answer to the next
        self._trades = 0
        self._port = 0
        self._runner: web.AppRunner | None = None
        self.heal()

    def heal(self) -> None:
        """Every fault is over."""
        self.factor = Decimal(1)
        self.half_spread = HALF_SPREAD
        self.bid_factor = Decimal(1)
        self.crossed = False
        self.status = 200
        self.headers: Mapping[str, str] = {}
        self.ahead = timedelta(0)
        self.garbage: bytes | None = None
        self.slow = False
        self.frozen_at: datetime | None = None
        self.repeats = False
        self.delisted: frozenset[Currency] = frozenset()

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
        self._trades += not self.repeats
        now = self.frozen_at or datetime.now(UTC) + self.ahead
        body = self.garbage
        if body is None:
            body = _ANSWERS[self.name](request, self._books(), now, f"{self._trades}.5")
        headers = {"Date": format_datetime(datetime.now(UTC) + self.ahead, usegmt=True), **self.headers}
        return web.Response(status=self.status, headers=headers, body=body, content_type="application/json")

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
        books = {}
        for currency in self.mids.keys() - self.delisted:
            mid = self.mids[currency] * self.factor
            half = self.half_spread + self._trades % 7 * self.moves_parts * mid / 10**6
            bid, ask = (mid + half, mid - half) if self.crossed else (mid - half, mid + half)
            books[currency] = f"{bid * self.bid_factor:.2f}", f"{ask:.2f}"
        return books


class StandIns(dict[str, StandIn]):
    """All by their names. `mids` are shared: change one, and it changes at all of them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.mids = dict(MIDS)
        super().__init__({name: StandIn(name, self.mids) for name in names})

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
async def exchanges(*extra: str, moving: bool = False) -> AsyncIterator[StandIns]:
    """The five and those that are named, listening until it is left; if `moving`, their books move from answer to
    answer, as real ones do."""
    stand_ins = StandIns((*LIVE_SOURCES, *extra))
    for each in stand_ins.values():
        each.moves_parts = 1 if moving else 0
    try:
        for each in stand_ins.values():
            await each.start()
        yield stand_ins
    finally:
        for each in stand_ins.values():
            await each.stop()


@contextlib.asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[str]:
    """The address of an exchange that answers whatever it is asked by the handler."""
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def recorded(name: str, number: int = 0) -> Any:
    """The answer of a recording, its numbers as JSON's are in Python."""
    return json.loads((RECORDED / f"{name}.json").read_text())[number]["httpResponse"]


def kraken_answer(books: Books, volume: str = "871.31413688") -> bytes:
    """Synthetic: no recording has all our pairs."""
    pairs = {}
    for currency, (bid, ask) in books.items():
        ticker = recorded("kraken")["result"]["XXBTZEUR"]
        ticker["b"][0], ticker["a"][0], ticker["v"][0] = bid, ask, volume
        pairs[f"XXBTZ{currency}"] = ticker
    return json.dumps({"error": [], "result": pairs}).encode()


def coinbase_answer(bid: str, ask: str, time: str) -> bytes:
    """Synthetic: the recording is of BTC-USDT."""
    return json.dumps(recorded("coinbaseexchange") | {"bid": bid, "ask": ask, "time": time}).encode()


def bitstamp_answer(bid: str, ask: str, timestamp: str) -> bytes:
    """Synthetic: the recording is of btcusdt."""
    return json.dumps(recorded("bitstamp") | {"bid": bid, "ask": ask, "timestamp": timestamp}).encode()


def bitfinex_answer(books: Books, volume: str = "661.88869229") -> bytes:
    """Synthetic: the recording has no tBTCEUR and no tBTCGBP. All numbers given are written into it as they are."""
    rest = [json.dumps(number) for number in recorded("bitfinex")[0]]
    rest[8] = volume
    rows = [",".join((f'"tBTC{currency}"', bid, rest[2], ask, *rest[4:])) for currency, (bid, ask) in books.items()]
    return f"[{','.join(f'[{row}]' for row in rows)}]".encode()


def gemini_answer(bid: str, ask: str, timestamp: str, currency: str = "EUR", traded: str = "915.6534281291") -> bytes:
    """Synthetic: the recording is of BTCUSD. `timestamp` is written into it as it is."""
    answer = recorded("gemini") | {"bid": bid, "ask": ask}
    volume = answer["volume"]
    answer["volume"] = {"BTC": traded, currency: volume["USD"], "timestamp": "@"}
    return json.dumps(answer).replace('"@"', timestamp).encode()


def bitvavo_answer(bid: str, ask: str, currency: str = "EUR", size: str = "0.45") -> bytes:
    """Synthetic: the shape is of the documentation."""
    answer = {"market": f"BTC-{currency}", "bid": bid, "bidSize": size, "ask": ask, "askSize": "1.52"}
    return json.dumps(answer).encode()


def okx_answer(bid: str, ask: str, milliseconds: str, currency: str = "EUR") -> bytes:
    """Synthetic: the shape is of the documentation."""
    row = {"instType": "SPOT", "instId": f"BTC-{currency}", "last": "41191.9", "lastSz": "0.0001"}
    row |= {"askPx": ask, "askSz": "0.11", "bidPx": bid, "bidSz": "0.2", "ts": milliseconds}
    return json.dumps({"code": "0", "msg": "", "data": [row]}).encode()


def _book(request: web.Request, books: Books) -> tuple[str, str]:
    """Of the pair in the path, when it is one of ours."""
    currency = CURRENCIES.get(request.match_info["currency"].upper())
    if currency is None or currency not in books:
        raise web.HTTPNotFound
    return books[currency]


def _of_bitvavo(request: web.Request, books: Books, volume: str) -> bytes:
    currency = CURRENCIES.get(request.query["market"].removeprefix("BTC-"))
    if currency is None or currency not in books:
        return b'{"errorCode":205,"error":"market parameter is invalid."}'
    return bitvavo_answer(*books[currency], currency, volume)


def _of_okx(request: web.Request, books: Books, now: datetime) -> bytes:
    currency = CURRENCIES.get(request.query["instId"].removeprefix("BTC-"))
    if currency is None or currency not in books:
        return b'{"code":"51001","msg":"Instrument ID does not exist","data":[]}'
    return okx_answer(*books[currency], str((now - EPOCH) // timedelta(milliseconds=1)), currency)


def _of_kraken(request: web.Request, books: Books, volume: str) -> bytes:
    """All pairs that are asked for, or an error."""
    asked = request.query["pair"].split(",")
    known = {currency: book for currency, book in books.items() if f"XBT{currency}" in asked}
    return kraken_answer(known, volume) if len(known) == len(asked) else b'{"error":["EQuery:Unknown asset pair"]}'


PATHS = {
    "kraken": "/0/public/Ticker",
    "coinbase": "/products/BTC-{currency}/ticker",
    "bitstamp": "/api/v2/ticker/btc{currency}/",
    "bitfinex": "/v2/tickers",
    "gemini": "/v1/pubticker/btc{currency}",
    "bitvavo": "/v2/ticker/book",
    "okx": "/api/v5/market/ticker",
}
# The last argument is a volume.
_ANSWERS: dict[str, Callable[[web.Request, Books, datetime, str], bytes]] = {
    "kraken": lambda request, books, _, volume: _of_kraken(request, books, volume),
    "coinbase": lambda request, books, now, _: coinbase_answer(
        *_book(request, books), now.isoformat(timespec="microseconds").replace("+00:00", "Z")
    ),
    "bitstamp": lambda request, books, now, _: bitstamp_answer(*_book(request, books), str(int(now.timestamp()))),
    "bitfinex": lambda _, books, __, volume: bitfinex_answer(books, volume),
    "bitvavo": lambda request, books, _, volume: _of_bitvavo(request, books, volume),
    "okx": lambda request, books, now, _: _of_okx(request, books, now),
    # Its time is that of the volume: the end of some five minutes.
    "gemini": lambda request, books, now, volume: gemini_answer(
        *_book(request, books),
        f"{int(now.timestamp()) // 300 * 300}000",
        request.match_info["currency"].upper(),
        volume,
    ),
}
