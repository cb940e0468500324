"""Kraken: its answers, as recorded and as made up in the recorded shape, and what can go wrong on the way."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from buydesk.backends.sources.kraken import ANSWER_BYTES_MAX, Kraken, parse
from buydesk.errors import SourceFailed
from buydesk.money import Currency, format_rate
from buydesk.prices import Quote
from buydesk.settings import Settings
from tests.serving import free_port

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
RECORDED = Path(__file__).parents[1] / "data" / "recorded" / "kraken.json"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def recorded(number: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(RECORDED.read_text())[number]["httpResponse"]
    return answer


def synthetic(**changes: object) -> dict[str, Any]:
    """An answer of the recorded shape with all our pairs. Synthetic: no recording has them all.

    `changes` are the first items of a pair's bid (`b_XXBTZUSD`) or ask (`a_XXBTZUSD`).
    """
    ticker = json.dumps(recorded(0)["result"]["XXBTZEUR"])
    answer: dict[str, Any] = {"error": [], "result": {}}
    prices = {"XXBTZUSD": ("9792.1", "9792.2"), "XXBTZEUR": ("8943.8", "8943.9"), "XXBTZGBP": ("7571.0", "7573.25001")}
    for pair, (bid, ask) in prices.items():
        answer["result"][pair] = json.loads(ticker)
        answer["result"][pair]["b"][0] = bid
        answer["result"][pair]["a"][0] = ask
    for change, price in changes.items():
        member, pair = change.split("_")
        answer["result"][pair][member][0] = price
    return answer


def body(answer: object) -> bytes:
    return json.dumps(answer).encode()


def reason_of(answer: bytes) -> str:
    with pytest.raises(SourceFailed) as refusal:
        parse(answer, NOON)
    return refusal.value.detail


def test_recorded_answer_has_euros_only_and_the_refusal_says_what_is_missing() -> None:
    for number in (0, 1):
        assert reason_of(body(recorded(number))) == (
            "Kraken's answer cannot be used: XXBTZGBP is missing; XXBTZUSD is missing."
        )


def test_recorded_euros_are_read_exactly() -> None:
    answer = recorded(0)
    for pair in ("XXBTZGBP", "XXBTZUSD"):  # synthetic: the same ticker under the names that the recording lacks
        answer["result"][pair] = answer["result"]["XXBTZEUR"]
    euro = next(quote for quote in parse(body(answer), NOON) if quote.currency is Currency.EUR)
    assert euro == Quote("kraken", Currency.EUR, 8943_80000000, 8943_90000000, NOON)
    assert format_rate(euro.mid_e8) == "8943.85"


def test_synthetic_answer_with_all_pairs_gives_a_quote_for_each_currency() -> None:
    assert parse(body(synthetic()), NOON) == [
        Quote("kraken", Currency.EUR, 8943_80000000, 8943_90000000, NOON),
        Quote("kraken", Currency.GBP, 7571_00000000, 7573_25001000, NOON),
        Quote("kraken", Currency.USD, 9792_10000000, 9792_20000000, NOON),
    ]


def test_pairs_that_nobody_asked_for_are_ignored() -> None:
    answer = synthetic()
    answer["result"] |= {"XETHZCAD": recorded(1)["result"]["XETHZCAD"], "nonsense": None}
    assert len(parse(body(answer), NOON)) == 3


def test_bid_that_equals_the_ask_is_a_price() -> None:
    quotes = parse(body(synthetic(a_XXBTZUSD="9792.1")), NOON)
    assert quotes[2].mid_e8 == 9792_10000000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a_XXBTZUSD": 9792.2}, "XXBTZUSD has no text as its ask"),
        ({"b_XXBTZEUR": 8943}, "XXBTZEUR has no text as its bid"),
        ({"b_XXBTZEUR": None}, "XXBTZEUR has no text as its bid"),
        ({"b_XXBTZEUR": "0"}, "XXBTZEUR has a wrong bid: it must be an exchange rate"),
        ({"b_XXBTZEUR": "0.00000"}, "XXBTZEUR has a wrong bid: it must be an exchange rate"),
        ({"a_XXBTZEUR": "-8943.9"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "NaN"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "Infinity"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "1e30"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "9" * 31}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "99999999999"}, "XXBTZEUR has a wrong ask: it must be an exchange rate"),
        ({"a_XXBTZEUR": ""}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "8943.123456789"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "8943,9"}, "XXBTZEUR has a wrong ask: it must be plain decimal text"),
        ({"a_XXBTZEUR": "8943.7"}, "XXBTZEUR has a bid above its ask"),
        ({"a_XXBTZGBP": "8328.2"}, "XXBTZGBP has an ask more than 10 % above its bid"),
    ],
)
def test_price_that_cannot_be_one_is_refused_with_its_reason(change: dict[str, object], reason: str) -> None:
    assert f": {reason}" in reason_of(body(synthetic(**change)))


@pytest.mark.parametrize("level", [None, [], {}, "8943.9", 5])
def test_pair_without_a_book_is_refused(level: object) -> None:
    answer = synthetic()
    answer["result"]["XXBTZGBP"]["a"] = level
    assert reason_of(body(answer)) == "Kraken's answer cannot be used: XXBTZGBP has no ask."
    answer["result"]["XXBTZGBP"] = [level]
    assert reason_of(body(answer)) == "Kraken's answer cannot be used: XXBTZGBP has no bid."


def test_refusal_names_everything_that_is_wrong() -> None:
    reason = reason_of(body(synthetic(b_XXBTZEUR="NaN", a_XXBTZUSD="0")))
    assert "XXBTZEUR" in reason
    assert "XXBTZUSD" in reason


@pytest.mark.parametrize(
    "answer", [b"", b"<html>busy</html>", b"{", b"NaN", b"[" * 60_000, b"\xff\xfe", b'{"error":[],}']
)
def test_what_is_not_json_is_refused(answer: bytes) -> None:
    assert reason_of(answer) == "Kraken's answer is not JSON."


@pytest.mark.parametrize(
    "answer", [[], None, "ok", 5, {}, {"result": {}}, {"error": None}, {"error": {}}, {"error": ""}]
)
def test_json_of_another_shape_is_refused(answer: object) -> None:
    assert "no list `error`" in reason_of(body(answer))


@pytest.mark.parametrize("result", [None, [], "XXBTZEUR"])
def test_answer_without_pairs_is_refused(result: object) -> None:
    assert "no object `result`" in reason_of(body({"error": [], "result": result}))


def test_errors_count_though_the_prices_are_there_too() -> None:
    answer = synthetic() | {"error": ["EGeneral:Too many requests"]}
    assert reason_of(body(answer)) == "Kraken answered with an error: ['EGeneral:Too many requests']."


def test_long_error_is_cut_and_printable() -> None:
    reason = reason_of(body({"error": ["\x1b[2J\n" + "x" * 10_000]}))
    assert len(reason) < 300
    assert reason.isprintable()


@contextlib.asynccontextmanager
async def kraken(handler: Handler, path: str = "", **settings: Any) -> AsyncIterator[Kraken]:
    """The source, asking a stand-in for Kraken that answers by the handler."""
    app = web.Application()
    app.router.add_get(path + "/0/public/Ticker", handler)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    source = Kraken(
        Settings(kraken_url=f"http://127.0.0.1:{runner.addresses[0][1]}{path}", **settings), now=lambda: NOON
    )
    try:
        yield source
    finally:
        await source.close()
        await runner.cleanup()


async def failure_of(handler: Handler, **settings: Any) -> str:
    async with kraken(handler, **settings) as source:
        with pytest.raises(SourceFailed) as refusal:
            await source.quotes()
    return refusal.value.detail


async def test_one_request_asks_for_all_pairs_and_the_quotes_are_of_its_time() -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response(synthetic())

    async with kraken(answer) as source:
        seen = await source.quotes()
        assert list(seen.quotes) == parse(body(synthetic()), NOON)
        assert seen.replayed_from is None
        await source.quotes()
    assert [dict(request.query) for request in asked] == [{"pair": "XBTUSD,XBTEUR,XBTGBP"}] * 2
    assert asked[0].headers["User-Agent"].startswith("buydesk/")
    assert asked[0].transport is asked[1].transport, "the connection is kept"


async def test_address_may_be_a_mirror_below_a_path_with_a_slash_at_its_end() -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(synthetic())

    async with kraken(answer, path="/mirror/") as source:
        with pytest.raises(SourceFailed, match="status 404"):
            await source.quotes()
    async with kraken(answer, path="/mirror") as source:
        assert len((await source.quotes()).quotes) == 3


@pytest.mark.parametrize("status", [204, 400, 404, 429, 500, 503, 520])
async def test_status_other_than_200_is_refused_though_the_body_is_fine(status: int) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=b"" if status == 204 else body(synthetic()))

    assert await failure_of(answer) == f"Kraken answered with status {status}."


async def test_redirects_are_not_followed() -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        raise web.HTTPFound("/0/public/Ticker")

    assert await failure_of(answer) == "Kraken answered with status 302."
    assert len(asked) == 1


async def test_answer_that_does_not_end_is_cut_off() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 10_000)
        return response

    assert await failure_of(answer) == f"Kraken's answer has more than {ANSWER_BYTES_MAX} bytes."


async def test_compressed_answer_is_not_unpacked() -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.json_response(synthetic())
        response.enable_compression(web.ContentCoding.gzip)
        return response

    assert await failure_of(answer) == "Kraken's answer is not JSON."


async def test_silence_is_given_up_after_the_time_limit() -> None:
    given_up = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        await given_up.wait()
        return web.Response()

    async with kraken(answer, source_seconds_max=0.05) as source:
        with pytest.raises(SourceFailed) as refusal:
            await source.quotes()
        given_up.set()
    assert refusal.value.detail == "Kraken gave no answer (TimeoutError)."


async def test_connection_cut_amid_the_answer_is_a_failure() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "5000"})
        await response.prepare(request)
        await response.write(body(synthetic())[:100])
        assert request.transport is not None
        request.transport.close()
        return response

    assert "no answer (ClientPayloadError)" in await failure_of(answer)


async def test_nobody_there_is_a_failure() -> None:
    source = Kraken(Settings(kraken_url=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(SourceFailed, match="no answer") as refusal:
        await source.quotes()
    assert isinstance(refusal.value.__cause__, aiohttp.ClientConnectorError)
    await source.close()


async def test_address_that_is_none_is_a_failure() -> None:
    source = Kraken(Settings().model_copy(update={"kraken_url": "http://"}))
    with pytest.raises(SourceFailed, match="no answer"):
        await source.quotes()
    await source.close()


async def test_session_comes_from_the_factory_and_is_made_once() -> None:
    made = []

    def factory() -> aiohttp.ClientSession:
        made.append(aiohttp.ClientSession())
        return made[-1]

    source = Kraken(Settings(kraken_url=f"http://127.0.0.1:{free_port()}"), factory)
    assert made == []
    for _ in range(2):
        with pytest.raises(SourceFailed):
            await source.quotes()
    await source.close()
    assert [session.closed for session in made] == [True]


async def test_source_that_was_never_asked_closes_too() -> None:
    await Kraken(Settings()).close()
