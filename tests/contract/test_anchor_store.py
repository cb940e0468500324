"""What every AnchorStore does: the model, PostgreSQL of both versions, and db_proxy across real TCP."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import cast

import asyncpg
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.remote import RemoteAnchorStore
from buydesk.clients.registry import confirm_price
from buydesk.errors import CannotStart, InvalidRequest, LedgerUnavailable
from buydesk.money import RATE_E8_MAX, Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.refusals import RefusalRecorder
from buydesk.prices.anchors import (
    CONFIRMATIONS_MAX,
    CONFIRMED_MINUTES_MAX,
    WHY_CHARS_MAX,
    Anchor,
    AnchorStore,
    Confirmation,
    NewConfirmation,
)
from buydesk.services import db_proxy
from buydesk.times import utc_now
from tests.builders import settings
from tests.databases import Databases, as_db_proxy
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.operators import operating
from tests.serving import free_port, served

NOON = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)
# The servers of the tests are on this machine.
CLOCKS_DIFFER = timedelta(seconds=5)
EUR, GBP, USD = Currency.EUR, Currency.GBP, Currency.USD
NEW = NewConfirmation(EUR, 15_000 * 10**8, 16_000 * 10**8 + 1, "it's the news: “half price”", 15)


@dataclass
class Kept:
    """A store, and how to let confirmations in it be so old that they have ended."""

    store: AnchorStore
    model: ModelAnchors | None
    owner_dsn: str

    async def store_ended(self) -> None:
        if self.model is not None:
            self.model.confirmed.append(Confirmation(EUR, 10**8, 10**8, "long ago", utc_now() - MOMENT))
            return
        owner = await asyncpg.connect(self.owner_dsn)
        await owner.execute(
            "INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at) "
            "VALUES ('EUR', 1e8, 1e8, 'long ago', now() - interval '1 minute', now())"
        )
        await owner.close()

    async def confirm(self, new: NewConfirmation) -> Confirmation:
        if self.model is not None:
            return await self.model.confirm(new)
        try:
            async with operating(self.owner_dsn) as desk:
                return await confirm_price(desk.registry, new, desk.by)
        except CannotStart as error:
            raise error.__cause__ or error from error

    async def store_ahead(self) -> None:
        """As if the ledger's clock had been a day ahead when it kept a euro's price."""
        ahead = utc_now() + timedelta(days=1)
        if self.model is not None:
            self.model.kept[EUR] = Anchor(10**8, ahead)
            return
        owner = await asyncpg.connect(self.owner_dsn)
        await owner.execute("INSERT INTO price_anchors (currency, rate_e8, as_of) VALUES ('EUR', 1e8, $1)", ahead)
        await owner.close()


@contextlib.asynccontextmanager
async def opened(kind: str, databases: Databases) -> AsyncIterator[Kept]:
    if kind == "model":
        model = ModelAnchors()
        yield Kept(model, model, "")
        return
    dsn = await databases.new(16 if kind == "postgres16" else 18)
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    own = PostgresAnchors(ledger)
    if kind == "remote":
        reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
        async with served(
            db_proxy.create_app(
                settings(),
                ledger,
                PostgresLife(ledger),
                own,
                reporter,
                keys=ModelKeys(),
                registry=ModelRegistry(),
                refusals=RefusalRecorder(ModelRefusals()),
                webhooks=ModelWebhooks(),
            )
        ) as url:
            remote = RemoteAnchorStore(url, settings())
            yield Kept(remote, None, dsn)
            await remote.close()
    else:
        yield Kept(own, None, dsn)
    await own.close()
    await ledger.close()


@pytest.fixture(params=["model", "postgres18", "postgres16", "remote"])
async def kept(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Kept]:
    async with opened(request.param, databases) as store:
        yield store


@pytest.fixture
def store(kept: Kept) -> AnchorStore:
    return kept.store


async def test_new_store_has_neither_anchors_nor_confirmations(store: AnchorStore) -> None:
    assert await store.anchors() == {}
    assert list(await store.confirmations()) == []


async def test_anchors_are_kept_as_they_are(store: AnchorStore) -> None:
    given = {
        EUR: Anchor(4119191 * 10**6 + 1, NOON, RATE_E8_MAX),
        GBP: Anchor(10**8, NOON),
        USD: Anchor(RATE_E8_MAX, NOON - MOMENT, 10**8 + 1),
    }
    await store.keep_anchors(given)
    assert await store.anchors() == given


async def test_anchor_is_replaced_by_a_later_one_and_never_by_an_earlier_one(store: AnchorStore) -> None:
    await store.keep_anchors({EUR: Anchor(10**8, NOON), GBP: Anchor(10**8, NOON), USD: Anchor(10**8, NOON)})
    await store.keep_anchors(
        {USD: Anchor(2 * 10**8, NOON - MOMENT), GBP: Anchor(2 * 10**8, NOON), EUR: Anchor(2 * 10**8, NOON + MOMENT)}
    )
    assert await store.anchors() == {
        EUR: Anchor(2 * 10**8, NOON + MOMENT),
        GBP: Anchor(10**8, NOON),
        USD: Anchor(10**8, NOON),
    }


async def test_dollars_of_an_anchor_are_those_of_its_own_time(store: AnchorStore) -> None:
    await store.keep_anchors({EUR: Anchor(10**8, NOON, 2 * 10**8), GBP: Anchor(10**8, NOON, 2 * 10**8)})
    later = {EUR: Anchor(10**8, NOON + MOMENT), GBP: Anchor(10**8, NOON + MOMENT, 3 * 10**8)}
    await store.keep_anchors(later)
    assert await store.anchors() == later


async def test_anchors_of_other_currencies_stay(store: AnchorStore) -> None:
    await store.keep_anchors({EUR: Anchor(10**8, NOON)})
    await store.keep_anchors({})
    await store.keep_anchors({USD: Anchor(2 * 10**8, NOON)})
    assert await store.anchors() == {EUR: Anchor(10**8, NOON), USD: Anchor(2 * 10**8, NOON)}


async def test_anchor_from_the_future_counts_as_of_now(store: AnchorStore) -> None:
    await store.keep_anchors({EUR: Anchor(10**8, utc_now() + timedelta(days=365))})
    as_of = (await store.anchors())[EUR].as_of
    assert abs(as_of - utc_now()) < CLOCKS_DIFFER
    await store.keep_anchors({EUR: Anchor(2 * 10**8, utc_now() + CLOCKS_DIFFER)})
    assert (await store.anchors())[EUR].rate_e8 == 2 * 10**8


async def test_anchor_that_was_kept_while_the_ledgers_clock_was_ahead_gives_way(kept: Kept) -> None:
    await kept.store_ahead()
    now = utc_now() - CLOCKS_DIFFER
    await kept.store.keep_anchors({EUR: Anchor(2 * 10**8, now)})
    assert await kept.store.anchors() == {EUR: Anchor(2 * 10**8, now)}


async def test_confirmation_is_kept_as_it_was_said_and_ends_after_its_minutes(kept: Kept) -> None:
    confirmed = await kept.confirm(NEW)
    assert (confirmed.currency, confirmed.low_e8, confirmed.high_e8) == (NEW.currency, NEW.low_e8, NEW.high_e8)
    assert confirmed.why == NEW.why
    assert abs(confirmed.expires_at - utc_now() - timedelta(minutes=15)) < CLOCKS_DIFFER
    assert list(await kept.store.confirmations()) == [confirmed]


async def test_one_price_alone_may_be_confirmed_and_again(kept: Kept) -> None:
    longest = "w" * WHY_CHARS_MAX
    one = replace(NEW, low_e8=10**8, high_e8=10**8, minutes=1, why="w")
    first, second = await kept.confirm(one), await kept.confirm(replace(one, why=longest, minutes=2))
    assert list(await kept.store.confirmations()) == [second, first]
    assert second.why == longest


async def test_confirmation_that_has_ended_is_not_among_them(kept: Kept) -> None:
    await kept.store_ended()
    assert list(await kept.store.confirmations()) == []
    open_one = await kept.confirm(NEW)
    assert list(await kept.store.confirmations()) == [open_one]


async def test_so_many_confirmations_are_given_and_no_more(kept: Kept) -> None:
    made = [await kept.confirm(NEW) for _ in range(CONFIRMATIONS_MAX + 1)]
    assert list(await kept.store.confirmations()) == made[:0:-1]


@pytest.mark.parametrize(
    ("change", "members"),
    [
        ({"high_e8": NEW.low_e8 - 1}, ["to"]),
        ({"low_e8": 10**8 - 1}, ["from"]),
        ({"high_e8": RATE_E8_MAX + 1}, ["to"]),
        ({"why": ""}, ["why"]),
        ({"why": " "}, ["why"]),
        ({"why": "w" * (WHY_CHARS_MAX + 1)}, ["why"]),
        ({"why": "two\nlines"}, ["why"]),
        ({"why": "\x00"}, ["why"]),
        ({"why": "\x1b[2J"}, ["why"]),
        ({"minutes": 0}, ["minutes"]),
        ({"minutes": CONFIRMED_MINUTES_MAX + 1}, ["minutes"]),
        ({"high_e8": NEW.low_e8 - 1, "why": "", "minutes": 16}, ["to", "why", "minutes"]),
    ],
)
async def test_confirmation_beyond_its_limits_is_refused_by_name_and_not_kept(
    kept: Kept, change: dict[str, object], members: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await kept.confirm(replace(NEW, **change))
    assert [each["member"] for each in refused.value.facts["errors"]] == members  # type: ignore[attr-defined]
    assert list(await kept.store.confirmations()) == []


async def calls_of(store: AnchorStore) -> None:
    for call in (store.anchors(), store.keep_anchors({EUR: Anchor(10**8, NOON)}), store.confirmations()):
        with pytest.raises(LedgerUnavailable):
            await call


async def test_database_that_cannot_be_reached_is_an_unavailable_ledger() -> None:
    ledger = PostgresLedger(f"postgresql://u@127.0.0.1:{free_port()}/db", settings(), livemode=False)
    await calls_of(PostgresAnchors(ledger))
    await ledger.close()


async def test_db_proxy_that_gives_no_answer_or_takes_no_such_token_is_an_unavailable_ledger() -> None:
    remote = RemoteAnchorStore(f"http://127.0.0.1:{free_port()}", settings())
    await calls_of(remote)
    await remote.close()
    reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
    async with served(
        db_proxy.create_app(
            settings(),
            ModelLedger(),
            ModelLedger(),
            ModelAnchors(),
            reporter,
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
    ) as url:
        stranger = RemoteAnchorStore(url, settings(publishing_tokens="another"))
        await calls_of(stranger)
        await stranger.close()


async def test_db_proxy_of_another_version_is_an_unavailable_ledger() -> None:
    class Francs(StrEnum):
        CHF = "CHF"

    class Newer(ModelAnchors):
        async def anchors(self) -> Mapping[Currency, Anchor]:
            return {cast("Currency", Francs.CHF): Anchor(10**8, NOON)}

    reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
    async with served(
        db_proxy.create_app(
            settings(),
            ModelLedger(),
            ModelLedger(),
            Newer(),
            reporter,
            keys=ModelKeys(),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
    ) as url:
        remote = RemoteAnchorStore(url, settings())
        with pytest.raises(LedgerUnavailable):
            await remote.anchors()
        await remote.close()


async def test_currency_that_only_a_newer_program_knows_is_left_to_it(databases: Databases) -> None:
    dsn = await databases.new()
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    owner = await asyncpg.connect(dsn)
    await owner.execute("SELECT keep_price_anchors('{CHF,EUR}', '{1,100000000}', '{now,now}', '{NULL,1}')")
    await owner.execute("SELECT confirm_price('me', 'here', 'why', 'CHF', 1, 2, 15)")
    await owner.close()
    store = PostgresAnchors(ledger)
    assert list(await store.anchors()) == [EUR]
    assert list(await store.confirmations()) == []
    await ledger.close()
