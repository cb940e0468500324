"""CoinDesk's retired price documents, made of a price record of ours: of all currencies, and of one.

Programs written for them keep working. Their price is a float as well as text: nowhere else does a client get one.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from buydesk.money import RATE_SCALE, Currency
from buydesk.prices.model import PriceRecord
from buydesk.times import format_time

_LONDON = ZoneInfo("Europe/London")
# Not strftime's: those follow the locale.
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Symbols and names, of those that CoinDesk's documents had.
_CURRENCIES = {
    Currency.USD: ("&#36;", "United States Dollar"),
    Currency.GBP: ("&pound;", "British Pound Sterling"),
    Currency.EUR: ("&euro;", "Euro"),
}


# The codes that `currentprice_of` knows.
CODES = frozenset(currency.value for currency in _CURRENCIES)


def require_rates(record: PriceRecord, currencies: Iterable[Currency] = tuple(_CURRENCIES)) -> None:
    """Raises PriceUnavailable or PriceUnsettled unless the record has a price in each of these currencies: the
    documents have no word for one that is missing."""
    for currency in currencies:
        if currency not in record.rates_e8:
            raise record.problem_of(currency)


def currentprice(record: PriceRecord) -> dict[str, object]:
    """`currentprice.json`: its members in their order, its three times, its numbers as text and as floats."""
    return {
        "time": _times(record.as_of.astimezone(UTC)),
        "disclaimer": _disclaimer(record),
        "chartName": "Bitcoin",
        "bpi": {
            currency.value: {"code": currency.value, "symbol": symbol, **_price(record, currency)}
            for currency, (symbol, _) in _CURRENCIES.items()
        },
    }


def currentprice_of(record: PriceRecord, currency: Currency) -> dict[str, object]:
    """`currentprice/{code}.json`: always the dollar, then the currency asked for; no symbols and no name of a chart."""
    return {
        "time": _times(record.as_of.astimezone(UTC)),
        "disclaimer": _disclaimer(record),
        "bpi": {
            shown.value: {"code": shown.value, **_price(record, shown)}
            for shown in dict.fromkeys((Currency.USD, currency))
        },
    }


def _price(record: PriceRecord, currency: Currency) -> dict[str, object]:
    rate_e8 = record.rates_e8[currency]
    return {
        "rate": _rate_text(rate_e8),
        "description": _CURRENCIES[currency][1],
        "rate_float": _rounded(rate_e8, 4) / 10**4,
    }


def _times(moment: datetime) -> dict[str, str]:
    london = moment.astimezone(_LONDON)
    return {
        "updated": f"{_day(moment)} {moment:%H:%M:%S} UTC",
        "updatedISO": f"{moment:%Y-%m-%dT%H:%M:%S}+00:00",
        "updateduk": f"{_day(london)} at {london:%H:%M} {london.tzname()}",
    }


def _day(moment: datetime) -> str:
    return f"{_MONTHS[moment.month - 1]} {moment.day}, {moment.year}"


def _disclaimer(record: PriceRecord) -> str:
    shape = "This document has the shape of the retired CoinDesk Bitcoin Price Index; CoinDesk has no part in it."
    if record.replayed_from is not None:
        minute = format_time(record.replayed_from)
        return f"{shape} SANDBOX: prices recorded at {minute}, replayed, not the market's."
    return f"{shape} The prices are the middle of bid and ask of public exchanges."


def _rate_text(rate_e8: int) -> str:
    """At most three places, no zeros at the end, a comma before each three digits: ``45,987.9``."""
    thousandths = _rounded(rate_e8, 3)
    fraction = f"{thousandths % 1000:03d}".rstrip("0")
    return f"{thousandths // 1000:,}" + (f".{fraction}" if fraction else "")


def _rounded(rate_e8: int, places: int) -> int:
    """The rate in units of 10^-places, half rounded up."""
    unit_e8: int = RATE_SCALE // 10**places
    return (rate_e8 + unit_e8 // 2) // unit_e8
