import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from buydesk.errors import PriceMoved, PriceUnavailable
from buydesk.money import Currency, format_btc, format_rate, satoshi_for
from buydesk.orders.model import ANONYMOUS, Exposure, NewOrder, Order, is_repeat, new_order_id, parse_key
from buydesk.orders.pricing import Guard, price_order
from buydesk.prices.model import PriceRecord

NOW = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)
RATES = {Currency.EUR: 4_119_225_000_000, Currency.GBP: 3_600_000_000_000, Currency.USD: 2_057_278_000_000}
RECORD = PriceRecord(uuid.UUID(int=7), NOW, NOW + timedelta(seconds=60), "sandbox", RATES)
NEW = NewOrder(uuid.UUID(int=1), ANONYMOUS, "key-1", Currency.EUR, 6900)
STORED = Order(
    number=15,
    client_number=12,
    id=NEW.id,
    created_at=NOW + timedelta(seconds=1),
    client=NEW.client,
    client_order_id=NEW.client_order_id,
    currency=NEW.currency,
    amount_cents=NEW.amount_cents,
    rate_e8=RATES[Currency.EUR],
    satoshi=167_508,
    price_id=RECORD.id,
    price_as_of=RECORD.as_of,
    livemode=False,
    representation=2,
    received_at=NOW,
    market_rate_e8=RATES[Currency.EUR],
    markup_bp=0,
    reference=None,
    metadata=None,
    quote_id=None,
)


def test_an_id_is_a_uuid_of_version_7_that_carries_the_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_order_id() for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 1000
    assert {(each.version, each.variant) for each in ids} == {(7, uuid.RFC_4122)}
    assert all(before <= each.int >> 80 <= after for each in ids)
    # 74 bits are random: none of them is the same in all ids.
    fixed = ((1 << 48) - 1) << 80 | 0xF << 76 | 0b11 << 62
    ones, zeros = 0, 0
    for each in ids:
        ones |= each.int
        zeros |= ~each.int
    assert (ones & zeros) | fixed == (1 << 128) - 1


@pytest.mark.parametrize(
    ("currency", "satoshi"), [(Currency.EUR, 167_508), (Currency.GBP, 191_667), (Currency.USD, 335_395)]
)
def test_an_order_is_priced_at_the_rate_of_its_currency_rounded_up(currency: Currency, satoshi: int) -> None:
    item = price_order(replace(NEW, currency=currency), RECORD, NOW)
    assert (item.rate_e8, item.satoshi) == (RATES[currency], satoshi)


def test_an_order_is_priced_at_the_market_s_rate_and_the_markup() -> None:
    item = price_order(NEW, RECORD, NOW, 75)
    market_e8 = RATES[Currency.EUR]
    assert (item.market_rate_e8, item.markup_bp, item.rate_e8) == (market_e8, 75, -(-market_e8 * 10_075 // 10_000))
    assert item.satoshi == satoshi_for(NEW.amount_cents, item.rate_e8) < price_order(NEW, RECORD, NOW).satoshi


@given(st.integers(1, 10**6), st.integers(0, 500), st.integers(-3, 3))
def test_a_guard_allows_what_is_no_worse(cents: int, markup_bp: int, by: int) -> None:
    order = replace(NEW, amount_cents=cents)
    item = price_order(order, RECORD, NOW, markup_bp)
    for guard, is_allowed in (
        (Guard(rate_e8_max=item.rate_e8 + by), by >= 0),
        (Guard(satoshi_min=item.satoshi + by), by <= 0),
        (Guard(), True),
    ):
        guarded = price_order(order, RECORD, NOW, markup_bp, guard)
        if is_allowed:
            assert guarded == item
        else:
            assert isinstance(guarded.price, PriceMoved)
            facts = {"exchange_rate": format_rate(item.rate_e8), "bitcoin_amount": format_btc(item.satoshi)}
            assert guarded.price.facts == facts
            assert (guarded.rate_e8, guarded.satoshi) == (0, 0)


def test_an_order_in_a_currency_that_the_record_has_no_rate_for_has_no_price() -> None:
    euros_only = PriceRecord(uuid.UUID(int=8), NOW, NOW + timedelta(seconds=60), "sandbox", {Currency.EUR: 10**12})
    item = price_order(replace(NEW, currency=Currency.USD), euros_only, NOW)
    assert isinstance(item.price, PriceUnavailable)
    assert item.price.detail == "There is no price in USD: it is none of the record's currencies."
    assert (item.rate_e8, item.satoshi) == (0, 0)


@pytest.mark.parametrize(
    ("new", "repeat"),
    [
        (NEW, True),
        (replace(NEW, id=uuid.UUID(int=2)), True),  # the key says that it is the same
        (replace(NEW, amount_cents=6901), False),
        (replace(NEW, currency=Currency.USD), False),
        (replace(NEW, client_order_id=None), False),
        (replace(NEW, client_order_id="key-2"), False),
        (replace(NEW, client="somebody"), False),
    ],
)
def test_a_repeat_asks_for_the_same_under_the_same_key(new: NewOrder, repeat: bool) -> None:
    assert is_repeat(new, STORED) is repeat


@pytest.mark.parametrize(
    ("cap", "used", "available"), [(10**10, 1, "99.99999999"), (10**10, 10**10, "0.00000000"), (5, 7, "0.00000000")]
)
def test_the_room_under_the_cap_is_never_negative(cap: int, used: int, available: str) -> None:
    facts = Exposure(cap, used, 3).facts()
    assert facts["available"] == available
    assert facts["cap"].replace(".", "").lstrip("0") == str(cap)


@pytest.mark.parametrize("text", ["k", "!~", "x" * 255])
def test_a_key_is_visible_ascii(text: str) -> None:
    assert parse_key(text) == text


@pytest.mark.parametrize("text", ["", "x" * 256, "a b", "a\n", "\x7f", "\u00e9", "a\x00"])
def test_what_is_no_key_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 255 visible ASCII characters"):
        parse_key(text)
