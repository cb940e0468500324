"""What tests are made of: settings, price records, orders."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from buydesk.errors import DeskError
from buydesk.money import Currency, satoshi_for
from buydesk.orders.model import ANONYMOUS, NewOrder, Order, PricedOrder, new_order_id
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import OrderQuote, QuoteFigures, QuoteSigner
from buydesk.orders.representations import order_document
from buydesk.prices.model import SOURCES, PriceRecord, Quote, Rule, UnsettledRate
from buydesk.prices.signing import Signer
from buydesk.settings.model import Settings, variable
from buydesk.settings.secrets import KEY_PAIRS, SECRET_KEYS, TOKENS
from buydesk.signing_keys import KEY_BYTES, to_text
from buydesk.times import utc_now

SIGNING_KEY = to_text(bytes(range(KEY_BYTES)))
TOKEN = "test-token"
NOT_QUOTED = "only 0 of at least 2 sources agree"
JUMPED = "is more than 5 % from the last price, and was not seen twice yet"
_signer = Signer(SIGNING_KEY)
_quote_signer = QuoteSigner(SIGNING_KEY)


def shared_env() -> dict[str, str]:
    """What services of one desk share, as variables."""
    given = settings()
    tokens = {variable(name): TOKEN for name in TOKENS}
    secret_keys = {variable(name): SIGNING_KEY for name in SECRET_KEYS}
    public_keys = {variable(name): given.accepted_price_keys[0] for name in KEY_PAIRS.values()}
    return tokens | secret_keys | public_keys


def settings(**given: Any) -> Settings:
    """A desk's, without a limit for callers that show no key: tests call it as often as they like."""
    shared = dict.fromkeys(SECRET_KEYS, SIGNING_KEY) | dict.fromkeys(TOKENS, TOKEN) | {"anonymous_rate": "off"}
    return Settings(**(shared | given))


def signed(unsigned: PriceRecord) -> PriceRecord:
    """The record, signed with the key of `settings`."""
    return _signer.sign(unsigned)


def record(rate_e8: int = 20_000 * 10**8, *, age: float = 0, ttl: float = 60, **rates: int) -> PriceRecord:
    """A price record observed `age` seconds ago; one bitcoin costs the same in every currency unless told."""
    as_of = utc_now() - timedelta(seconds=age)
    rates_e8 = {currency: rates.get(currency.value, rate_e8) for currency in Currency}
    return signed(
        PriceRecord(
            uuid.uuid4(),
            as_of,
            as_of + timedelta(seconds=ttl),
            "sandbox",
            rates_e8,
            tuple(
                Quote(source, currency, rate, rate, as_of)
                for currency, rate in rates_e8.items()
                for source in SOURCES["sandbox"][:2]
            ),
            rule=Rule(quote_age_seconds_max=30, spread_bp_max=100, deviation_bp_max=100, sources_min=2),
            decided_at=as_of,
            bids_e8=rates_e8,
            asks_e8=rates_e8,
        )
    )


def without(base: PriceRecord, *, missing: Sequence[Currency] = (), unsettled: Sequence[Currency] = ()) -> PriceRecord:
    """The record, signed, as it is when nobody quotes some currencies, and the prices of others are doubted."""

    def left(rates_e8: Mapping[Currency, int], *out: Currency) -> dict[Currency, int]:
        return {currency: rate_e8 for currency, rate_e8 in rates_e8.items() if currency not in out}

    return signed(
        replace(
            base,
            rates_e8=left(base.rates_e8, *missing, *unsettled),
            bids_e8=left(base.bids_e8, *missing),
            asks_e8=left(base.asks_e8, *missing),
            used=tuple(quote for quote in base.used if quote.currency not in missing),
            missing=dict.fromkeys(missing, NOT_QUOTED),
            unsettled={currency: UnsettledRate(base.rates_e8[currency], JUMPED) for currency in unsettled},
        )
    )


def new_order(cents: int = 6900, key: str | None = None, currency: Currency = Currency.EUR) -> NewOrder:
    return NewOrder(new_order_id(), ANONYMOUS, key, currency, cents)


def priced_order(
    cents: int = 6900,
    key: str | None = None,
    *,
    price: PriceRecord | DeskError | None = None,
    order: NewOrder | None = None,
    seconds: float = 20,
    markup_bp: int = 0,
) -> PricedOrder:
    deadline = utc_now() + timedelta(seconds=seconds)
    return price_order(order or new_order(cents, key), price or record(), deadline, markup_bp)


def shown(order: Order) -> dict[str, Any]:
    """The order as its clients read it."""
    document: dict[str, Any] = msgspec.to_builtins(order_document(order))
    return document


def at(*moment: int) -> datetime:
    return datetime(*moment, tzinfo=UTC)  # type: ignore[arg-type,misc]


def quote_figures(
    price: PriceRecord,
    cents: int = 6900,
    *,
    client: str = ANONYMOUS,
    currency: Currency = Currency.EUR,
    seconds: float = 30,
    reference: str | None = None,
) -> QuoteFigures:
    """What a quote says that was given when the price came, and is valid so long."""
    rate_e8, quoted_at = price.rates_e8[currency], price.made_at
    return QuoteFigures(
        id=new_order_id(),
        client=client,
        livemode=False,
        currency=currency,
        amount_cents=cents,
        satoshi=satoshi_for(cents, rate_e8),
        market_rate_e8=rate_e8,
        markup_bp=0,
        rate_e8=rate_e8,
        price_id=price.id,
        price_as_of=price.as_of,
        quoted_at=quoted_at,
        expires_at=quoted_at + timedelta(seconds=seconds),
        reference=reference,
    )


def order_quote(price: PriceRecord, cents: int = 6900, **given: Any) -> OrderQuote:
    """Such a quote, signed with the key of `settings`."""
    return _quote_signer.sign(quote_figures(price, cents, **given))


def quoted_order(quote: OrderQuote, key: str | None = None, *, seconds: float = 20, **given: Any) -> PricedOrder:
    """An order by the quote."""
    asked = (quote.currency, quote.amount_cents, quote.reference)
    order = NewOrder(new_order_id(), quote.client, key, *asked, quote=quote)
    return price_order(replace(order, **given), quote, utc_now() + timedelta(seconds=seconds))
