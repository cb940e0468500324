"""What every OrderLedger does with quotes: the model, PostgreSQL of both versions, and db_proxy across real TCP."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from msgspec.structs import replace

from buydesk.errors import PriceUnavailable, RateLimited
from buydesk.money import Currency
from buydesk.orders.model import Exposure, OrderLedger, Placed, PricedOrder, Refused, Replayed
from buydesk.orders.pricing import price_order
from buydesk.orders.quotes import OrderQuote, QuoteFigures, QuoteSigner
from buydesk.prices.model import PriceRecord
from buydesk.times import utc_now
from tests.builders import SIGNING_KEY, new_order, order_quote, priced_order, quote_figures, quoted_order, record
from tests.contract.test_order_ledger import codes, opened, order_of, place
from tests.databases import CAP_SATOSHI, Databases
from tests.model_ledger import ModelLedger
from tests.proof import discrepancies

SECOND = timedelta(seconds=1)
REAL = ["postgres18", "postgres16", "remote"]


@pytest.fixture(params=["model", *REAL])
async def ledger(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[OrderLedger]:
    async with opened(request.param, databases) as opened_ledger:
        yield opened_ledger


async def kept(ledger: OrderLedger, price: PriceRecord | None = None) -> PriceRecord:
    """A price record that is stored."""
    price = price or record()
    await ledger.keep_price(price)
    return price


def forged(quote: OrderQuote, **changes: object) -> OrderQuote:
    """A quote of whoever has the signing key, and says whatever he likes."""
    figures = QuoteFigures(*(getattr(quote, name) for name in QuoteFigures.__struct_fields__))
    return QuoteSigner(SIGNING_KEY).sign(replace(figures, **changes))


async def test_a_record_that_is_kept_is_there_and_may_come_again(ledger: OrderLedger) -> None:
    price = await kept(ledger)
    assert await ledger.price_record(price.id) == price
    await kept(ledger, price)
    shortened = replace(price, expires_at=price.expires_at - 30 * SECOND)
    await kept(ledger, shortened)
    assert await ledger.price_record(price.id) == price


async def test_an_order_by_quote_is_what_the_quote_says(ledger: OrderLedger) -> None:
    quote = order_quote(await kept(ledger), 102864, currency=Currency.GBP, reference="invoice 7")
    item = quoted_order(quote)
    [outcome] = await place(ledger, item)
    assert isinstance(outcome, Placed)
    order = outcome.order
    assert (order.currency, order.amount_cents, order.satoshi) == (Currency.GBP, 102864, quote.satoshi)
    assert (order.rate_e8, order.market_rate_e8, order.markup_bp) == (quote.rate_e8, quote.market_rate_e8, 0)
    assert (order.price_id, order.price_as_of) == (quote.price_id, quote.price_as_of)
    assert (order.quote_id, order.reference, order.client_order_id) == (quote.id, "invoice 7", None)
    assert await ledger.order(order.id, None) == order
    assert await ledger.exposure(None) == Exposure(CAP_SATOSHI, quote.satoshi, 1)


async def test_the_markup_of_then_counts(ledger: OrderLedger) -> None:
    price = await kept(ledger, record(rate_e8=20_000 * 10**8 + 1))
    figures = quote_figures(price)
    marked_up = replace(figures, markup_bp=75, rate_e8=20_150 * 10**8 + 2, satoshi=342432)
    [outcome] = await place(ledger, quoted_order(QuoteSigner(SIGNING_KEY).sign(marked_up)))
    order = order_of(outcome)
    assert (order.market_rate_e8, order.markup_bp, order.rate_e8) == (figures.market_rate_e8, 75, marked_up.rate_e8)


async def test_a_quote_is_honoured_after_its_price_has_ended_and_until_it_expires(ledger: OrderLedger) -> None:
    price = record(age=58)
    late = {"quoted_at": price.expires_at - SECOND / 100}
    await kept(ledger, price)
    lasting = forged(order_quote(price), **late, expires_at=price.expires_at + 300 * SECOND)
    brief = forged(order_quote(price), **late, expires_at=price.expires_at + SECOND / 100)
    await asyncio.sleep(2.1)
    outcomes = await place(ledger, priced_order(price=price), quoted_order(lasting), quoted_order(brief))
    assert codes(outcomes) == ["price_stale", "placed", "quote_expired"]
    assert isinstance(outcomes[2], Refused)
    assert outcomes[2].by_ledger
    assert outcomes[2].problem.facts.keys() == {"expires_at"}
    assert (await ledger.exposure(None)).orders == 1


async def test_a_stored_quote_is_a_repeat_even_after_expiry_and_without_price_or_room(ledger: OrderLedger) -> None:
    price = await kept(ledger, record(rate_e8=1000 * 10**8))
    assert codes(await place(ledger, priced_order(seconds=-1))) == ["clock_skewed"]  # connects, which may take a while
    quote = forged(order_quote(price, 100 * 1000 * 100), expires_at=utc_now() + SECOND)  # the whole cap
    [first] = await place(ledger, quoted_order(quote))
    await asyncio.sleep(1.1)
    again = quoted_order(quote)
    over = RateLimited("too many")
    assert await place(ledger, again, price_order(again.order, over, again.deadline)) == [Replayed(order_of(first))] * 2
    assert (await ledger.exposure(None)).orders == 1
    other = price_order(quoted_order(order_quote(price)).order, over, again.deadline)
    assert codes(await place(ledger, other)) == ["rate_limited"]


@pytest.mark.parametrize("key", [None, "k"])
async def test_the_quote_s_id_is_a_key_whatever_the_client_s_own_is(ledger: OrderLedger, key: str | None) -> None:
    quote = order_quote(await kept(ledger))
    [first] = await place(ledger, quoted_order(quote, key))
    assert order_of(first).client_order_id == key
    assert await place(ledger, quoted_order(quote)) == [Replayed(order_of(first))]
    assert await place(ledger, quoted_order(quote, key)) == [Replayed(order_of(first))]
    assert codes(await place(ledger, quoted_order(quote, "another"))) == ["idempotency_key_reused"]


async def test_a_key_of_another_order_is_refused(ledger: OrderLedger) -> None:
    price = await kept(ledger)
    quote, other = order_quote(price), order_quote(price)
    await place(ledger, quoted_order(other, "by-quote"), priced_order(6900, "plain", price=price))
    assert codes(await place(ledger, quoted_order(quote, "by-quote"))) == ["idempotency_key_reused"]
    assert codes(await place(ledger, quoted_order(quote, "plain"))) == ["idempotency_key_reused"]
    assert codes(await place(ledger, priced_order(6900, "by-quote", price=price))) == ["idempotency_key_reused"]
    assert codes(await place(ledger, quoted_order(quote))) == ["placed"]
    assert codes(await place(ledger, quoted_order(quote, "plain"))) == ["idempotency_key_reused"]


async def test_the_same_request_has_the_same_reference_and_metadata(ledger: OrderLedger) -> None:
    quote = order_quote(await kept(ledger))
    members = '{"a":"1","b":"2"}'
    [first] = await place(ledger, quoted_order(quote, reference="r", metadata=members))
    assert order_of(first).metadata == members
    again = quoted_order(quote, reference="r", metadata='{"b":"2","a":"1"}')
    assert await place(ledger, again) == [Replayed(order_of(first))]
    others = [
        quoted_order(quote),
        quoted_order(quote, reference="s", metadata=members),
        quoted_order(quote, reference="r"),
    ]
    assert codes(await place(ledger, *others)) == ["idempotency_key_reused"] * 3


async def test_executions_of_one_quote_in_one_batch_are_one_order(ledger: OrderLedger) -> None:
    price = await kept(ledger)
    quote, other = order_quote(price), order_quote(price)
    outcomes = await place(
        ledger,
        quoted_order(quote, seconds=-1),
        quoted_order(quote),
        priced_order(price=price),
        quoted_order(quote),
        quoted_order(other),
        quoted_order(quote, "k"),
        quoted_order(other),
    )
    wanted = ["clock_skewed", "placed", "placed", "replayed", "placed", "idempotency_key_reused", "replayed"]
    assert codes(outcomes) == wanted
    assert order_of(outcomes[3]) == order_of(outcomes[1])
    assert (await ledger.exposure(None)).orders == 3


async def test_the_cap_counts_when_a_quote_is_executed(ledger: OrderLedger) -> None:
    price = await kept(ledger, record(rate_e8=1000 * 10**8))
    quotes = [order_quote(price, 60 * 1000 * 100) for _ in range(2)]
    assert codes(await place(ledger, *map(quoted_order, quotes))) == ["placed", "exposure_cap_exceeded"]


UNPROVEN: dict[str, dict[str, object]] = {
    "more bitcoin": {"satoshi": 345001},
    "a lower rate": {"market_rate_e8": 10**12, "rate_e8": 10**12, "satoshi": 690000},
    "another rate than its markup's": {"rate_e8": 10**12, "satoshi": 690000},
    "no price": {"price_id": uuid.uuid4()},
    "another moment of its price": {"price_as_of": record().as_of},
    "before its price": {"quoted_at": record().as_of - 60 * SECOND},
    "for a day": {"expires_at": record().as_of + timedelta(days=1)},
}


@pytest.mark.parametrize("changes", UNPROVEN.values(), ids=UNPROVEN.keys())
async def test_a_signature_alone_sells_nothing(ledger: OrderLedger, changes: dict[str, object]) -> None:
    price = await kept(ledger)
    wrong = forged(order_quote(price), **changes)
    outcomes = await place(ledger, quoted_order(wrong), priced_order(price=price), quoted_order(order_quote(price)))
    assert codes(outcomes) == ["quote_invalid", "placed", "placed"]
    assert isinstance(outcomes[0], Refused)
    assert outcomes[0].by_ledger


async def test_a_quote_at_a_price_of_a_quarter_of_an_hour_ago_is_proven_by_its_record(ledger: OrderLedger) -> None:
    price = await kept(ledger)
    [outcome] = await place(ledger, quoted_order(order_quote(price, seconds=900)))
    order = order_of(outcome)
    assert discrepancies(order, await ledger.price_record(order.price_id), 10 * SECOND) == []


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("seed", range(3))
async def test_any_sequence_of_batches_ends_as_in_the_model(kind: str, seed: int, databases: Databases) -> None:
    rng = random.Random(seed)  # noqa: S311
    model = ModelLedger(cap_satoshi=CAP_SATOSHI)
    prices = [record(1000 * 10**8), record(1000 * 10**8)]
    quotes = [
        forged(
            order_quote(rng.choice(prices), rng.choice([100, 5_000, 1_000_000, 4_000_000])),
            **({"expires_at": prices[1].as_of + SECOND / 1000} if rng.random() < 0.2 else {}),
        )
        for _ in range(30)
    ]

    def item() -> PricedOrder:
        key = rng.choice([None, None, *"abcdef"])
        if rng.random() < 0.3:
            return priced_order(rng.choice([100, 5_000]), key, price=rng.choice(prices))
        made = quoted_order(rng.choice(quotes), key, reference=rng.choice([None, None, "r"]))
        return made if rng.random() < 0.8 else price_order(made.order, PriceUnavailable("none"), made.deadline)

    async with opened(kind, databases) as ledger:
        for each in (model, ledger):
            for price in prices:
                await each.keep_price(price)
        for _ in range(12):
            batch = [item() for _ in range(rng.randint(1, 12))]
            wanted, got = await place(model, *batch), await place(ledger, *batch)
            assert codes(got) == codes(wanted)
            for mine, theirs in zip(got, wanted, strict=True):
                if isinstance(mine, Refused) or isinstance(theirs, Refused):
                    assert mine.problem.facts == theirs.problem.facts  # type: ignore[union-attr]
                else:
                    assert mine.order == replace(theirs.order, created_at=mine.order.created_at)
            assert await ledger.exposure(None) == await model.exposure(None)


@pytest.mark.parametrize("kind", REAL)
async def test_executions_at_once_are_one_order(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as ledger:
        price = await kept(ledger)
        quotes = [order_quote(price) for _ in range(3)]

        async def execute(number: int) -> str:
            chosen = [quoted_order(quote) for quote in quotes[number % 3 :]]
            outcomes = await place(ledger, *chosen, priced_order(order=new_order(100), price=price))
            return str({order_of(each).number for each in outcomes[:-1]})

        numbers = await asyncio.gather(*map(execute, range(60)))
        assert len(set(numbers)) == 3
        assert (await ledger.exposure(None)).orders == 63
