"""What exchanges say of their errors, over real TCP: their own words reach the reason, bounded and printable."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from buydesk.backends.sources import EXCHANGES, EXTRA_EXCHANGES
from buydesk.backends.sources.answers import ERROR_BYTES_MAX, WORDS_CHARS_MAX, words_in
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.errors import SourceFailed
from buydesk.money import Currency
from buydesk.prices.model import RejectedQuote
from buydesk.prices.polling import REASON_CHARS_MAX, SourcePoller
from buydesk.reading import decode_json
from buydesk.settings.model import Settings
from buydesk.settings.types import EXTRA_SOURCES
from tests.clock import NOON, FakeClock
from tests.exchanges import StandIns, answering, bitstamp_answer, exchanges, kraken_answer
from tests.unit.test_exchange import failure_at, flooding

BY_NAME = {exchange.name: exchange for exchange in EXCHANGES + EXTRA_EXCHANGES}
GEMINI_MAINTENANCE = {
    "result": "error",
    "reason": "Maintenance",
    "message": "The Gemini Exchange is undergoing maintenance",
}


@pytest.fixture
async def stand_ins() -> AsyncIterator[StandIns]:
    async with exchanges(*EXTRA_SOURCES) as all_of_them:
        yield all_of_them


def saying(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Any:
    """Answers everything so."""
    written = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=written, status=status, headers=headers)

    return answering(answer)


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("kraken", {"error": ["EGeneral:Temporary lockout"]}, "EGeneral:Temporary lockout"),
        ("kraken", {"error": ["EService:Unavailable", "EService:Busy"]}, "EService:Unavailable, EService:Busy"),
        ("bitfinex", ["error", 10020, "symbols: invalid"], "10020, symbols: invalid"),
        ("bitfinex", ["error", 11010, "ERR_RATE_LIMIT"], "11010, ERR_RATE_LIMIT"),
        ("gemini", GEMINI_MAINTENANCE, "Maintenance, The Gemini Exchange is undergoing maintenance"),
        ("coinbase", {"message": "NotFound"}, "NotFound"),
        ("bitvavo", {"errorCode": 205, "error": "market parameter is invalid."}, "market parameter is invalid."),
        ("okx", {"code": "51001", "msg": "Instrument ID does not exist", "data": []}, "Instrument ID does not exist"),
        ("bitstamp", {"status": "error", "reason": "Invalid pair.", "code": "API0017"}, "Invalid pair."),
        ("bitstamp", {"status": "error", "reason": {"__all__": ["Too busy", "Later"]}}, "Too busy, Later"),
    ],
)
async def test_words_of_every_exchange_are_told_whatever_the_status(name: str, body: object, words: str) -> None:
    async with saying(body) as url:
        assert await failure_at(name, url) == f"an error: {words}"
    async with saying(body, 503) as url:
        assert await failure_at(name, url) == f"status 503 Service Unavailable: {words}"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ""),
        (b"Too  many\r\nrequests\n", ": Too many requests"),
        (b"<html><head><title>Busy</title></head>\n<body class='x'>Come back</body>", ": Busy Come back"),
        (b"<" * 4000, f": {'<' * WORDS_CHARS_MAX}"),
        (b"{}", ""),
        (b"[]", ""),
        (b"5", ""),
        (b'{"code": 5, "status": "no"}', ""),
        (b'{"error": 5, "message": null, "reason": {}}', ""),
        (b'{"message": "one", "message": "two"}', ': {"message": "one", "message": "two"}'),
        (b'{"message": "\\u001b[2J\\n\\u202eevil\\ud800"}', ": ?[2J ?evil?"),
        ('{"message": "Störung ☃"}'.encode(), ": Störung ☃"),
        (b"\x1f\x8b\x08 not text \xff", ""),
        (b"[" * 4000, f": {'[' * WORDS_CHARS_MAX}"),
        (b"x" * (ERROR_BYTES_MAX - 1) + "ö".encode(), f": {'x' * WORDS_CHARS_MAX}"),
        (b'{"message": "' + b"y" * 100_000 + b'"}', ": " + ('{"message": "' + "y" * 500)[:WORDS_CHARS_MAX]),
    ],
)
async def test_words_beside_a_status_are_short_and_printable_whatever_they_are(body: bytes, words: str) -> None:
    async with saying(body, 418) as url:
        assert await failure_at("coinbase", url) == f"status 418 I'm a Teapot{words}"


async def test_endless_words_are_cut_off() -> None:
    async with flooding(b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b"so many words " * 1000) as url:
        told = await failure_at("kraken", url)
    assert told == "status 429 Too Many Requests: " + ("so many words " * 10)[:WORDS_CHARS_MAX]


async def test_words_that_never_come_do_not_cost_the_status() -> None:
    async with flooding(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 500\r\n\r\nso") as url:
        assert await failure_at("kraken", url) == "status 429 Too Many Requests"


async def test_words_that_take_too_long_do_not_cost_the_status() -> None:
    given_up = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=429)
        await response.prepare(request)
        await response.write(b"so")
        await given_up.wait()
        return response

    async with answering(answer) as url:
        assert await failure_at("kraken", url, source_seconds_max=0.3) == "status 429 Too Many Requests"
        given_up.set()


async def test_words_of_three_pairs_fit_into_a_reason_that_logs_can_take() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"message": f"{request.path}\r\n" + "\x00long " * 200}, status=500)

    async with answering(answer) as url:
        source = ExchangeSource(BY_NAME["coinbase"], url, Settings())
        poller = SourcePoller(source, Settings())
        [rejected] = (await poller.poll()).rejected
        await source.close()
    assert rejected.reason == poller.state().last_error
    assert len(rejected.reason) == REASON_CHARS_MAX
    assert rejected.reason.isprintable()
    assert "EUR: status 500 Internal Server Error: /products/BTC-EUR/ticker" in rejected.reason


async def test_kraken_s_warning_beside_a_whole_answer_is_told_and_the_answer_used() -> None:
    answer = json.loads(kraken_answer(dict.fromkeys(Currency, ("1", "1")))) | {"error": ["WDatabase:Lagging"]}
    async with saying(answer) as url:
        source = ExchangeSource(BY_NAME["kraken"], url, Settings())
        seen = await source.quotes()
        await source.close()
    assert [quote.currency for quote in seen.quotes] == list(Currency)
    told = [RejectedQuote("kraken", f"{currency}: a warning: WDatabase:Lagging") for currency in Currency]
    assert list(seen.rejected) == told


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kraken", "an error: EQuery:Unknown asset pair"),
        ("bitfinex", "0 rows of tBTCGBP"),
        ("coinbase", "status 404 Not Found: 404: Not Found"),
    ],
)
async def test_pair_that_is_delisted_costs_that_pair_only(name: str, reason: str, stand_ins: StandIns) -> None:
    stand_ins[name].delisted = frozenset({Currency.GBP})
    source = ExchangeSource(BY_NAME[name], stand_ins[name].url, Settings())
    seen = await source.quotes()
    await source.close()
    assert [quote.currency for quote in seen.quotes] == [Currency.EUR, Currency.USD]
    assert seen.rejected == (RejectedQuote(name, f"GBP: {reason}"),)


async def retry_after(status: int, headers: Mapping[str, str]) -> int | None:
    """What the source passes on."""
    async with saying(b"", status, headers) as url:
        source = ExchangeSource(BY_NAME["kraken"], url, Settings(), FakeClock())
        with pytest.raises(SourceFailed) as refusal:
            await source.quotes()
        await source.close()
    return refusal.value.retry_after_seconds


LATER = format_datetime(NOON + timedelta(minutes=2), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "0"}, None),
        ({"Retry-After": " 30 "}, 30),
        ({"Retry-After": "9" * 400}, 2**31 - 1),
        ({"Retry-After": LATER, "Date": "soon"}, 120),
        ({"Retry-After": LATER, "Date": format_datetime(NOON + timedelta(seconds=90), usegmt=True)}, 30),
        ({"Retry-After": format_datetime(NOON, usegmt=True), "Date": LATER}, None),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT", "Date": LATER}, 2**31 - 1),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 -1200"}, None),
        ({"Retry-After": "Fri, 30 Jan 2026 12:00:00 -0000"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1.5"}, None),
    ],
)
async def test_exchange_that_has_had_enough_says_when_to_ask_again(
    status: int, headers: dict[str, str], seconds: int | None
) -> None:
    assert await retry_after(status, headers) == seconds


@pytest.mark.parametrize("status", [301, 403, 500])
async def test_retry_after_of_another_status_is_not_kept_to(status: int) -> None:
    assert await retry_after(status, {"Retry-After": "30"}) is None


async def test_exchange_that_has_had_enough_of_one_pair_is_left_alone_with_all_for_the_longest_it_said() -> None:
    async def answer(request: web.Request) -> web.Response:
        if "eur" in request.path:
            return web.Response(body=bitstamp_answer("1", "1", str(int(NOON.timestamp()))))
        return web.Response(status=429, headers={"Retry-After": "20" if "gbp" in request.path else "40"})

    clock = FakeClock()
    async with answering(answer) as url:
        source = ExchangeSource(BY_NAME["bitstamp"], url, Settings(), clock)
        poller = SourcePoller(source, Settings(), clock=clock)
        assert [quote.currency for quote in (await poller.poll()).quotes] == [Currency.EUR]
        assert poller.state().resting_until == NOON + timedelta(seconds=40)
        clock.seconds += 39
        assert (await poller.poll(may_rest=False)).quotes == ()
        await source.close()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner | st.just("error"), max_size=5)
            | st.dictionaries(st.sampled_from(["error", "reason", "message", "msg", "x"]), inner, max_size=5)
        ),
        max_leaves=20,
    )
)
def test_words_in_any_document_are_short_and_printable(document: object) -> None:
    words = words_in(decode_json(json.dumps(document)))
    assert words.isprintable()
    assert len(words) <= WORDS_CHARS_MAX
