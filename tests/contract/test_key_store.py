"""What every KeyStore does: the model, PostgreSQL, and db_proxy across real TCP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.clients import PostgresKeys
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.remote.clients import RemoteKeys
from buydesk.clients.cache import KeyCache
from buydesk.clients.keys import Key
from buydesk.clients.model import NOTED_AT_ONCE_MAX, KeyStore, NewKey
from buydesk.clients.registry import LimitClient, Limits, RevokeKey, create_key
from buydesk.errors import CannotStart, InvalidRequest, LedgerUnavailable
from buydesk.money import Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.refusals import RefusalRecorder
from buydesk.services import db_proxy
from buydesk.settings.model import Settings
from buydesk.times import utc_now
from tests.builders import TOKEN, settings
from tests.databases import Databases, as_db_proxy
from tests.model_anchors import ModelAnchors
from tests.model_keys import ModelKeys
from tests.model_ledger import ModelLedger
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.operators import operating
from tests.serving import served

ENDS = utc_now() + timedelta(days=90)
NEW = NewKey("other", ["orders:create", "orders:read"], ["192.0.2.0/24", "2001:db8::/32"], ENDS)


@dataclass
class Kept:
    store: KeyStore
    key: Key
    dsn: str | None

    async def limit(self, limits: Limits) -> None:
        if self.dsn is None:
            assert isinstance(self.store, ModelKeys)
            self.store.limit(self.key, limits)
        else:
            async with operating(self.dsn) as desk:
                await desk.change(LimitClient("other", limits), "agreed")

    async def revoke(self) -> None:
        if self.dsn is None:
            assert isinstance(self.store, ModelKeys)
            self.store.revoke(self.key)
        else:
            async with operating(self.dsn) as desk:
                await desk.change(RevokeKey(self.key.id), "gone")


@pytest.fixture(params=["model", "postgres", "remote"])
async def kept(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Kept]:
    if request.param == "model":
        model = ModelKeys()
        key = model.add(NEW.client, *NEW.scopes, allow_from=NEW.allow_from, expires_at=ENDS)  # type: ignore[arg-type]
        yield Kept(model, key, None)
        return
    dsn = await databases.new()
    async with operating(dsn) as desk:
        key = await create_key(desk.registry, NEW, "a test", desk.by)
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    own = PostgresKeys(ledger)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(ledger.close)
        stack.push_async_callback(own.close)
        if request.param == "postgres":
            yield Kept(own, key, dsn)
        else:
            reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
            life, anchors = PostgresLife(ledger), PostgresAnchors(ledger)
            app = db_proxy.create_app(
                settings(),
                ledger,
                life,
                anchors,
                reporter,
                keys=own,
                registry=ModelRegistry(),
                refusals=RefusalRecorder(ModelRefusals()),
                webhooks=ModelWebhooks(),
            )
            remote = RemoteKeys(await stack.enter_async_context(served(app)), settings())
            stack.push_async_callback(remote.close)
            yield Kept(remote, key, dsn)


async def test_a_key_is_found_by_its_id_with_all_that_it_permits(kept: Kept) -> None:
    found = await kept.store.key(kept.key.id)
    assert found is not None
    assert (found.id, found.client, found.digest) == (kept.key.id, "other", kept.key.digest)
    assert (list(found.scopes), list(found.allow_from)) == (NEW.scopes, NEW.allow_from)
    assert (found.expires_at, found.revoked_at, found.last_used_on) == (ENDS, None, None)
    assert (found.client_markup_bp, found.client_quote_seconds_max) == ({}, None)
    assert await kept.store.key("0" * 10) is None


async def test_a_key_is_found_with_what_is_set_of_its_client(kept: Kept) -> None:
    await kept.limit(Limits(rate_per_minute=7, markup_bp={Currency.EUR: 75, Currency.GBP: 0}, quote_seconds_max=90))
    found = await kept.store.key(kept.key.id)
    assert found is not None
    assert (found.client_rate_per_minute, found.client_markup_bp) == (7, {"EUR": 75, "GBP": 0})
    caller = found.caller
    assert caller.client_quote_seconds_max == 90
    assert [caller.markup_bp(each, of_desk_bp=50) for each in Currency] == [75, 0, 50]


async def test_a_key_that_is_revoked_says_when(kept: Kept) -> None:
    await kept.revoke()
    found = await kept.store.key(kept.key.id)
    assert found is not None
    assert found.revoked_at is not None
    assert abs(found.revoked_at - utc_now()) < timedelta(minutes=1)


async def test_use_is_noted_by_its_day(kept: Kept) -> None:
    before = await kept.store.key(kept.key.id)
    days = [utc_now().date()]
    for _ in range(2):
        await kept.store.note_used([kept.key.id, "0" * 10])
    days.append(utc_now().date())
    noted = await kept.store.key(kept.key.id)
    assert before is not None
    assert noted is not None
    assert noted.last_used_on in days
    assert replace(noted, last_used_on=None) == before


async def test_revoking_acts_on_every_edge_within_the_time_that_a_key_is_kept(databases: Databases) -> None:
    dsn, of = await databases.new(), settings(key_cache_seconds=0.5)
    async with contextlib.AsyncExitStack() as stack:
        desk = await stack.enter_async_context(operating(dsn))
        key = await create_key(desk.registry, NEW, "", desk.by)
        ledger = PostgresLedger(as_db_proxy(dsn), of, livemode=False)
        stack.push_async_callback(ledger.close)
        reporter = Reporter("db_proxy", MemoryReportStore(of), of)
        app = db_proxy.create_app(
            of,
            ledger,
            PostgresLife(ledger),
            PostgresAnchors(ledger),
            reporter,
            keys=PostgresKeys(ledger),
            registry=ModelRegistry(),
            refusals=RefusalRecorder(ModelRefusals()),
            webhooks=ModelWebhooks(),
        )
        url = await stack.enter_async_context(served(app))
        stores = [RemoteKeys(url, of) for _ in range(2)]
        edges = [KeyCache(store, of) for store in stores]
        for store in stores:
            stack.push_async_callback(store.close)
        for edge in edges:
            found = await edge.find(key.id)
            assert found is not None
            assert found.is_valid(utc_now())
        await desk.change(RevokeKey(key.id), "lost")
        await asyncio.sleep(of.key_cache_seconds)
        for edge in edges:
            found = await edge.find(key.id)
            assert found is not None
            assert not found.is_valid(utc_now())


async def test_db_proxy_says_when_there_is_no_key_to_call_the_desk_with(databases: Databases) -> None:
    dsn = await databases.new()
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    keys = PostgresKeys(ledger)
    async with operating(dsn) as desk:
        with pytest.raises(CannotStart, match="there is no key"):
            await keys.require_any()
        key = await create_key(desk.registry, NewKey("other", ["orders:read"]), "", desk.by)
        await keys.require_any()
        await desk.change(RevokeKey(key.id), "gone")
        await keys.require_any()  # the last orders are still to be settled
    await ledger.close()


async def test_whichever_token_a_service_has_lets_it_ask_for_keys() -> None:
    keys = ModelKeys()
    key = keys.add("other", "orders:read")
    reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())

    app = db_proxy.create_app(
        settings(),
        ModelLedger(),
        ModelLedger(),
        ModelAnchors(),
        reporter,
        keys=keys,
        registry=ModelRegistry(),
        refusals=RefusalRecorder(ModelRefusals()),
        webhooks=ModelWebhooks(),
    )
    async with served(app) as url:
        given: Any
        for given in ({"reading_tokens": TOKEN}, {"placing_tokens": TOKEN}, {"processing_tokens": TOKEN}):
            remote = RemoteKeys(url, Settings(**given))
            assert await remote.key(key.id) == keys.stored[key.id]
            await remote.close()
        for given in ({}, {"reading_tokens": "wrong"}, {"reporting_tokens": TOKEN}):
            remote = RemoteKeys(url, Settings(**given))
            with pytest.raises(LedgerUnavailable):
                await remote.key(key.id)
            await remote.close()
        remote = RemoteKeys(url, settings())
        with pytest.raises(InvalidRequest, match="must be the id of a key"):
            await remote.key("no-id")
        for ids in (["no-id"], ["0" * 10] * (NOTED_AT_ONCE_MAX + 1)):
            with pytest.raises(InvalidRequest, match="ids"):
                await remote.note_used(ids)
        await remote.note_used(["0" * 10] * NOTED_AT_ONCE_MAX)
        await remote.close()
