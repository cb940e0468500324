"""Examples for the OpenAPI documents: one price record, an order that is priced with it, and how its sources were."""

import uuid
from datetime import UTC, datetime, timedelta

from msgspec.structs import replace

from buydesk.money import RATE_SCALE, SATOSHI_PER_BTC, Currency
from buydesk.orders.model import ANONYMOUS, Exposure, NewOrder
from buydesk.orders.pricing import placed_order, price_order
from buydesk.orders.quotes import OrderQuote
from buydesk.prices.model import FeedStatus, PriceRecord, Quote, RejectedQuote, Rule, Signature, SourceStatus

_AT = datetime(2026, 1, 31, 9, 5, tzinfo=UTC)


def _quotes(currency: Currency, *mids_cents: int) -> list[Quote]:
    """An example's quotes of a currency, one a source, each with 5 cents to either side."""
    cent_e8 = RATE_SCALE // 100
    return [
        Quote(source, currency, (mid - 5) * cent_e8, (mid + 5) * cent_e8, _AT)
        for source, mid in zip(("bitstamp", "coinbase", "kraken"), mids_cents, strict=True)
    ]


def _beside(cents: int) -> dict[Currency, int]:
    """What an example's bitcoin costs, and so many cents."""
    middles = {Currency.EUR: 20_572_78, Currency.GBP: 18_271_51, Currency.USD: 21_712_51}
    return {currency: (middle + cents) * RATE_SCALE // 100 for currency, middle in middles.items()}


_FAR = replace(_quotes(Currency.EUR, 20_572_78, 20_572_78, 20_990_00)[2], source="gemini")
EXAMPLE_RECORD = PriceRecord(
    id=uuid.UUID("0b6f3a52-3c1e-4f0a-9a55-0d8a2f1c7e11"),
    as_of=_AT,
    expires_at=_AT + timedelta(seconds=60),
    feed="live",
    rates_e8=_beside(0),
    used=(
        *_quotes(Currency.EUR, 20_572_78, 20_570_12, 20_574_40),
        *_quotes(Currency.GBP, 18_271_51, 18_269_03, 18_272_95),
        *_quotes(Currency.USD, 21_712_51, 21_709_88, 21_714_07),
    ),
    rejected=(
        RejectedQuote("gemini", "is more than 1 % from those that agree", _FAR),
        RejectedQuote("bitfinex", "gave no answer within 5 s"),
    ),
    rule=Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2),
    decided_at=_AT + timedelta(seconds=1),
    bids_e8=_beside(-5),
    asks_e8=_beside(5),
    signature=Signature(
        "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        "-wwCFEYZJ3_FMgDjhnLlFUVcJq95-JvYe51p_ocObKOuUIKj4H_Kulir7PqFeVsYRMbHfjuFt2igThyA40MECA",
        expires_at=_AT + timedelta(seconds=60),
    ),
)
EXAMPLE_STATUS = FeedStatus(
    at=_AT + timedelta(seconds=1),
    feed="live",
    problem="",
    sources=(
        SourceStatus("kraken", "", mids_e8=EXAMPLE_RECORD.rates_e8, quoted_at=_AT),
        SourceStatus(
            "bitfinex",
            "gave no answer within 4 s",
            failures=3,
            resting_until=_AT + timedelta(seconds=16),
            last_error="gave no answer within 4 s",
            failed_at=_AT,
        ),
    ),
)
EXAMPLE_PRICED_ORDER = price_order(
    NewOrder(
        uuid.UUID("01926e60-7a7c-7cc3-9c4e-3a1d1f1d8a35"),
        ANONYMOUS,
        None,
        Currency.EUR,
        6900,
        received_at=_AT + timedelta(seconds=2),
    ),
    EXAMPLE_RECORD,
    deadline=_AT + timedelta(seconds=20),
)
EXAMPLE_QUOTE = OrderQuote(
    id=uuid.UUID("01926e60-7a7c-7cc3-9c4e-3a1d1f1d8b77"),
    client=ANONYMOUS,
    livemode=True,
    currency=Currency.EUR,
    amount_cents=102864,
    satoshi=5_000_005,
    market_rate_e8=EXAMPLE_RECORD.rates_e8[Currency.EUR],
    markup_bp=0,
    rate_e8=EXAMPLE_RECORD.rates_e8[Currency.EUR],
    price_id=EXAMPLE_RECORD.id,
    price_as_of=_AT,
    quoted_at=_AT + timedelta(seconds=2),
    expires_at=_AT + timedelta(seconds=32),
    reference=None,
    token=f"q1.11qYAYKx.{'A' * 150}.{'A' * 86}",
)
EXAMPLE_ORDER = placed_order(EXAMPLE_PRICED_ORDER, 1, 1, _AT + timedelta(seconds=2.123456), livemode=True)
EXAMPLE_EXPOSURE = Exposure(100 * SATOSHI_PER_BTC, EXAMPLE_ORDER.satoshi, 1).facts() | {"orders": 1}
