"""Quoting: quotes are given at the current price, and read when they come back. In create_buy_order."""

import asyncio
import uuid
from datetime import timedelta

import msgspec
from cachetools import LRUCache

from buydesk.errors import DeskError, InvalidRequest, QuoteNotFound
from buydesk.money import AMOUNT_CENTS_MAX, Currency, cents_for, sale_rate, satoshi_for
from buydesk.orders.model import OrderLedger, new_order_id
from buydesk.orders.quotes import OrderQuote, QuoteFigures, QuoteSigner, quote_reader
from buydesk.prices.cache import PriceCache
from buydesk.prices.model import PriceRecord, stale
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

# A record is current for some 15 s, and each currency may have one of its own.
_RECORDS_KEPT_MAX = 64


class AskedQuote(msgspec.Struct, frozen=True):
    """What a quote is asked for: an amount to pay or an amount to get, one of which is None. It is valid for
    `valid_seconds` or, where these are None, as the desk's are, but for `seconds_max` at the most."""

    client: str
    currency: Currency
    amount_cents: int | None
    satoshi: int | None
    reference: str | None
    valid_seconds: int | None
    seconds_max: int


class Quoting:
    """Gives quotes at the prices of a cache, each once its price record is in the ledger, and reads them."""

    def __init__(self, ledger: OrderLedger, prices: PriceCache, settings: Settings, clock: Clock = CLOCK) -> None:
        self._kept = KeptPrices(ledger)
        self._prices = prices
        self._clock = clock
        self._livemode = settings.price_feed == "live"
        self._valid_seconds = settings.quote_seconds
        self._signer = QuoteSigner(settings.quote_signing_key.get_secret_value())
        self._quote_of = quote_reader(settings)

    async def give(self, asked: AskedQuote, markup_bp: int) -> OrderQuote:
        """The quote, at the market's rate and a markup in basis points.

        Raises InvalidRequest, what stands in the way of a price, and what `OrderLedger.keep_price` raises.
        """
        price = self._prices.price(asked.currency)
        quoted_at = self._clock.now()
        if isinstance(price, DeskError):
            raise price
        if quoted_at >= price.expires_at:  # by a wall clock that was set: nobody could prove the price
            raise stale(price.as_of, price.expires_at)
        market_e8 = price.rates_e8[asked.currency]
        rate_e8 = sale_rate(market_e8, markup_bp)
        valid_seconds = asked.valid_seconds or min(self._valid_seconds, asked.seconds_max)
        amount_cents = _cents(asked, rate_e8)
        await self._kept.keep(price)
        return self._signer.sign(
            QuoteFigures(
                id=new_order_id(),
                client=asked.client,
                livemode=self._livemode,
                currency=asked.currency,
                amount_cents=amount_cents,
                satoshi=satoshi_for(amount_cents, rate_e8),
                market_rate_e8=market_e8,
                markup_bp=markup_bp,
                rate_e8=rate_e8,
                price_id=price.id,
                price_as_of=price.as_of,
                quoted_at=quoted_at,
                expires_at=quoted_at + timedelta(seconds=valid_seconds),
                reference=asked.reference,
            )
        )

    def read(self, token: str, client: str) -> OrderQuote:
        """The quote of the client's; raises QuoteInvalid, and QuoteNotFound for one of another client's."""
        quote = self._quote_of(token)
        if quote.client != client:
            raise QuoteNotFound("This client has no such quote.")
        return quote


def _cents(asked: AskedQuote, rate_e8: int) -> int:
    if asked.amount_cents is not None:
        return asked.amount_cents
    assert asked.satoshi is not None  # noqa: S101  # one of the two is given
    amount_cents = cents_for(asked.satoshi, rate_e8)
    if amount_cents > AMOUNT_CENTS_MAX:
        raise InvalidRequest.of("bitcoin_amount", "costs more than an order may be of")
    return amount_cents


class KeptPrices:
    """Has price records stored, each once as far as it remembers; all who need one that is being stored wait for it
    together."""

    def __init__(self, ledger: OrderLedger) -> None:
        self._ledger = ledger
        self._storing: LRUCache[uuid.UUID, asyncio.Task[None]] = LRUCache(_RECORDS_KEPT_MAX)

    async def keep(self, record: PriceRecord) -> None:
        """Returns once the record is stored; raises what `OrderLedger.keep_price` raises."""
        storing = self._storing.get(record.id)
        if storing is None:
            storing = asyncio.create_task(self._ledger.keep_price(record))
            self._storing[record.id] = storing
            storing.add_done_callback(lambda task: self._forget(record.id, task))
        # Who gives up waiting must not end it for the others.
        await asyncio.shield(storing)

    def _forget(self, record_id: uuid.UUID, storing: "asyncio.Task[None]") -> None:
        """Forgets one that was not stored. When all who waited have given up, nobody else fetches its exception."""
        if storing.cancelled() or storing.exception() is not None:
            self._storing.pop(record_id, None)
