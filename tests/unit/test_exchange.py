"""Asking an exchange over real TCP: what the quotes are, and what can go wrong on the way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import aiohttp
import psutil
import pytest
from aiohttp import web

from buydesk.backends.sources import EXCHANGES, EXTRA_EXCHANGES, exchanges
from buydesk.backends.sources.exchange import ANSWER_BYTES_MAX, ExchangeSource
from buydesk.errors import SourceFailed
from buydesk.money import Currency
from buydesk.prices.model import Quote, RejectedQuote, SourceResponse
from buydesk.settings.model import Settings
from buydesk.settings.types import EXTRA_SOURCES
from buydesk.times import CLOCK, Clock
from tests.clock import FakeClock
from tests.exchanges import Handler, StandIns, answering, bitstamp_answer, coinbase_answer, kraken_answer
from tests.exchanges import exchanges as all_stand_ins
from tests.serving import free_port

EUR, GBP, USD = Currency
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
BY_NAME = {exchange.name: exchange for exchange in EXCHANGES + EXTRA_EXCHANGES}
NAMES = sorted(BY_NAME)
BOOKS = dict.fromkeys(Currency, ("41191.86", "41191.96"))
TOO_MUCH = f"an answer of more than {ANSWER_BYTES_MAX} bytes"


@pytest.fixture
async def stand_ins() -> AsyncIterator[StandIns]:
    async with all_stand_ins(*EXTRA_SOURCES) as all_of_them:
        yield all_of_them


@contextlib.asynccontextmanager
async def asking(name: str, url: str, *, clock: Clock | None = None, **settings: Any) -> AsyncIterator[ExchangeSource]:
    """The source of an exchange at an address. Its clock shows noon, unless told otherwise."""
    source = ExchangeSource(BY_NAME[name], url, Settings(**settings), clock or FakeClock(NOON))
    try:
        yield source
    finally:
        await source.close()


@contextlib.asynccontextmanager
async def flooding(first: bytes, rest: bytes = b"") -> AsyncIterator[str]:
    """The address of somebody who answers with these bytes, and `rest` again and again until the connection is cut."""

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(first)
            while rest:
                writer.write(rest)
                await writer.drain()
                await asyncio.sleep(0)  # it comes in pieces, as from afar
        writer.close()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def failure_at(name: str, url: str, **settings: Any) -> str:
    """Why the source has no quote at all."""
    async with asking(name, url, **settings) as source:
        with pytest.raises(SourceFailed) as refusal:
            await source.quotes()
    detail = refusal.value.detail
    assert detail.startswith(f"{name} gave no quote: ")
    return detail.removeprefix(f"{name} gave no quote: ").removesuffix(".")


async def kraken_failure(handler: Handler, **settings: Any) -> str:
    async with answering(handler) as url:
        return await failure_at("kraken", url, **settings)


async def observed(name: str, handler: Handler, **settings: Any) -> SourceResponse:
    async with answering(handler) as url, asking(name, url, **settings) as source:
        return await source.quotes()


async def test_all_five_quote_all_currencies_at_the_addresses_of_the_settings(stand_ins: StandIns) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    for source in exchanges(Settings(**stand_ins.settings)):
        seen = await source.quotes()
        await source.close()
        assert [
            Quote(source.name, EUR, 41191_86000000, 41191_96000000, seen.quotes[0].observed_at),
            Quote(source.name, GBP, 35330_84000000, 35330_94000000, seen.quotes[1].observed_at),
            Quote(source.name, USD, 48478_83000000, 48478_93000000, seen.quotes[2].observed_at),
        ] == list(seen.quotes)
        assert all(before <= quote.observed_at <= datetime.now(UTC) for quote in seen.quotes)
        assert (seen.rejected, seen.replayed_from) == ((), None)


@pytest.mark.parametrize("name", NAMES)
async def test_each_request_is_made_once_and_says_who_asks(name: str) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(status=503)

    async with answering(answer) as url:
        assert await failure_at(name, url + "/mirror/") == "status 503 Service Unavailable"
    assert sorted(request.path_qs for request in asked) == [f"/mirror{path}" for path in BY_NAME[name].requests]
    for request in asked:
        assert request.headers["User-Agent"].startswith("buydesk/")
        assert request.headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in request.headers


@pytest.mark.parametrize("name", ["bitfinex", "gemini", "kraken"])
async def test_without_a_time_of_its_own_a_quote_is_of_when_it_was_asked_for(name: str, stand_ins: StandIns) -> None:
    async with asking(name, stand_ins[name].url) as source:
        assert {quote.observed_at for quote in (await source.quotes()).quotes} == {NOON}


@pytest.mark.parametrize("name", ["bitstamp", "coinbase"])
@pytest.mark.parametrize(
    ("ahead", "observed_at"),
    [
        (timedelta(0), NOON),
        (timedelta(seconds=-29), NOON - timedelta(seconds=29)),
        (timedelta(days=-3650), NOON - timedelta(days=3650)),
        (timedelta(seconds=1), NOON),
        (timedelta(seconds=10), NOON),
    ],
)
async def test_own_time_counts_unless_it_lies_a_little_ahead(
    name: str, ahead: timedelta, observed_at: datetime, stand_ins: StandIns
) -> None:
    stand_ins[name].frozen_at = NOON + ahead
    async with asking(name, stand_ins[name].url) as source:
        assert {quote.observed_at for quote in (await source.quotes()).quotes} == {observed_at}


@pytest.mark.parametrize("name", ["bitstamp", "coinbase"])
@pytest.mark.parametrize("ahead", [timedelta(seconds=11), timedelta(days=3650)])
async def test_own_time_of_the_future_is_refused(name: str, ahead: timedelta, stand_ins: StandIns) -> None:
    stand_ins[name].frozen_at = NOON + ahead
    assert await failure_at(name, stand_ins[name].url) == "a time more than 10 s in the future"


async def test_end_of_time_is_only_far_away() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=coinbase_answer("1", "1", times.pop()))

    times = ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "10000-01-01T00:00:00Z"]
    seen = await observed("coinbase", answer)
    assert [quote.observed_at.year for quote in seen.quotes] == [1]
    assert sorted(rejection.reason.split(": ")[1] for rejection in seen.rejected) == [
        "a time more than 10 s in the future",
        "the time is not ISO 8601 with a zone",
    ]


async def test_one_currency_that_fails_does_not_cost_the_others() -> None:
    async def answer(request: web.Request) -> web.Response:
        if "GBP" in request.path:
            return web.Response(status=404)
        return web.Response(body=coinbase_answer("1", "2", NOON.isoformat()))

    assert await observed("coinbase", answer) == SourceResponse(
        (Quote("coinbase", EUR, 10**8, 2 * 10**8, NOON), Quote("coinbase", USD, 10**8, 2 * 10**8, NOON)),
        (RejectedQuote("coinbase", "GBP: status 404 Not Found"),),
    )


async def test_one_currency_of_one_answer_that_fails_does_not_cost_the_others() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=kraken_answer(BOOKS | {USD: ("0", "1")}))

    seen = await observed("kraken", answer)
    assert [quote.currency for quote in seen.quotes] == [EUR, GBP]
    assert seen.rejected == (
        RejectedQuote("kraken", "USD: the bid must be an exchange rate between 1 and 10000000000"),
    )


async def test_one_currency_that_never_comes_does_not_cost_the_others_though_the_source_has_a_time_limit() -> None:
    done = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if "usd" in request.path:
            await done.wait()
        return web.Response(body=bitstamp_answer("1", "1", str(int(NOON.timestamp()))))

    async with answering(answer) as url, asking("bitstamp", url, source_seconds_max=1) as source:
        async with asyncio.timeout(1):  # as those do who ask sources
            seen = await source.quotes()
        done.set()
    assert [quote.currency for quote in seen.quotes] == [EUR, GBP]
    assert seen.rejected == (RejectedQuote("bitstamp", "USD: no answer (TimeoutError)"),)


async def test_reasons_that_differ_are_told_for_each_currency() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=429 if "eur" in request.path else 451)

    async with answering(answer) as url:
        assert await failure_at("gemini", url) == (
            "EUR: status 429 Too Many Requests; GBP: status 451 Unavailable For Legal Reasons; "
            "USD: status 451 Unavailable For Legal Reasons"
        )


@pytest.mark.parametrize("status", [201, 204, 400, 403, 404, 429, 451, 500, 503, 520])
async def test_status_other_than_200_is_refused_though_the_body_is_fine(status: int) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=b"" if status == 204 else kraken_answer(BOOKS))

    assert (await kraken_failure(answer)).startswith(f"status {status}")


@pytest.mark.parametrize(
    ("age", "seconds"),
    [("0", 0), ("25", 25), ("86400", 86_400), ("25, 30", 25), ("2147483648", 2**31 - 1), ("9" * 5000, 2**31 - 1)],
)
async def test_answer_out_of_a_cache_is_as_old_as_it_says(age: str, seconds: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Cache-Control"] == "no-cache"
        return web.Response(headers={"Age": age}, body=kraken_answer(BOOKS))

    async with answering(handler) as url, asking("kraken", url) as source:
        quotes = (await source.quotes()).quotes
    assert {quote.observed_at for quote in quotes} == {NOON - timedelta(seconds=seconds)}


@pytest.mark.parametrize("age", ["", "-5", "²", "soon", ", 5"])
async def test_answer_out_of_a_cache_that_tells_no_age_is_not_used(age: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(headers={"Age": age}, body=kraken_answer(BOOKS))

    assert await kraken_failure(answer) == "an Age that is no number"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/0/public/Ticker", "http://[", "file:///etc/passwd", ""])
async def test_redirects_are_not_followed(status: int, location: str) -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(status=status, headers={"Location": location}, body=kraken_answer(BOOKS))

    assert (await kraken_failure(answer)).startswith(f"status {status}")
    assert len(asked) == len(Currency), "each request once"


@pytest.mark.parametrize("head", ["Content-Length: 10000000\r\n", ""])
async def test_answer_of_ten_megabytes_is_cut_off(head: str) -> None:
    async with flooding(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode(), b" " * 10_000) as url:
        assert await failure_at("kraken", url) == TOO_MUCH


async def test_answer_within_the_bound_is_read_whole() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=kraken_answer(BOOKS) + b" " * (ANSWER_BYTES_MAX - 5000))

    assert len((await observed("kraken", answer)).quotes) == 3


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-A: " + 100 * b"b" + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b" * 10_000),
        (b"HTTP/1.1 ", b"2" * 10_000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 10_000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: " + 100 * b"b" + b"\r\n"),
        (b"HTTP/1.1 101 Upgrade\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", b"x" * 10_000),
        (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" * 100),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        (b"", b"\r\n" * 1000),
    ],
    ids=["headers", "header", "status", "chunks", "extension", "trailers", "upgrade", "answers", "continue", "lines"],
)
async def test_flood_of_any_kind_is_cut_off(first: bytes, rest: bytes) -> None:
    memory_bytes = psutil.Process().memory_info().rss
    async with flooding(first, rest) as url:
        # Some are too much for aiohttp, some for us, and some take up the time there is.
        assert await failure_at("kraken", url, source_seconds_max=1)
    assert psutil.Process().memory_info().rss - memory_bytes < 50_000_000


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"\x00\xff" * 100,
        b"HTTP/1.1 200",
        b"HTTP/1.1 99999 Much\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999999999999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_or_ends_too_early_is_no_answer(answer: bytes) -> None:
    async with flooding(answer) as url:
        assert (await failure_at("kraken", url)).startswith("no answer (")


async def test_cookies_are_neither_kept_nor_a_fault() -> None:
    head = b"HTTP/1.1 200 OK\r\nSet-Cookie: \x01=\x02;;;\r\nSet-Cookie: a=b\r\n\r\n"
    async with flooding(head + kraken_answer(BOOKS)) as url, asking("kraken", url) as source:
        for _ in range(2):
            assert len((await source.quotes()).quotes) == 3


async def test_compressed_answer_is_not_unpacked() -> None:
    async def answer(_: web.Request) -> web.Response:
        response = web.Response(body=kraken_answer(BOOKS))
        response.enable_compression(web.ContentCoding.gzip)
        return response

    assert await kraken_failure(answer) == "the answer is not JSON"


@pytest.mark.parametrize("name", NAMES)
async def test_slow_drip_is_given_up_after_the_time_limit(name: str, stand_ins: StandIns) -> None:
    stand_ins[name].slow = True
    assert await failure_at(name, stand_ins[name].url, source_seconds_max=0.2) == "no answer (TimeoutError)"


async def test_silence_is_given_up_after_the_time_limit() -> None:
    given_up = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await given_up.wait()
        return web.Response()

    async with answering(answer) as url:
        assert await failure_at("kraken", url, source_seconds_max=0.05) == "no answer (TimeoutError)"
        given_up.set()


@pytest.mark.parametrize("name", NAMES)
async def test_exchange_that_is_away_and_comes_back_quotes_again(name: str, stand_ins: StandIns) -> None:
    async with asking(name, stand_ins[name].url, clock=CLOCK) as source:
        before = await source.quotes()
        await stand_ins[name].stop()
        with pytest.raises(SourceFailed, match=r"no answer \(ClientConnectorError\)"):
            await source.quotes()
        await stand_ins[name].start()
        again = await source.quotes()
    assert [quote.mid_e8 for quote in again.quotes] == [quote.mid_e8 for quote in before.quotes]


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:99999", "http://a..b", "gopher://127.0.0.1", ""])
async def test_address_that_is_none_is_a_failure(url: str) -> None:
    assert (await failure_at("kraken", url)).startswith("no answer (")


@pytest.mark.parametrize("name", NAMES)
async def test_garbage_and_outliers_and_crossed_books_of_a_stand_in(name: str, stand_ins: StandIns) -> None:
    one = stand_ins[name]
    one.garbage = b"<html>"
    assert await failure_at(name, one.url) == "the answer is not JSON"
    one.heal()
    one.status = 451
    assert await failure_at(name, one.url) == "status 451 Unavailable For Legal Reasons"
    one.heal()
    stand_ins.mids[EUR] = Decimal("50000.00")
    async with asking(name, one.url, clock=CLOCK) as source:
        one.factor = Decimal("0.7")
        euro = (await source.quotes()).quotes[0]
        assert (euro.bid_e8, euro.ask_e8) == (34999_95000000, 35000_05000000)
        stand_ins.heal()
        one.crossed = True
        euro = (await source.quotes()).quotes[0]
        assert (euro.bid_e8, euro.ask_e8) == (50000_05000000, 49999_95000000), "the rule refuses it, not the source"


async def test_stand_ins_lead_a_desk_to_them(stand_ins: StandIns) -> None:
    assert stand_ins.env == {f"BUYDESK_{name.upper()}_URL": stand_ins[name].url for name in NAMES}
    jpy = stand_ins["gemini"].url + "/v1/pubticker/btcjpy"
    async with aiohttp.ClientSession() as client, client.get(jpy) as answer:
        assert answer.status == 404
    assert stand_ins["gemini"].asked == 1


async def test_asking_can_be_cancelled() -> None:
    asked, done = asyncio.Event(), asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        asked.set()
        await done.wait()
        return web.Response()

    async with answering(answer) as url, asking("gemini", url) as source:
        running = asyncio.create_task(source.quotes())
        await asked.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        done.set()


async def test_nobody_there_is_a_failure() -> None:
    reason = await failure_at("coinbase", f"http://127.0.0.1:{free_port()}")
    assert reason == "no answer (ClientConnectorError)"


async def test_source_that_was_never_asked_closes_too() -> None:
    for source in exchanges(Settings()):
        await source.close()
