import random
import sys
from bisect import bisect_left
from collections.abc import Iterator
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from itertools import product
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from buydesk.money import (
    AMOUNT_CENTS_MAX,
    MARKUP_BP_MAX,
    RATE_E8_MAX,
    RATE_E8_MIN,
    SATOSHI_MAX,
    Currency,
    NotMoney,
    cents_for,
    format_btc,
    format_cents,
    format_rate,
    parse_amount,
    parse_bitcoin,
    parse_btc,
    parse_markup,
    parse_rate,
    parse_sale_rate,
    sale_rate,
    satoshi_for,
)

RANDOM_CASES = 1_000_010
amounts = st.integers(1, AMOUNT_CENTS_MAX)
rates = st.integers(RATE_E8_MIN, RATE_E8_MAX)

# Texts that are numbers, nearly numbers, and the characters that make the difference.
_digits = st.text("0123456789", max_size=14)
number_like = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "", "-", "+", "0", " "]),
    _digits,
    st.one_of(st.just(""), st.builds(".{}".format, _digits)),
    st.one_of(
        st.just(""), st.builds("{}{}".format, st.sampled_from(["e", "E", "e+", "e-"]), st.text("019", max_size=3))
    ),
)


def _oracle_satoshi(amount_cents: int, rate_e8: int) -> int:
    # amount / rate * 10^8, with both sides as the fractions they are written as: (cents / 100) / (rate_e8 / 10^8).
    return ceil(Fraction(amount_cents * 10**8 * 10**8, 100 * rate_e8))


def _oracle_amount(text: str) -> int | None:
    """The cents by another road: decimals of huge precision, and the grammar of RFC 8259 by hand."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, point, fraction = mantissa.partition(".")
    exponent_digits = exponent.removeprefix("+") if exponent.startswith("+") else exponent.removeprefix("-")
    parts = [whole, *([fraction] if point else []), *([exponent_digits] if "e" in text.lower() else [])]
    if not all(part.isascii() and part.isdigit() for part in parts) or (len(whole) > 1 and whole[0] == "0"):
        return None
    try:
        cents = Context(prec=5000, Emax=10**17, Emin=-(10**17)).create_decimal(text).scaleb(2, Context(prec=5000))
    except InvalidOperation:
        return None
    if len(text) > 32 or not 0 < cents < 10**11 or cents != int(cents):
        return None
    return int(cents)


def _parsed_amount(text: str) -> int | None:
    try:
        return parse_amount(text)
    except NotMoney:
        return None


def _cases() -> Iterator[tuple[int, int]]:
    """Seeded amounts and rates: all pairs of edges, then random ones of every pair of orders of magnitude."""
    chance = random.Random(20_230_309)  # noqa: S311  # the same cases every time
    edge_amounts = [1, 2, 99, 100, 101, 6900, *range(AMOUNT_CENTS_MAX - 300, AMOUNT_CENTS_MAX + 1)]
    edge_rates = [RATE_E8_MIN, RATE_E8_MIN + 1, 3 * 10**8, 2_057_278_000_000, RATE_E8_MAX - 1, RATE_E8_MAX]
    # Eight decimals that are all in use: nothing cancels.
    edge_rates += [chance.randrange(10_000, 100_000) * 10**8 + chance.randrange(10**8) | 1 for _ in range(300)]
    yield from product(edge_amounts, edge_rates)
    magnitudes = list(product([10**n for n in range(11)], [10**n for n in range(8, 18)]))
    for amount_floor, rate_floor in magnitudes:
        for _ in range(RANDOM_CASES // len(magnitudes)):
            bits = chance.getrandbits(128)
            yield amount_floor + bits % (9 * amount_floor), rate_floor + (bits >> 64) % (9 * rate_floor)


def test_a_sale_s_rate_is_the_exact_product_rounded_up_in_a_million_cases() -> None:
    for number, market_e8 in _cases():
        markup_bp = (number + market_e8) % (MARKUP_BP_MAX + 1)
        exact_e8 = Fraction(market_e8 * (10_000 + markup_bp), 10_000)
        assert sale_rate(market_e8, markup_bp) == ceil(exact_e8), (market_e8, markup_bp)


@given(rates, st.integers(0, MARKUP_BP_MAX))
def test_a_sale_s_rate_is_the_least_that_has_all_of_the_markup(market_e8: int, markup_bp: int) -> None:
    rate_e8 = sale_rate(market_e8, markup_bp)
    assert rate_e8 == ceil(Fraction(market_e8, 10**8) * (1 + Fraction(markup_bp, 10_000)) * 10**8)
    assert rate_e8 * 10_000 >= market_e8 * (10_000 + markup_bp) > (rate_e8 - 1) * 10_000
    assert market_e8 <= rate_e8 <= 2**63 - 1
    assert parse_sale_rate(format_rate(rate_e8)) == rate_e8


@given(rates)
def test_without_a_markup_a_sale_s_rate_is_the_market_s(market_e8: int) -> None:
    assert sale_rate(market_e8, 0) == market_e8


@given(amounts, rates, st.integers(0, MARKUP_BP_MAX - 1))
def test_a_higher_markup_never_buys_more(amount_cents: int, market_e8: int, markup_bp: int) -> None:
    less, more = (sale_rate(market_e8, each) for each in (markup_bp, markup_bp + 1))
    assert less < more
    assert satoshi_for(amount_cents, less) >= satoshi_for(amount_cents, more)


@pytest.mark.parametrize(
    ("market", "markup_bp", "rate"),
    [
        ("20572.78", 0, "20572.78"),
        ("20572.78", 50, "20675.6439"),
        ("20572.78000001", 75, "20727.07585002"),
        ("1", 1, "1.0001"),
        ("1.00000001", 1, "1.00010002"),
        ("10000000000", 5000, "15000000000.00"),
    ],
)
def test_rates_of_known_sales(market: str, markup_bp: int, rate: str) -> None:
    assert format_rate(sale_rate(parse_rate(market), markup_bp)) == rate


@pytest.mark.parametrize("text", ["0", "1", "75", "5000", "005"])
def test_a_markup_is_a_whole_number_of_basis_points(text: str) -> None:
    assert parse_markup(text) == int(text)


@pytest.mark.parametrize("text", ["", "-1", "5001", "7.5", "1e2", "+5", " 5", "\uff15", "9" * 5000])
def test_what_is_no_markup_is_refused(text: str) -> None:
    with pytest.raises(NotMoney, match="must be a whole number of basis points from 0 to 5000"):
        parse_markup(text)


@pytest.mark.parametrize("text", ["0.99999999", "15000000000.00000001", "1e3"])
def test_what_is_no_rate_of_a_sale_is_refused(text: str) -> None:
    with pytest.raises(NotMoney):
        parse_sale_rate(text)


def test_bitcoin_is_the_exact_quotient_rounded_up_in_a_million_cases() -> None:
    cases = 0
    for amount_cents, rate_e8 in _cases():
        cases += 1
        assert satoshi_for(amount_cents, rate_e8) == _oracle_satoshi(amount_cents, rate_e8), (amount_cents, rate_e8)
    assert cases > 1_000_000


@given(amounts, rates)
def test_bitcoin_agrees_with_fractions_step_by_step(amount_cents: int, rate_e8: int) -> None:
    bitcoin = Fraction(amount_cents, 100) / Fraction(rate_e8, 10**8)
    assert satoshi_for(amount_cents, rate_e8) == ceil(bitcoin * 10**8) == _oracle_satoshi(amount_cents, rate_e8)


@given(amounts, rates)
def test_bitcoin_pays_for_the_amount_and_one_satoshi_less_does_not(amount_cents: int, rate_e8: int) -> None:
    satoshi = satoshi_for(amount_cents, rate_e8)
    assert satoshi * rate_e8 >= amount_cents * 10**14 > (satoshi - 1) * rate_e8
    assert 1 <= satoshi <= 2**63 - 1


@pytest.mark.parametrize(
    ("amount", "rate", "bitcoin"),
    [
        ("69.00", "41192.25", "0.00167508"),
        ("600", "20572.78", "0.02916476"),
        ("0.01", "10000000000", "0.00000001"),
        ("1", "1", "1.00000000"),
        ("1", "3", "0.33333334"),
        ("999999999.99", "1", "999999999.99000000"),
        ("100", "100.00000001", "1.00000000"),
        ("100", "99.99999999", "1.00000001"),
    ],
)
def test_bitcoin_of_known_orders(amount: str, rate: str, bitcoin: str) -> None:
    assert format_btc(satoshi_for(parse_amount(amount), parse_rate(rate))) == bitcoin


@pytest.mark.parametrize(
    ("text", "cents"),
    [
        ("69", 6900),
        ("69.0", 6900),
        ("69.00", 6900),
        ("69.000000000000", 6900),
        ("6.9e1", 6900),
        ("6900E-2", 6900),
        ("690000000000000e-13", 6900),
        ("1e3", 100_000),
        ("1E+3", 100_000),
        ("0.01", 1),
        ("1e-2", 1),
        ("0.0000000000001e11", 1),
        ("999999999.99", AMOUNT_CENTS_MAX),
        ("999999999.990", AMOUNT_CENTS_MAX),
        ("9.9999999999e8", AMOUNT_CENTS_MAX),
        ("1" + "." + "0" * 30, 100),
    ],
)
def test_an_amount_is_judged_by_its_value(text: str, cents: int) -> None:
    assert parse_amount(text) == cents


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "greater than 0"),
        ("0.00", "greater than 0"),
        ("0e99", "greater than 0"),
        ("-0", "greater than 0"),
        ("-1", "greater than 0"),
        ("-1e400", "greater than 0"),
        ("1000000000", "less than 1000000000"),
        ("1000000000.00", "less than 1000000000"),
        ("1000000000.001", "less than 1000000000"),
        ("1e9", "less than 1000000000"),
        ("1e400", "less than 1000000000"),
        ("1e" + "9" * 30, "less than 1000000000"),
        ("0.001", "whole number of cents"),
        ("69.001", "whole number of cents"),
        ("999999999.991", "whole number of cents"),
        ("999999999.999999", "whole number of cents"),
        ("1e-3", "whole number of cents"),
        ("1e-" + "9" * 29, "whole number of cents"),
        ("1" * 33, "at most 32 characters"),
        ("1." + "0" * 31, "at most 32 characters"),
        ("9" * 1_000_000, "at most 32 characters"),
        *(
            (text, "decimal number")
            for text in [
                "",
                " ",
                "NaN",
                "nan",
                "Infinity",
                "-Infinity",
                "null",
                "true",
                "69,00",
                "1_000",
                "0x45",
                "069",
            ]
        ),
        *(
            (text, "decimal number")
            for text in ["+1", "--1", ".5", "5.", "1e", "e1", "1e1.5", " 1", "1 ", "1\n", "\uff11", "\u0663"]
        ),
    ],
)
def test_an_amount_outside_the_rules_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(NotMoney, match=reason):
        parse_amount(text)


@given(number_like)
@example("999999999.99")
@example("0.0e5")
@example("00.1")
def test_amounts_agree_with_decimals(text: str) -> None:
    assert _parsed_amount(text) == _oracle_amount(text)


@given(amounts, st.integers(-12, 9))
def test_every_way_to_write_an_amount_is_the_same_amount(amount_cents: int, exponent: int) -> None:
    text = f"{Decimal(amount_cents).scaleb(-2 - exponent):f}e{exponent}"
    assert _oracle_amount(text) == _parsed_amount(text)
    assert len(text) > 32 or _parsed_amount(text) == amount_cents


@given(st.text(max_size=40))
def test_no_text_is_anything_but_an_amount_or_refused(text: str) -> None:
    assert _parsed_amount(text) == _oracle_amount(text)


@given(amounts)
def test_cents_survive_their_text(amount_cents: int) -> None:
    text = format_cents(amount_cents)
    assert text == f"{Decimal(amount_cents) / 100:.2f}"
    assert parse_amount(text) == amount_cents


@given(st.integers(0, 10**17))
def test_satoshi_survive_their_text(satoshi: int) -> None:
    text = format_btc(satoshi)
    assert text == f"{Decimal(satoshi).scaleb(-8):.8f}"
    assert parse_btc(text) == satoshi


@given(rates)
def test_rates_survive_their_text(rate_e8: int) -> None:
    text = format_rate(rate_e8)
    assert Decimal(text) == Decimal(rate_e8).scaleb(-8)
    assert parse_rate(text) == rate_e8


@pytest.mark.parametrize(
    ("rate_e8", "text"),
    [
        (2_057_278_000_000, "20572.78"),
        (2_057_200_000_000, "20572.00"),
        (10**8 + 1, "1.00000001"),
        (110_000_000, "1.10"),
    ],
)
def test_a_rate_has_two_to_eight_places(rate_e8: int, text: str) -> None:
    assert format_rate(rate_e8) == text


@pytest.mark.parametrize(
    "text", ["", "1.", ".1", "-1", "1e3", "1.123456789", "1234567890123", "1,5", "NaN", " 1", "\uff11"]
)
def test_what_is_no_plain_decimal_is_neither_bitcoin_nor_a_rate(text: str) -> None:
    with pytest.raises(NotMoney, match="plain decimal text"):
        parse_btc(text)
    with pytest.raises(NotMoney, match="plain decimal text"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0.99999999", "10000000000.00000001", "999999999999"])
def test_a_rate_no_market_has_is_refused(text: str) -> None:
    with pytest.raises(NotMoney, match="between 1 and 10000000000"):
        parse_rate(text)


def test_the_bounds_of_a_rate_are_rates() -> None:
    assert (parse_rate("1"), parse_rate("10000000000.00")) == (RATE_E8_MIN, RATE_E8_MAX)


def test_the_desk_takes_three_currencies() -> None:
    assert list(Currency) == ["EUR", "GBP", "USD"]


def _oracle_cents(satoshi: int, rate_e8: int) -> int:
    """The fewest cents by trying: halving, because more cents never buy less."""
    return bisect_left(range(sys.maxsize), satoshi, lo=1, key=lambda cents: _oracle_satoshi(cents, rate_e8))


@given(st.integers(1, 10**12), rates)
@example(1, RATE_E8_MIN)
@example(1, RATE_E8_MAX)
@example(10**12, RATE_E8_MAX)
def test_bitcoin_costs_the_fewest_cents_that_buy_as_much(satoshi: int, rate_e8: int) -> None:
    assert cents_for(satoshi, rate_e8) == _oracle_cents(satoshi, rate_e8)


def test_bitcoin_costs_the_fewest_cents_for_every_small_amount() -> None:
    for rate_e8 in (RATE_E8_MIN, RATE_E8_MIN + 1, 3 * 10**12, 10**14 - 1, 10**14, 10**14 + 1, 2_057_278 * 10**8):
        cents = 1
        for satoshi in range(1, 2000):
            while _oracle_satoshi(cents, rate_e8) < satoshi:
                cents += 1
            assert cents_for(satoshi, rate_e8) == cents, (satoshi, rate_e8)


@given(amounts, rates)
def test_what_cents_buy_costs_no_more_than_these_cents(amount_cents: int, rate_e8: int) -> None:
    assert cents_for(satoshi_for(amount_cents, rate_e8), rate_e8) <= amount_cents


@pytest.mark.parametrize(
    ("text", "satoshi"),
    [
        *(("0.5", 50_000_000), ("1", 10**8), ("5e-1", 50_000_000), ("0.00000001", 1), ("1e-8", 1), ("1E1", 10**9)),
        *(("0.50000000000", 50_000_000), ("21000000", SATOSHI_MAX), ("2.1e7", SATOSHI_MAX)),
    ],
)
def test_bitcoin_is_read_by_its_exact_value(text: str, satoshi: int) -> None:
    assert parse_bitcoin(text) == satoshi


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "greater than 0") for text in ("0", "0.0", "-1", "-0", "0e9")),
        *((text, "at most 21000000") for text in ("21000000.00000001", "21000001", "99999999")),
        *((text, "less than 100000000") for text in ("100000000", "1e9", "1e999999999")),
        *((text, "at most 8 decimal places") for text in ("0.000000001", "1e-9", "1.000000001", "1e-999999999")),
        *((text, "decimal number") for text in ("", "x", "01", "+1", ".5", "1,5", "NaN", "0x1")),
        ("0." + "0" * 31, "at most 32 characters"),
    ],
)
def test_bitcoin_outside_the_rules_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(NotMoney, match=reason):
        parse_bitcoin(text)
