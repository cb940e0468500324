"""Exchanges that are asked only where a setting names them: who is, what their answers mean, and that all know them."""

import json
from typing import Any

import pytest

from buydesk.backends.sources import EXCHANGES, EXTRA_EXCHANGES, exchanges
from buydesk.backends.sources.exchange import Book
from buydesk.errors import CannotStart
from buydesk.money import Currency
from buydesk.prices.model import SOURCES
from buydesk.settings.model import Settings
from buydesk.settings.reading import read_settings
from buydesk.settings.types import EXTRA_SOURCES, LIVE_SOURCES
from tests.clock import NOON
from tests.exchanges import bitvavo_answer, okx_answer
from tests.exchanges import exchanges as stand_ins_of_all
from tests.unit.test_sources import body, read

BITVAVO, OKX = EXTRA_EXCHANGES


def test_every_exchange_has_its_name_in_the_lists_of_the_settings_and_so_in_what_a_record_may_name() -> None:
    assert tuple(each.name for each in EXCHANGES) == LIVE_SOURCES
    assert tuple(each.name for each in EXTRA_EXCHANGES) == EXTRA_SOURCES
    assert set(SOURCES["live"]) == {*LIVE_SOURCES, *EXTRA_SOURCES}


@pytest.mark.parametrize(
    ("named", "extra"), [("", []), ("okx", ["okx"]), (" okx , bitvavo", ["bitvavo", "okx"]), ("okx,okx", ["okx"])]
)
def test_only_those_that_are_named_are_asked(named: str, extra: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_EXTRA_SOURCES", named)
    assert [source.name for source in exchanges(read_settings())] == [*LIVE_SOURCES, *extra]


@pytest.mark.parametrize("named", ["kraken", "okx,", "OKX", "okx;bitvavo"])
def test_other_names_are_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_EXTRA_SOURCES", named)
    with pytest.raises(CannotStart) as refused:
        read_settings()
    assert str(refused.value) == (
        "BUYDESK_EXTRA_SOURCES: must be names of exchanges, of bitvavo and okx, separated by commas"
    )


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        ({"price_sources_min": 6}, 5),
        ({"price_sources_min": 7, "price_feed": "live", "extra_sources": ("okx", "okx")}, 6),
        ({"price_sources_min": 6, "extra_sources": ("okx",)}, 5),
    ],
)
def test_no_more_sources_have_to_agree_than_there_are(given: dict[str, Any], sources: int) -> None:
    with pytest.raises(CannotStart, match=rf"^BUYDESK_PRICE_SOURCES_MIN .* at most the number of sources \({sources};"):
        read_settings(**given)


def test_all_seven_may_have_to_agree() -> None:
    read_settings(price_sources_min=7, price_feed="live", extra_sources="bitvavo,okx")
    with pytest.raises(CannotStart, match=r"^BUYDESK_PRICE_SOURCES_MIN: "):
        read_settings(price_sources_min=8, price_feed="live", extra_sources="bitvavo,okx")


async def test_they_quote_the_currencies_that_they_have_real_books_of_and_reject_nothing() -> None:
    async with stand_ins_of_all(*EXTRA_SOURCES) as stand_ins:
        settings = Settings(extra_sources=("bitvavo", "okx"), **stand_ins.settings)
        for source in exchanges(settings)[len(LIVE_SOURCES) :]:
            seen = await source.quotes()
            await source.close()
            has = [Currency.EUR] if source.name == "bitvavo" else [Currency.EUR, Currency.USD]
            assert ([quote.currency for quote in seen.quotes], seen.rejected) == (has, ())
            assert {quote.source for quote in seen.quotes} == {source.name}


@pytest.mark.parametrize("market", ["BTC-USD", "ETH-EUR", "", None, 5])
def test_bitvavo_s_answer_about_another_market_is_refused(market: object) -> None:
    answer = json.loads(bitvavo_answer("1", "2")) | {"market": market}
    assert read(BITVAVO, body(answer)) == "the market is not BTC-EUR"


@pytest.mark.parametrize("answer", [[], None, "ok", {}, [{"market": "BTC-EUR", "bid": "1", "ask": "2"}]])
def test_bitvavo_s_answer_names_its_market(answer: object) -> None:
    assert read(BITVAVO, body(answer)) == "no member market"


def test_bitvavo_s_empty_book_is_refused() -> None:
    answer = json.loads(bitvavo_answer("1", "2")) | {"bid": None}
    assert read(BITVAVO, body(answer)) == "the bid is not text"


def of_okx(**members: object) -> bytes:
    """An answer of OKX with other members in its row."""
    answer = json.loads(okx_answer("1", "2", "1769860800123"))
    answer["data"][0] |= members
    return body(answer)


def test_okx_s_time_is_read_to_the_millisecond() -> None:
    assert read(OKX, of_okx()) == Book(10**8, 2 * 10**8, NOON.replace(microsecond=123_000))
    assert isinstance(read(OKX, of_okx(ts="9" * 13)), Book)


@pytest.mark.parametrize("ts", ["", "-1", "1e12", "1769860800.5", "9" * 14, "soon", "١٧٦٩٨٦٠٨٠٠"])
def test_okx_s_time_that_is_none_is_refused(ts: str) -> None:
    assert read(OKX, of_okx(ts=ts)) == "the ts is not a number of milliseconds since 1970"


@pytest.mark.parametrize("ts", [1769860800123, None, {}])
def test_okx_s_time_is_text(ts: object) -> None:
    assert read(OKX, of_okx(ts=ts)) == "the ts is not text"


@pytest.mark.parametrize("pair", ["BTC-USD", "BTC-USDT", "", None])
def test_okx_s_answer_about_another_pair_is_refused(pair: object) -> None:
    assert read(OKX, of_okx(instId=pair)) == "the instId is not BTC-EUR"


@pytest.mark.parametrize("rows", [[], None, {}, "x", [{}, {}]])
def test_okx_s_answer_has_one_row(rows: object) -> None:
    assert read(OKX, body({"code": "0", "msg": "", "data": rows})) == "not one row of data"


@pytest.mark.parametrize("member", ["instId", "bidPx", "askPx", "ts"])
def test_okx_s_missing_member_is_named(member: str) -> None:
    answer = json.loads(of_okx())
    del answer["data"][0][member]
    assert read(OKX, body(answer)) == f"no member {member}"


def test_okx_s_answer_without_data_is_refused() -> None:
    assert read(OKX, b"{}") == read(OKX, b"[]") == "no member data"
