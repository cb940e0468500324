"""The exchanges' answers, as recorded and as made up in the recorded shape: what is read in them, and what is not."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.backends.sources import EXCHANGES, EXTRA_EXCHANGES, exchanges
from buydesk.backends.sources.exchange import Book, Exchange, parse
from buydesk.money import RATE_E8_MAX, RATE_E8_MIN, Currency
from buydesk.settings.model import Settings
from tests.exchanges import (
    bitfinex_answer,
    bitstamp_answer,
    bitvavo_answer,
    coinbase_answer,
    gemini_answer,
    kraken_answer,
    okx_answer,
    recorded,
)

EUR, GBP, USD = Currency
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
BY_NAME = {exchange.name: exchange for exchange in EXCHANGES + EXTRA_EXCHANGES}
BITFINEX, BITSTAMP, COINBASE, GEMINI, KRAKEN = EXCHANGES
BITVAVO, OKX = EXTRA_EXCHANGES
# Those that write prices as text, with one request a pair.
TICKERS = (BITSTAMP, COINBASE, GEMINI)

# Synthetic answers in the recorded shape, all with the same bid and ask of every pair. A price is given as JSON.
ANSWERS: dict[str, Callable[[str, str], bytes]] = {
    "bitfinex": lambda bid, ask: bitfinex_answer(dict.fromkeys(Currency, (bid, ask))),
    "bitstamp": lambda bid, ask: with_prices(bitstamp_answer("B", "A", "1769860800"), bid, ask),
    "bitvavo": lambda bid, ask: with_prices(bitvavo_answer("B", "A"), bid, ask),
    "coinbase": lambda bid, ask: with_prices(coinbase_answer("B", "A", "2026-01-31T12:00:00Z"), bid, ask),
    "gemini": lambda bid, ask: with_prices(gemini_answer("B", "A", "1769860800000"), bid, ask),
    "kraken": lambda bid, ask: with_prices(kraken_answer(dict.fromkeys(Currency, ("B", "A"))), bid, ask),
    "okx": lambda bid, ask: with_prices(okx_answer("B", "A", "1769860800000"), bid, ask),
}


def with_prices(answer: bytes, bid: str, ask: str) -> bytes:
    return answer.replace(b'"B"', bid.encode()).replace(b'"A"', ask.encode())


def written(exchange: Exchange, price: str) -> str:
    """The price as the exchange writes it in JSON."""
    return price if exchange is BITFINEX else json.dumps(price)


def body(answer: object) -> bytes:
    return json.dumps(answer).encode()


def read(exchange: Exchange, answer: bytes, currency: Currency = EUR) -> Book | str:
    """The book of a currency, or why there is none."""
    books, missing = parse(exchange, answer, (currency,))
    return books[currency] if currency in books else missing[currency]


def test_recorded_kraken_answer_is_read_exactly_and_what_it_lacks_is_named() -> None:
    answer = body(recorded("kraken"))
    assert read(KRAKEN, answer) == Book(8943_80000000, 8943_90000000)
    assert read(KRAKEN, answer, USD) == "no member XXBTZUSD"
    assert read(KRAKEN, body(recorded("kraken", 1))) == Book(8120_60000000, 8120_70000000)


def test_recorded_coinbase_answer_is_read_exactly() -> None:
    traded_at = datetime(2024, 3, 13, 11, 10, 41, 270099, UTC)
    assert read(COINBASE, body(recorded("coinbaseexchange"))) == Book(73360_34000000, 73369_19000000, traded_at)


def test_recorded_bitstamp_answer_is_read_exactly_and_its_last_trade_below_the_bid_is_not_used() -> None:
    answer = recorded("bitstamp")
    assert int(answer["last"]) < int(answer["bid"])
    then = datetime(2024, 3, 13, 11, 10, 41, tzinfo=UTC)
    assert read(BITSTAMP, body(answer)) == Book(73353_00000000, 73367_00000000, then)


def test_recorded_bitfinex_answer_is_read_exactly_and_what_it_lacks_is_named() -> None:
    answer = body(recorded("bitfinex"))
    assert read(BITFINEX, answer, USD) == Book(101530_00000000, 101540_00000000)
    assert read(BITFINEX, answer) == "0 rows of tBTCEUR"


def test_recorded_gemini_answer_is_read_exactly_and_the_time_of_its_volume_is_not_the_book_s() -> None:
    answer = recorded("gemini")
    assert answer["volume"]["timestamp"] % (5 * 60 * 1000) == 0, "it moves every few minutes"
    assert read(GEMINI, body(answer), USD) == Book(11381_50000000, 11388_08000000)
    assert read(GEMINI, body(answer)) == "no member EUR", "it is of another pair"


def test_exchanges_are_those_of_the_settings_each_at_its_address() -> None:
    assert [source.name for source in exchanges(Settings())] == ["bitfinex", "bitstamp", "coinbase", "gemini", "kraken"]


def test_real_pairs_of_all_our_currencies_are_asked_for_and_no_stablecoins() -> None:
    asked = {name: list(exchange.requests) for name, exchange in BY_NAME.items()}
    assert asked == {
        "bitfinex": ["/v2/tickers?symbols=tBTCEUR,tBTCGBP,tBTCUSD"],
        "bitstamp": ["/api/v2/ticker/btceur/", "/api/v2/ticker/btcgbp/", "/api/v2/ticker/btcusd/"],
        "coinbase": ["/products/BTC-EUR/ticker", "/products/BTC-GBP/ticker", "/products/BTC-USD/ticker"],
        "gemini": ["/v1/pubticker/btceur", "/v1/pubticker/btcgbp", "/v1/pubticker/btcusd"],
        "kraken": [f"/0/public/Ticker?pair=XBT{currency}" for currency in ("EUR", "GBP", "USD")],
        "bitvavo": ["/v2/ticker/book?market=BTC-EUR"],
        "okx": ["/api/v5/market/ticker?instId=BTC-EUR", "/api/v5/market/ticker?instId=BTC-USD"],
    }
    for exchange in EXCHANGES:
        assert [currency for told in exchange.requests.values() for currency in told] == list(Currency)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    ("bid", "ask", "book"),
    [
        ("41191.86", "41191.96", Book(41191_86000000, 41191_96000000)),
        ("0.1", "1", "the bid must be an exchange rate"),
        ("1", "1", Book(1_00000000, 1_00000000)),
        ("10000000000", "10000000000.00000000", Book(10**18, 10**18)),
        ("41191.00000001", "41191.12345678", Book(41191_00000001, 41191_12345678)),
        # 2^53 has fewer digits: a float would lose the last ones.
        ("9999999999.12345678", "9999999999.12345679", Book(9999999999_12345678, 9999999999_12345679)),
        # Crossed: the rule refuses it, and the record shows it.
        ("41191.96", "41191.86", Book(41191_96000000, 41191_86000000)),
    ],
)
def test_prices_of_synthetic_answers_are_exact(name: str, bid: str, ask: str, book: Book | str) -> None:
    exchange = BY_NAME[name]
    seen = read(exchange, ANSWERS[name](written(exchange, bid), written(exchange, ask)))
    if isinstance(book, str):
        assert isinstance(seen, str)
        assert seen.startswith(book)
    else:
        assert isinstance(seen, Book)
        assert (seen.bid_e8, seen.ask_e8) == (book.bid_e8, book.ask_e8)
        assert seen.time == (NOON if exchange in (BITSTAMP, COINBASE, OKX) else None)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    ("price", "reason"),
    [
        ("0", "must be an exchange rate between"),
        ("0.00000", "must be an exchange rate between"),
        ("10000000000.00000001", "must be an exchange rate between"),
        ("99999999999", "must be an exchange rate between"),
        ("-41191.9", "must be plain decimal text"),
        ("-0", "must be plain decimal text"),
        ("1e5", "must be plain decimal text"),
        ("4.11919e4", "must be plain decimal text"),
        ("1e400", "must be plain decimal text"),
        ("1" + 30 * "0", "must be plain decimal text"),
        ("9" * 5000, "must be plain decimal text"),
        ("41191.123456789", "must be plain decimal text"),
    ],
)
def test_number_that_is_no_price_is_refused(name: str, price: str, reason: str) -> None:
    exchange = BY_NAME[name]
    price, fine = written(exchange, price), written(exchange, "41191.9")
    for bad, answer in {"bid": ANSWERS[name](price, fine), "ask": ANSWERS[name](fine, price)}.items():
        seen = read(exchange, answer)
        assert isinstance(seen, str)
        assert seen.startswith(f"the {bad} {reason}")


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    "price", ["", "NaN", "Infinity", "-Infinity", "inf", "41191,9", " 41191.9", "41191.9 ", "+41191.9", "0x10", "٤١١٩١"]
)
def test_text_that_is_no_number_is_refused(name: str, price: str) -> None:
    exchange = BY_NAME[name]
    seen = read(exchange, ANSWERS[name](json.dumps(price), written(exchange, "41191.9")))
    assert seen == (
        "the bid is not a number"
        if exchange is BITFINEX
        else "the bid must be plain decimal text with at most 8 places, such as 0.00167509"
    )


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("price", ["null", "true", "false", "[]", "{}", '["41191.9"]', '{"bid": "41191.9"}'])
def test_value_of_another_kind_is_refused(name: str, price: str) -> None:
    exchange = BY_NAME[name]
    seen = read(exchange, ANSWERS[name](written(exchange, "41191.9"), price))
    assert seen == ("the ask is not a number" if exchange is BITFINEX else "the ask is not text")


@pytest.mark.parametrize("name", BY_NAME)
def test_numbers_where_text_is_due_and_text_where_numbers_are_due_are_refused(name: str) -> None:
    exchange = BY_NAME[name]
    swapped = '"41191.9"' if exchange is BITFINEX else "41191.9"
    seen = read(exchange, ANSWERS[name](swapped, swapped))
    assert seen == ("the bid is not a number" if exchange is BITFINEX else "the bid is not text")


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_spoil_the_answer(name: str, constant: str) -> None:
    assert read(BY_NAME[name], ANSWERS[name](constant, "1")) == "the answer is not JSON"


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b" ",
        b"<html>busy</html>",
        b"{",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe[\x00]\x00",
        b"\xef\xbb\xbf[]",
        b'{"error":[],}',
        b"[]]",
        b'"\x00"',
    ],
)
def test_what_is_not_json_is_refused(name: str, answer: bytes) -> None:
    assert read(BY_NAME[name], answer) == "the answer is not JSON"


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
@pytest.mark.parametrize("answer", [b'{"error":["EService:Busy"],"error":[]}', b'[{"bid":"1","ask":"2","bid":"3"}]'])
def test_answer_that_repeats_a_member_is_refused(exchange: Exchange, answer: bytes) -> None:
    assert read(exchange, answer) == "an answer that repeats a member"


@pytest.mark.parametrize("exchange", TICKERS, ids=lambda exchange: exchange.name)
@pytest.mark.parametrize("answer", [[], None, "ok", 5, 5.5, True, {}, [{}], {"message": 5, "code": "x"}])
def test_json_of_another_shape_has_no_bid(exchange: Exchange, answer: object) -> None:
    assert read(exchange, body(answer)) == "no member bid"


@pytest.mark.parametrize("exchange", TICKERS, ids=lambda exchange: exchange.name)
def test_missing_member_is_named(exchange: Exchange) -> None:
    whole = json.loads(ANSWERS[exchange.name]('"1"', '"1"'))
    members = {"bid", "ask"} | {"bitstamp": {"timestamp"}, "coinbase": {"time"}, "gemini": {"volume"}}[exchange.name]
    for name in members:
        part = {other: value for other, value in whole.items() if other != name}
        assert read(exchange, body(part)) == f"no member {name}"
    assert isinstance(read(exchange, body({name: whole[name] for name in members})), Book), "nothing else is needed"


@pytest.mark.parametrize("answer", [[], None, "ok", 5, {}, {"result": {}}])
def test_kraken_answer_without_errors_is_no_answer(answer: object) -> None:
    assert read(KRAKEN, body(answer)) == "no member error"


@pytest.mark.parametrize("error", [None, {}, "", 0, False])
def test_kraken_s_errors_are_a_list(error: object) -> None:
    answer = json.loads(ANSWERS["kraken"]('"1"', '"1"')) | {"error": error}
    assert read(KRAKEN, body(answer)) == "the error is not a list"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["EGeneral:Too many requests", None], "an error: EGeneral:Too many requests"),
        (["WDatabase:Lagging", "EService:Busy"], "an error: WDatabase:Lagging, EService:Busy"),
        ([None], "an error without words"),
        ([[5]], "an error: 5"),
        ([""], "an error without words"),
    ],
)
def test_kraken_s_errors_count_though_the_prices_are_there_too(said: list[object], told: str) -> None:
    answer = json.loads(ANSWERS["kraken"]('"1"', '"1"')) | {"error": said}
    assert read(KRAKEN, body(answer)) == told


def test_kraken_s_warnings_are_told_beside_the_book() -> None:
    answer = json.loads(ANSWERS["kraken"]('"1"', '"1"')) | {"error": ["WDatabase:Lagging", "WGeneral:Soon"]}
    assert read(KRAKEN, body(answer)) == Book(10**8, 10**8, None, "WDatabase:Lagging, WGeneral:Soon")
    del answer["result"]
    assert read(KRAKEN, body(answer)) == "an error: WDatabase:Lagging, WGeneral:Soon"


def test_kraken_s_long_error_is_cut_and_printable() -> None:
    seen = read(KRAKEN, body({"error": ["\x1b[2J\n" + "x" * 10_000, [[[]]]]}))
    assert isinstance(seen, str)
    assert len(seen) < 300
    assert seen.isprintable()


@pytest.mark.parametrize("result", [None, [], "XXBTZEUR", {}, {"XBTEUR": {"b": ["1"], "a": ["1"]}}, {"BTC/EUR": {}}])
def test_kraken_s_pairs_under_other_names_are_not_taken(result: object) -> None:
    assert read(KRAKEN, body({"error": [], "result": result})) == "no member XXBTZEUR"


@pytest.mark.parametrize("level", [[], None, "41191.9", {"0": "41191.9"}])
def test_kraken_s_price_is_the_first_of_a_list(level: object) -> None:
    assert read(KRAKEN, body({"error": [], "result": {"XXBTZEUR": {"b": level, "a": ["1"]}}})) == "no bid"


def test_pairs_that_nobody_asked_for_are_ignored() -> None:
    kraken: dict[str, Any] = json.loads(ANSWERS["kraken"]('"1"', '"1"'))
    kraken["result"] |= {"XETHZCAD": recorded("kraken", 1)["result"]["XETHZCAD"], "nonsense": None}
    bitfinex = b'[["fUSD",1,2,3,4],["tBTCUST",9,1,9,1],null,[],"tBTCEUR",' + ANSWERS["bitfinex"]("1", "1")[1:]
    for exchange, answer in ((KRAKEN, body(kraken)), (BITFINEX, bitfinex)):
        books, missing = parse(exchange, answer, tuple(Currency))
        assert (len(books), missing) == (3, {})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('["error",10020,"symbol: invalid"]', "an error: 10020, symbol: invalid"),
        ('{"tBTCEUR":[1,2,3]}', "0 rows of tBTCEUR"),
        ('[["tBTCUSD",1,1,1,1]]', "0 rows of tBTCEUR"),
        ('[["TBTCEUR",1,1,1,1]]', "0 rows of tBTCEUR"),
        ('[["tBTCEUR"]]', "0 rows of tBTCEUR"),
        ('[["tBTCEUR",1,1]]', "0 rows of tBTCEUR"),
        ('[["tBTCEUR",1,1,1],["tBTCEUR",1,1,1]]', "2 rows of tBTCEUR"),
        ('[["tBTCEUR",null,1,1]]', "the bid is not a number"),
        ('[["tBTCEUR",1,1,{}]]', "the ask is not a number"),
    ],
)
def test_bitfinex_row_has_to_be_there_once(answer: str, reason: str) -> None:
    assert read(BITFINEX, answer.encode()) == reason


@pytest.mark.parametrize(
    "time",
    [
        "",
        "yesterday",
        "2026-01-31T12:00:00",
        "10000-01-01T00:00:00Z",
        "-2026-01-31T12:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "2026-02-30T12:00:00Z",
        "1769860800",
        "2026-01-31T12:00:00\ud800",
        "٢٠٢٦-01-31T12:00:00Z",
    ],
)
def test_coinbase_time_that_is_none_is_refused(time: str) -> None:
    assert read(COINBASE, coinbase_answer("1", "1", time)) == "the time is not ISO 8601 with a zone"


@pytest.mark.parametrize("time", ["1769860800", "1e400", "null", "true", "{}", '["2026-01-31T12:00:00Z"]'])
def test_coinbase_time_is_text(time: str) -> None:
    answer = coinbase_answer("1", "1", "@").replace(b'"@"', time.encode())
    assert read(COINBASE, answer) == "the time is not text"


@pytest.mark.parametrize(
    ("time", "meant"),
    [
        ("2026-01-31T12:00:00.123456789Z", NOON.replace(microsecond=123456)),
        ("2026-01-31T13:00:00+01:00", NOON),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59Z", datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_coinbase_time_is_read_however_far_away(time: str, meant: datetime) -> None:
    assert read(COINBASE, coinbase_answer("1", "1", time)) == Book(10**8, 10**8, meant)


@pytest.mark.parametrize(
    "timestamp", ["", "-1", "1e9", "1769860800.5", "17698608000", "9" * 400, "now", "NaN", " 1769860800", "١٧٦٩٨٦٠٨٠٠"]
)
def test_bitstamp_time_that_is_none_is_refused(timestamp: str) -> None:
    seen = read(BITSTAMP, bitstamp_answer("1", "1", timestamp))
    assert seen == "the timestamp is not a number of seconds since 1970"


@pytest.mark.parametrize("timestamp", ["1769860800", "1769860800.0", "1e400", "null", "false", "[]"])
def test_bitstamp_time_is_text(timestamp: str) -> None:
    answer = bitstamp_answer("1", "1", "@").replace(b'"@"', timestamp.encode())
    assert read(BITSTAMP, answer) == "the timestamp is not text"


def test_bitstamp_time_is_read_however_far_away() -> None:
    for seconds in (0, 9_999_999_999):
        book = Book(10**8, 10**8, datetime.fromtimestamp(seconds, UTC))
        assert read(BITSTAMP, bitstamp_answer("1", "1", str(seconds))) == book


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("timestamp", ["-1", "1e400", "9" * 400, '"soon"', "null"])
def test_gemini_s_time_of_the_volume_may_be_anything_and_extra_members_too(name: str, timestamp: str) -> None:
    assert read(GEMINI, gemini_answer("1", "1", timestamp)) == Book(10**8, 10**8)
    exchange = BY_NAME[name]
    if exchange is not BITFINEX:
        answer = ANSWERS[name]('"1"', '"1"')[:-1] + f', "further": {timestamp}}}'.encode()
        assert isinstance(read(exchange, answer), Book)


def check(exchange: Exchange, answer: bytes) -> None:
    """Whatever the bytes are: each currency has a book of integers within the bounds of a rate, or a short reason."""
    books, missing = parse(exchange, answer, tuple(Currency))
    assert books.keys() | missing.keys() == set(Currency)
    assert not books.keys() & missing.keys()
    for book in books.values():
        for rate_e8 in (book.bid_e8, book.ask_e8):
            assert type(rate_e8) is int
            assert RATE_E8_MIN <= rate_e8 <= RATE_E8_MAX
        assert book.time is None or book.time.tzinfo is UTC
    for reason in missing.values():
        assert reason.isprintable()
        assert 0 < len(reason) < 300


names = st.sampled_from(sorted(BY_NAME))
# What exchanges write and what they might: words of theirs, so that shapes come near the real ones, and numbers.
words = st.sampled_from(
    ["error", "result", "XXBTZEUR", "a", "b", "bid", "ask", "time", "timestamp", "volume", "tBTCEUR", "1", "41191.9"]
)
numbers = st.one_of(
    st.integers().map(str),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(["1e400", "-0"]),
)


@given(names, st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(name: str, answer: bytes) -> None:
    check(BY_NAME[name], answer)


@given(
    names,
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | words | numbers,
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(words | st.text(max_size=5), inner, max_size=5),
        max_leaves=20,
    ),
)
def test_documents_of_any_shape_are_read_or_refused(name: str, document: object) -> None:
    check(BY_NAME[name], json.dumps(document).encode())


@given(names, st.data())
def test_answers_with_anything_put_anywhere_are_read_or_refused(name: str, data: st.DataObject) -> None:
    exchange = BY_NAME[name]
    answer = ANSWERS[name](written(exchange, "41191.86"), written(exchange, "41191.96")).decode()
    # One scalar, or some bytes, in the place of others.
    spots = [match.span() for match in re.finditer(r'"[^"]*"|[0-9.]+|[\[\]{}:,]', answer)]
    begin, end = data.draw(st.sampled_from(spots))
    put = data.draw(numbers | words.map(json.dumps) | st.text(max_size=10) | st.text(max_size=10).map(json.dumps))
    check(exchange, (answer[:begin] + put + answer[end:]).encode(errors="surrogatepass"))
    check(exchange, answer[:begin].encode())


@given(st.lists(st.integers(RATE_E8_MIN, RATE_E8_MAX), min_size=2, max_size=2), names)
def test_every_price_of_eight_places_is_read_as_it_was_written(prices_e8: list[int], name: str) -> None:
    exchange = BY_NAME[name]
    bid, ask = (written(exchange, f"{rate_e8 // 10**8}.{rate_e8 % 10**8:08d}") for rate_e8 in prices_e8)
    seen = read(exchange, ANSWERS[name](bid, ask))
    assert isinstance(seen, Book)
    assert [seen.bid_e8, seen.ask_e8] == prices_e8
