"""Money: currencies, the integers the desk computes with, their text, and the one rounding function.

Inside the desk fiat is a whole number of cents, bitcoin a whole number of satoshi (10^-8 BTC) and an exchange rate a
whole number of 10^-8 fiat units for one bitcoin (``rate_e8``). Outside it is decimal text. No float anywhere.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache

SATOSHI_PER_BTC = 10**8
CENTS_PER_UNIT = 100
RATE_SCALE = 10**8

AMOUNT_CENTS_MAX = 1_000_000_000 * CENTS_PER_UNIT - 1
AMOUNT_TEXT_CHARS_MAX = 32
SATOSHI_MAX = 21_000_000 * SATOSHI_PER_BTC
# A bitcoin below 1 or above 10^10 of any of our currencies is a broken feed, not a price. The lower bound also keeps
# every bitcoin amount within a BIGINT: 10^9 fiat at rate 1 is 10^17 satoshi.
RATE_E8_MIN = 1 * RATE_SCALE
RATE_E8_MAX = 10**10 * RATE_SCALE
MARKUP_BP_MAX = 5000

# RFC 8259, section 6; ASCII digits only.
_JSON_NUMBER = re.compile(r"(-)?(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]+))?", re.ASCII)
_DECIMAL = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,8}))?", re.ASCII)
_BASIS_POINTS = re.compile(r"[0-9]{1,9}", re.ASCII)


class Currency(StrEnum):
    """The fiat currencies the desk sells for (ISO 4217)."""

    EUR = "EUR"
    GBP = "GBP"
    USD = "USD"


# By their codes; quicker than asking the class.
CURRENCIES: Mapping[str, Currency] = dict(Currency.__members__)
CURRENCIES_TEXT = ", ".join(CURRENCIES)


class NotMoney(ValueError):
    """The text is not an amount, or a currency, that the desk takes; the message says why, fit for a client to read."""


def parse_currency(text: str) -> Currency:
    """The currency of a code in any letter case; raises NotMoney, also for ``GBp``, by which many mean pence."""
    if text == "GBp":
        raise NotMoney(f"must be one of {CURRENCIES_TEXT}; GBp means pence, which are not taken")
    currency = CURRENCIES.get(text.upper()) if text.isascii() else None
    if currency is None:
        raise NotMoney(f"must be one of {CURRENCIES_TEXT}")
    return currency


def parse_amount(text: str) -> int:
    """The cents of a fiat amount written as a JSON number, judged by its exact value.

    Raises NotMoney unless it has at most 32 characters, 0 < amount < 1,000,000,000 and is a whole number of cents.
    ``"69"``, ``"69.0"`` and ``"6.9e1"`` are all 6900.
    """
    return _units_of(text, 2, 9, "must be a whole number of cents")


def parse_bitcoin(text: str) -> int:
    """The satoshi of a bitcoin amount written as a JSON number, judged by its exact value.

    Raises NotMoney unless it has at most 32 characters, 0 < amount <= 21,000,000 and at most 8 decimal places.
    """
    satoshi = _units_of(text, 8, 8, "must have at most 8 decimal places")
    if satoshi > SATOSHI_MAX:
        raise NotMoney("must be at most 21000000")
    return satoshi


def parse_rate_limit(text: str) -> int:
    """The ``rate_e8`` that a client pays at most, written as a JSON number as an amount is; raises NotMoney unless it
    has at most 32 characters and 8 decimal places and 0 < rate < 100,000,000,000."""
    return _units_of(text, 8, 11, "must have at most 8 decimal places")


def _units_of(text: str, places: int, digits_max: int, if_finer: str) -> int:
    """The value of a JSON number in units of 10^-places; it has at most `digits_max` digits before the point."""
    if len(text) > AMOUNT_TEXT_CHARS_MAX:
        raise NotMoney(f"must have at most {AMOUNT_TEXT_CHARS_MAX} characters")
    number = _JSON_NUMBER.fullmatch(text)
    if number is None:
        raise NotMoney("must be a decimal number, such as 69 or 69.00")
    sign, whole, fraction, exponent = number.groups(default="")
    digits = (whole + fraction).lstrip("0")
    if sign or not digits:
        raise NotMoney("must be greater than 0")
    significant = digits.rstrip("0")
    # The value is significant * 10^scale units. Lengths are compared first: an exponent may be astronomically large.
    scale = int(exponent or 0) - len(fraction) + places + len(digits) - len(significant)
    if len(significant) + scale > digits_max + places:
        raise NotMoney(f"must be less than {10**digits_max}")
    if scale < 0:
        raise NotMoney(if_finer)
    shift: int = 10**scale
    return int(significant) * shift


def parse_btc(text: str) -> int:
    """The satoshi of a bitcoin amount written as plain decimal text with at most 8 places; raises NotMoney."""
    number = _DECIMAL.fullmatch(text)
    if number is None:
        raise NotMoney("must be plain decimal text with at most 8 places, such as 0.00167509")
    whole, fraction = number.groups(default="")
    return int(whole) * 10**8 + int(f"{fraction:0<8}")


@lru_cache(maxsize=64)
def parse_rate(text: str) -> int:
    """The ``rate_e8`` of an exchange rate written as plain decimal text with at most 8 places; raises NotMoney."""
    rate_e8 = parse_btc(text)  # written alike, and in units of 10^-8 too
    if not RATE_E8_MIN <= rate_e8 <= RATE_E8_MAX:
        raise NotMoney("must be an exchange rate between 1 and 10000000000")
    return rate_e8


@lru_cache(maxsize=64)
def parse_sale_rate(text: str) -> int:
    """The same of a rate that the desk sells at, which may lie above the market's by the highest markup."""
    rate_e8 = parse_btc(text)
    if not RATE_E8_MIN <= rate_e8 <= _SALE_RATE_E8_MAX:
        raise NotMoney("must be an exchange rate between 1 and 15000000000")
    return rate_e8


def parse_markup(text: str) -> int:
    """The basis points (0.01 %) of a markup, written as a whole number; raises NotMoney. It is never negative: nothing
    is sold below the market's rate."""
    if not _BASIS_POINTS.fullmatch(text) or int(text) > MARKUP_BP_MAX:
        raise NotMoney(f"must be a whole number of basis points from 0 to {MARKUP_BP_MAX}")
    return int(text)


def format_cents(cents: int) -> str:
    """Decimal text of a fiat amount, always two places: 6900 is ``"69.00"``."""
    return f"{cents // 100}.{cents % 100:02d}"


def format_btc(satoshi: int) -> str:
    """Decimal text of a bitcoin amount, always eight places: 167509 is ``"0.00167509"``."""
    return f"{satoshi // SATOSHI_PER_BTC}.{satoshi % SATOSHI_PER_BTC:08d}"


# All orders priced with one record share its rates.
@lru_cache(maxsize=64)
def format_rate(rate_e8: int) -> str:
    """Decimal text of an exchange rate, two to eight places, no superfluous zeros: ``"20572.78"``."""
    fraction = f"{rate_e8 % RATE_SCALE:08d}".rstrip("0")
    return f"{rate_e8 // RATE_SCALE}.{fraction:0<2}"


def sale_rate(market_e8: int, markup_bp: int) -> int:
    """The ``rate_e8`` that the desk sells at: the market's and a markup, always rounded up to 8 decimal places.

    rate = ceil(market * (1 + markup_bp / 10000)) = ceil(market_e8 * (10000 + markup_bp) / 10000), in integers: exact.
    """
    return -(-market_e8 * (10_000 + markup_bp) // 10_000)


# Within a BIGINT too.
_SALE_RATE_E8_MAX = sale_rate(RATE_E8_MAX, MARKUP_BP_MAX)


def satoshi_for(amount_cents: int, rate_e8: int) -> int:
    """The satoshi that a fiat amount buys, always rounded up to the satoshi.

    satoshi = ceil(cents / 100 / (rate_e8 / 10^8) * 10^8) = ceil(cents * 10^14 / rate_e8), in integers: exact.
    """
    return -(-amount_cents * 10**14 // rate_e8)


def cents_for(satoshi: int, rate_e8: int) -> int:
    """The fewest cents that buy at least so many satoshi, one or more.

    ceil(cents * 10^14 / rate_e8) >= satoshi holds when cents * 10^14 > (satoshi - 1) * rate_e8, and of the whole
    numbers that are greater than a quotient the smallest is its whole part and one: in integers, exact.
    """
    return (satoshi - 1) * rate_e8 // 10**14 + 1
