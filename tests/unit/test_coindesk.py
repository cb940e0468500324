"""CoinDesk's retired document, compared with a recorded one."""

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from buydesk.money import Currency, parse_rate
from buydesk.prices.coindesk import currentprice, currentprice_of
from buydesk.prices.model import PriceRecord

RECORDED = Path(__file__).parents[1] / "data" / "recorded" / "coindesk_bpi.json"


def recorded() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(RECORDED.read_text())[0]["httpResponse"]
    return document


def record(as_of: datetime, usd: str = "59524.4038", **members: Any) -> PriceRecord:
    rates = {"EUR": "53958.5744", "GBP": "45987.8996", "USD": usd}
    return PriceRecord(
        id=uuid.uuid4(),
        as_of=as_of,
        expires_at=as_of + timedelta(seconds=60),
        feed="live",
        rates_e8={Currency(code): parse_rate(rate) for code, rate in rates.items()},
        **members,
    )


def document_of(record: PriceRecord) -> Any:
    return json.loads(json.dumps(currentprice(record)))


def test_document_is_the_recorded_one_but_for_its_disclaimer() -> None:
    expected = recorded()
    made = document_of(record(datetime(2024, 8, 18, 4, 19, 23, 999_999, tzinfo=UTC)))
    assert made.pop("disclaimer")
    expected.pop("disclaimer")
    assert json.dumps(made) == json.dumps(expected), "the order of the members counts too"


def test_members_stand_in_the_recorded_order() -> None:
    assert list(document_of(record(datetime(2024, 8, 18, tzinfo=UTC)))) == list(recorded())


@pytest.mark.parametrize("currency", Currency)
def test_document_of_one_currency_has_the_dollar_too_and_neither_symbols_nor_the_name_of_a_chart(
    currency: Currency,
) -> None:
    # As retired answers that others have kept show: {"time": …, "disclaimer": …, "bpi": {"USD": …, "EUR": …}}.
    expected = recorded()
    del expected["chartName"]
    shown = {"USD": expected["bpi"]["USD"]} | {currency.value: expected["bpi"][currency.value]}
    for price in shown.values():
        del price["symbol"]
    expected["bpi"] = shown
    made = json.loads(json.dumps(currentprice_of(record(datetime(2024, 8, 18, 4, 19, 23, tzinfo=UTC)), currency)))
    expected["disclaimer"] = made["disclaimer"]
    assert json.dumps(made) == json.dumps(expected), "the order of the members counts too"


@pytest.mark.parametrize(
    ("as_of", "updated", "updated_uk"),
    [
        ("2024-01-05T09:04:59Z", "Jan 5, 2024 09:04:59 UTC", "Jan 5, 2024 at 09:04 GMT"),
        ("2024-03-31T00:59:59Z", "Mar 31, 2024 00:59:59 UTC", "Mar 31, 2024 at 00:59 GMT"),
        ("2024-03-31T01:00:00Z", "Mar 31, 2024 01:00:00 UTC", "Mar 31, 2024 at 02:00 BST"),
        ("2024-10-27T00:59:00Z", "Oct 27, 2024 00:59:00 UTC", "Oct 27, 2024 at 01:59 BST"),
        ("2024-10-27T01:00:00Z", "Oct 27, 2024 01:00:00 UTC", "Oct 27, 2024 at 01:00 GMT"),
        ("2024-06-30T23:30:00Z", "Jun 30, 2024 23:30:00 UTC", "Jul 1, 2024 at 00:30 BST"),
    ],
)
def test_british_time_follows_the_summer_also_over_midnight(as_of: str, updated: str, updated_uk: str) -> None:
    times = document_of(record(datetime.fromisoformat(as_of)))["time"]
    assert times == {"updated": updated, "updatedISO": as_of.replace("Z", "+00:00"), "updateduk": updated_uk}


@pytest.mark.parametrize(
    ("rate", "text", "number"),
    [
        ("59524.4038", "59,524.404", 59524.4038),
        ("45987.8996", "45,987.9", 45987.8996),
        ("60000", "60,000", 60000.0),
        ("999.99999999", "1,000", 1000.0),
        ("21712.51", "21,712.51", 21712.51),
        ("1234567.0005", "1,234,567.001", 1234567.0005),
        ("987.00004999", "987", 987.0),
        ("1.05", "1.05", 1.05),
    ],
)
def test_rates_are_text_of_three_places_and_floats_of_four(rate: str, text: str, number: float) -> None:
    usd = document_of(record(datetime(2024, 8, 18, tzinfo=UTC), usd=rate))["bpi"]["USD"]
    assert (usd["rate"], usd["rate_float"]) == (text, number)


def test_disclaimer_says_whose_prices_these_are() -> None:
    live = record(datetime(2026, 1, 31, tzinfo=UTC))
    assert "CoinDesk has no part in it" in document_of(live)["disclaimer"]
    assert "SANDBOX" not in document_of(live)["disclaimer"]
    sandbox = replace(live, replayed_from=datetime(2023, 3, 9, 1, 2, tzinfo=UTC))
    assert "SANDBOX: prices recorded at 2023-03-09T01:02:00.000000Z" in document_of(sandbox)["disclaimer"]
