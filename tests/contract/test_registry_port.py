"""Registry and RefusalStore: the same over a model, both versions of PostgreSQL and db_proxy across TCP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from msgspec.structs import replace

from buydesk.backends.memory.reports import MemoryReportStore
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.refusals import PostgresRefusals
from buydesk.backends.postgres.registry import registry_beside
from buydesk.backends.remote.registry import RemoteRefusals, RemoteRegistry
from buydesk.clients.audit import broken_entries
from buydesk.clients.keys import new_key
from buydesk.clients.model import NewKey
from buydesk.clients.registry import (
    AnyChange,
    ConfirmPrice,
    CreateClient,
    CreateKey,
    LimitClient,
    Limits,
    Pause,
    Registry,
    Resume,
    RevokeKey,
    RotateKey,
    SetCap,
    SetCapCounts,
    ShownKey,
    confirm_price,
    create_key,
    rotate_key,
)
from buydesk.clients.scopes import SCOPES, Scope
from buydesk.errors import (
    CapBelowUsed,
    ClientExists,
    ClientNotFound,
    InsufficientScope,
    InvalidRequest,
    KeyEnded,
    KeyNotFound,
    KeyRefused,
    LedgerUnavailable,
    OutcomeUnknown,
    Overloaded,
)
from buydesk.money import SATOSHI_PER_BTC, Currency
from buydesk.observability.reporter import Reporter
from buydesk.orders.refusals import Refusal, RefusalReads, RefusalRecorder, RefusalStore
from buydesk.prices.anchors import NewConfirmation
from buydesk.services import db_proxy
from buydesk.times import utc_now
from tests.builders import new_order, priced_order, settings
from tests.databases import Databases, as_db_proxy, run
from tests.model_keys import ModelKeys
from tests.model_registry import ModelRefusals, ModelRegistry
from tests.model_webhooks import ModelWebhooks
from tests.operators import key_for
from tests.serving import free_port, served

HERE = "192.0.2.7"
POSTGRES = pytest.mark.parametrize("kind", ["postgres18", "postgres16", "remote"])


@dataclass
class Opened:
    registry: Registry[ShownKey]
    refusals: RefusalReads
    store: RefusalStore
    by: ShownKey
    dsn: str | None

    async def key(self, *scopes: Scope) -> ShownKey:
        """A key that permits this, shown."""
        key = await create_key(self.registry, NewKey("anonymous", scopes), "", self.by)
        return ShownKey(key.text, HERE)

    async def change(self, change: AnyChange) -> object:
        return await self.registry.change(change, "why not", self.by)


@contextlib.asynccontextmanager
async def opened(kind: str, databases: Databases) -> AsyncIterator[Opened]:
    if kind == "model":
        model, refusals = ModelRegistry(), ModelRefusals()
        yield Opened(model, refusals, refusals, ShownKey(new_key(livemode=False).text, HERE), None)
        return
    dsn = await databases.new(16 if kind == "postgres16" else 18)
    by = ShownKey((await key_for(dsn, "anonymous", *SCOPES)).text, HERE)
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    registry, own = registry_beside(ledger), PostgresRefusals(ledger)
    if kind == "remote":
        reporter = Reporter("db_proxy", MemoryReportStore(settings()), settings())
        app = db_proxy.create_app(
            settings(),
            ledger,
            PostgresLife(ledger),
            PostgresAnchors(ledger),
            reporter,
            keys=ModelKeys(),
            registry=registry,
            refusals=RefusalRecorder(own),
            webhooks=ModelWebhooks(),
        )
        async with served(app) as url:
            remote, remote_refusals = RemoteRegistry(url, settings()), RemoteRefusals(url, settings())
            yield Opened(remote, remote_refusals, own, by, dsn)
            await remote.close()
            await remote_refusals.close()
    else:
        yield Opened(registry, own, own, by, dsn)
    assert list(broken_entries(await registry.acts(0, 1000))) == []
    await registry.close()
    await own.close()
    await ledger.close()


@pytest.fixture(params=["model", "postgres18", "postgres16", "remote"])
async def desk(request: pytest.FixtureRequest, databases: Databases) -> AsyncIterator[Opened]:
    async with opened(request.param, databases) as running:
        yield running


async def limits_of(desk: Opened, name: str) -> tuple[Any, ...]:
    [found] = [each for each in await desk.registry.clients("", 100) if each.name == name]
    return (
        *(found.cap_satoshi, found.order_satoshi_max, found.rate_per_minute, found.quote_seconds_max),
        dict(found.daily_cents_max),
    )


async def test_a_client_is_made_with_limits_that_may_change(desk: Opened) -> None:
    await desk.change(CreateClient("shop", Limits(cap_satoshi=7, daily_cents_max={Currency.EUR: 100})))
    assert await limits_of(desk, "shop") == (7, None, None, None, {"EUR": 100})
    daily = {Currency.EUR: None, Currency.GBP: 5}
    more = Limits(order_satoshi_max=3, rate_per_minute=600, daily_cents_max=daily, quote_seconds_max=900)
    await desk.change(LimitClient("shop", more))
    assert await limits_of(desk, "shop") == (7, 3, 600, 900, {"GBP": 5})
    await desk.change(LimitClient("shop", Limits(cap_satoshi=None, rate_per_minute=None)))
    assert await limits_of(desk, "shop") == (None, 3, None, 900, {"GBP": 5})
    await desk.change(LimitClient("shop", Limits(quote_seconds_max=None)))
    assert await limits_of(desk, "shop") == (None, 3, None, None, {"GBP": 5})
    [found] = [each for each in await desk.registry.clients("", 100) if each.name == "shop"]
    assert (found.used_satoshi, found.orders, found.keys, found.cap_counts_open) == (0, 0, 0, False)


async def test_a_key_is_made_replaced_and_ended(desk: Opened) -> None:
    ends_at = utc_now() + timedelta(days=1)
    new = NewKey("anonymous", ["orders:read"], ["192.0.2.0/24"], ends_at, 7)
    key = await create_key(desk.registry, new, "why not", desk.by)
    other = await rotate_key(desk.registry, key.id, timedelta(hours=1), "a year", desk.by)
    stored = {each.id: each for each in await desk.registry.keys("anonymous", 1000)}
    assert (stored[key.id].digest, stored[other.id].digest) == (key.digest, other.digest)
    for each in (key, other):
        found = stored[each.id]
        assert (list(found.scopes), list(found.allow_from), found.rate_per_minute) == (
            ["orders:read"],
            ["192.0.2.0/24"],
            7,
        )
    assert stored[key.id].is_valid(utc_now())
    assert not stored[key.id].is_valid(utc_now() + timedelta(hours=1, seconds=5))
    assert stored[other.id].is_valid(utc_now() + timedelta(hours=23))
    await desk.change(RevokeKey(other.id))
    [revoked] = [each for each in await desk.registry.keys(None, 1000) if each.id == other.id]
    assert not revoked.is_valid(utc_now())
    with pytest.raises(KeyEnded):
        await rotate_key(desk.registry, other.id, timedelta(hours=1), "again", desk.by)
    assert list(await desk.registry.keys("nobody", 1)) == []


@POSTGRES
async def test_whatever_becomes_of_the_old_key_the_new_one_lasts_as_long(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        for lasts in (None, timedelta(days=1)):
            ends_at = None if lasts is None else utc_now() + lasts
            key = await create_key(desk.registry, NewKey("anonymous", ["orders:read"], (), ends_at), "", desk.by)
            made = [await rotate_key(desk.registry, key.id, timedelta(hours=1), "", desk.by) for _ in range(2)]
            stored = {each.id: each for each in await desk.registry.keys("anonymous", 1000)}
            for each in made:
                end = stored[each.id].expires_at
                if lasts is None:
                    assert end is None
                else:
                    assert end is not None
                    assert timedelta(hours=23) < end - utc_now() <= lasts


@POSTGRES
async def test_no_key_lasts_beyond_what_programs_can_read(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        last = datetime(9998, 12, 31, tzinfo=UTC)
        with pytest.raises(InvalidRequest):
            await create_key(
                desk.registry, NewKey("anonymous", ["orders:read"], (), last.replace(year=9999)), "", desk.by
            )
        key = await create_key(desk.registry, NewKey("anonymous", ["orders:read"], (), last), "", desk.by)
        await asyncio.sleep(0.01)
        other = await rotate_key(desk.registry, key.id, timedelta(hours=1), "", desk.by)
        stored = {each.id: each for each in await desk.registry.keys("anonymous", 1000)}
        assert stored[other.id].expires_at == last


async def test_a_range_that_nobody_may_confirm_is_refused_by_db_proxy_too(databases: Databases) -> None:
    async with opened("remote", databases) as desk:
        with pytest.raises(InvalidRequest):
            await desk.change(ConfirmPrice(Currency.EUR, 10**8, 10**17, 1))


@POSTGRES
async def test_what_is_against_a_rule_says_so(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        key = await create_key(desk.registry, NewKey("anonymous", ["orders:read"]), "", desk.by)
        for change in (
            CreateKey(key.id, "00" * 32, "anonymous", ["orders:read"], [], None, None),
            CreateKey("short", "00" * 32, "anonymous", ["orders:read"], [], None, None),
            CreateKey("0" * 10, "00" * 32, "anonymous", [], [], None, None),
            CreateKey("0" * 10, "00" * 32, "anonymous", ["orders:read"], [], None, 0),
            RotateKey(key.id, "1" * 10, "00" * 32, 10.0**30),
            LimitClient("anonymous", Limits(daily_cents_max={Currency.EUR: -1})),
            LimitClient("anonymous", Limits(markup_bp={Currency.EUR: -1})),
            LimitClient("anonymous", Limits(markup_bp={Currency.EUR: 5001})),
            LimitClient("anonymous", Limits(quote_seconds_max=4)),
            LimitClient("anonymous", Limits(quote_seconds_max=901)),
        ):
            with pytest.raises(InvalidRequest):
                await desk.change(change)


async def test_lists_have_a_bound_and_go_on(desk: Opened) -> None:
    for name in ("b", "c", "d"):
        await desk.change(CreateClient(name, Limits()))
    assert [each.name for each in await desk.registry.clients("b", 1)] == ["c"]
    assert [each.name for each in await desk.registry.clients("", 2)] == ["anonymous", "b"]
    assert (await desk.registry.client("c")).name == "c"
    with pytest.raises(ClientNotFound):
        await desk.registry.client("nobody")
    made = [await create_key(desk.registry, NewKey("b", ["orders:read"]), "", desk.by) for _ in range(3)]
    assert [each.id for each in await desk.registry.keys("b", 2)] == [each.id for each in made[1:]]


async def test_what_is_set_then_is_returned(desk: Opened) -> None:
    assert await desk.change(Pause()) == {"cap_satoshi": 10**10, "cap_counts_open": False, "paused": True}
    assert await desk.change(SetCap(10**9)) == {"cap_satoshi": 10**9, "cap_counts_open": False, "paused": True}
    limits = Limits(daily_cents_max={Currency.GBP: 7})
    shown: dict[str, object] = {"cap_satoshi": None, "order_satoshi_max": None, "cap_counts_open": False}
    shown |= {"rate_per_minute": None, "daily_cents_max": {"GBP": 7}, "markup_bp": {}, "quote_seconds_max": None}
    for change in (CreateClient("shop", limits), LimitClient("shop", Limits())):
        assert await desk.change(change) == shown
    assert await desk.change(SetCapCounts("shop", open_only=True)) == shown | {"cap_counts_open": True}


async def test_a_client_has_markups_that_may_change(desk: Opened) -> None:
    async def found() -> dict[str, int]:
        return dict((await desk.registry.client("shop")).markup_bp)

    await desk.change(CreateClient("shop", Limits(markup_bp={Currency.EUR: 75, Currency.GBP: 0})))
    assert await found() == {"EUR": 75, "GBP": 0}
    await desk.change(LimitClient("shop", Limits(markup_bp={Currency.EUR: None, Currency.GBP: 5, Currency.USD: 5000})))
    assert await found() == {"GBP": 5, "USD": 5000}
    await desk.change(LimitClient("shop", Limits(cap_satoshi=7)))
    await desk.change(LimitClient("shop", Limits(markup_bp={})))
    assert await found() == {"GBP": 5, "USD": 5000}
    assert (await desk.registry.client("anonymous")).markup_bp == {}


@POSTGRES
async def test_a_key_that_is_being_ended_does_nothing_after_that(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        assert desk.dsn is not None
        by = await desk.key("desk:pause")
        owner = await asyncpg.connect(desk.dsn)
        async with owner.transaction():
            await owner.execute("SELECT end_key('me', 'here', 'lost', $1, NULL)", by.text[8:18])
            pausing = asyncio.create_task(desk.registry.change(Pause(), "x", by))
            await asyncio.sleep(0.2)
        with pytest.raises(KeyRefused):
            await pausing
        assert not (await desk.registry.desk()).paused
        await owner.close()


async def test_an_answer_that_is_lost_names_the_key_that_may_be_there(desk: Opened) -> None:
    class Lost(ModelRegistry):
        async def change(self, change: AnyChange, why: str, by: ShownKey) -> object:
            raise OutcomeUnknown("lost")

    for made in (
        create_key(Lost(), NewKey("anonymous", ["orders:read"]), "", desk.by),
        rotate_key(Lost(), "0" * 10, timedelta(hours=1), "", desk.by),
    ):
        with pytest.raises(OutcomeUnknown) as unknown:
            await made
        assert len(str(unknown.value.facts["key_id"])) == 10


async def test_the_desk_s_cap_and_what_it_counts_are_set_and_it_is_paused(desk: Opened) -> None:
    await desk.change(SetCap(7))
    await desk.change(SetCapCounts(None, open_only=True))
    await desk.change(Pause())
    found = await desk.registry.desk()
    assert (found.cap_satoshi, found.used_satoshi, found.cap_counts_open, found.paused) == (7, 0, True, True)
    assert (found.livemode, found.orders) == (False, 0)
    await desk.change(Resume())
    assert not (await desk.registry.desk()).paused
    await desk.change(SetCapCounts("anonymous", open_only=True))
    assert [each.cap_counts_open for each in await desk.registry.clients("", 100) if each.name == "anonymous"] == [True]


async def test_a_price_is_confirmed_for_so_long(desk: Opened) -> None:
    new = NewConfirmation(Currency.EUR, 10**8, 10**8, "the news", 2)
    confirmed = await confirm_price(desk.registry, new, desk.by)
    assert timedelta(minutes=1) < confirmed.expires_at - utc_now() <= timedelta(minutes=2, seconds=5)
    with pytest.raises(InvalidRequest):
        await confirm_price(desk.registry, replace(new, minutes=16), desk.by)


async def test_what_cannot_be_changed_says_why_and_changes_nothing(desk: Opened) -> None:
    before = len(await desk.registry.acts(0, 1000))
    for change, problem in (
        (CreateClient("anonymous", Limits()), ClientExists),
        (LimitClient("nobody", Limits(cap_satoshi=1)), ClientNotFound),
        (SetCapCounts("nobody", open_only=True), ClientNotFound),
        (CreateKey("0" * 10, "00" * 32, "nobody", ["orders:read"], [], None, None), ClientNotFound),
        (RotateKey("0" * 10, "1" * 10, "00" * 32, 60), KeyNotFound),
        (RevokeKey("0" * 10), KeyNotFound),
    ):
        with pytest.raises(problem):
            await desk.change(change)
    assert len(await desk.registry.acts(0, 1000)) == before


async def test_acts_are_read_from_any_one_on(desk: Opened) -> None:
    before = len(await desk.registry.acts(0, 1000))
    for cap in (1, 2, 3):
        await desk.change(SetCap(cap))
    acts = await desk.registry.acts(before, 2)
    assert [each.number for each in acts] == [before + 1, before + 2]
    assert [(each.address, each.why) for each in acts] == [(HERE, "why not")] * 2
    assert [each.number for each in await desk.registry.acts(before + 1, 1)] == [before + 2]


_DESK: tuple[tuple[AnyChange, Scope], ...] = (
    (CreateClient("shop", Limits()), "clients:manage"),
    (LimitClient("anonymous", Limits()), "clients:manage"),
    (CreateKey("0" * 10, "00" * 32, "anonymous", ["clients:manage"], [], None, None), "clients:manage"),
    (SetCap(5), "desk:cap"),
    (SetCapCounts(None, open_only=True), "desk:cap"),
    (Pause(), "desk:pause"),
    (Resume(), "desk:pause"),
    (ConfirmPrice(Currency.EUR, 10**8, 10**8, 1), "prices:confirm"),
)


@POSTGRES
async def test_the_ledger_itself_lets_each_change_be_made_by_who_may(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        for change, scope in _DESK:
            for lacking in (set(SCOPES) - {scope}, {"orders:read"}):
                by = await desk.key(*lacking)
                before = len(await desk.registry.acts(0, 1000))
                with pytest.raises(InsufficientScope) as refused:
                    await desk.registry.change(change, "x", by)
                assert refused.value.facts["scope"] == scope
                assert len(await desk.registry.acts(0, 1000)) == before
            by = await desk.key(scope)
            await desk.registry.change(change, "x", by)
            [act] = (await desk.registry.acts(0, 1000))[-1:]
            assert act.operator == f"anonymous/{by.text[8:18]}"


@POSTGRES
async def test_nobody_grants_more_than_they_have(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        strong = await create_key(desk.registry, NewKey("anonymous", ["desk:cap"]), "", desk.by)
        by = await desk.key("clients:manage", "orders:read")
        await create_key(desk.registry, NewKey("anonymous", ["orders:read"]), "", by)
        for scopes in (["orders:read", "desk:cap"], ["orders:create"]):
            with pytest.raises(InsufficientScope) as refused:
                await create_key(desk.registry, NewKey("anonymous", scopes), "", by)
            assert refused.value.facts["scope"] == scopes[-1]
        with pytest.raises(InsufficientScope) as refused:
            await rotate_key(desk.registry, strong.id, timedelta(hours=1), "", by)
        assert refused.value.facts["scope"] == "desk:cap"
        await desk.registry.change(RevokeKey(strong.id), "", by)  # which takes nothing from anybody but its owner


@POSTGRES
async def test_a_key_that_is_none_any_more_changes_nothing(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        revoked, expired = await desk.key(*SCOPES), await desk.key(*SCOPES)
        await desk.change(RevokeKey(revoked.text[8:18]))
        assert desk.dsn is not None
        await run(desk.dsn, "UPDATE keys SET expires_at = now() WHERE id = $1", expired.text[8:18])
        forged = desk.by.text[:-1] + ("0" if desk.by.text[-1] != "0" else "1")
        digest = (await desk.registry.keys("anonymous", 1000))[0].digest.hex()
        for text in (revoked.text, expired.text, forged, new_key(livemode=False).text, "", "x" * 20, digest):
            with pytest.raises(KeyRefused):
                await desk.registry.change(Pause(), "x", ShownKey(text, HERE))
        assert not (await desk.registry.desk()).paused


@POSTGRES
async def test_caps_below_what_is_used_and_beyond_all_bitcoin_are_refused(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        assert desk.dsn is not None
        ledger = PostgresLedger(as_db_proxy(desk.dsn), settings(), livemode=False)
        await ledger.place([priced_order(2_000_000)], 5)
        await ledger.close()
        for change in (SetCap(SATOSHI_PER_BTC - 1), LimitClient("anonymous", Limits(cap_satoshi=SATOSHI_PER_BTC - 1))):
            with pytest.raises(CapBelowUsed):
                await desk.change(change)
        for wrong in (
            SetCap(21_000_000 * SATOSHI_PER_BTC + 1),
            SetCap(10**30),
            LimitClient("anonymous", Limits(cap_satoshi=21_000_000 * SATOSHI_PER_BTC + 1)),
            LimitClient("anonymous", Limits(order_satoshi_max=0)),
            CreateClient("Shop", Limits()),
        ):
            with pytest.raises(InvalidRequest):
                await desk.change(wrong)
        assert (await desk.registry.desk()).used_satoshi == SATOSHI_PER_BTC


@POSTGRES
async def test_what_the_database_cannot_make_anything_of_is_refused(kind: str, databases: Databases) -> None:
    async with opened(kind, databases) as desk:
        for change in (
            CreateKey("0" * 10, "no hexadecimal", "anonymous", ["orders:read"], [], None, None),
            CreateKey("0" * 10, "00" * 32, "anonymous", ["orders:read"], ["here"], None, None),
            CreateClient("shop\0", Limits()),
        ):
            with pytest.raises(InvalidRequest):
                await desk.change(change)


async def test_a_registry_that_does_not_answer_leaves_a_change_unknown(databases: Databases) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    registry, refusals = RemoteRegistry(nowhere, settings()), RemoteRefusals(nowhere, settings())
    by = ShownKey("x", HERE)
    with pytest.raises(LedgerUnavailable):
        await registry.change(Pause(), "x", by)  # it was never asked
    lists = registry.clients("", 1), registry.keys(None, 1), registry.acts(0, 1)
    for reading in (registry.desk(), registry.client("x"), *lists):
        with pytest.raises(LedgerUnavailable):
            await reading
    with pytest.raises(LedgerUnavailable):
        await refusals.refusals(None, 1)
    await registry.close()
    await refusals.close()
    dsn = await databases.new()
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    by = ShownKey((await key_for(dsn, "anonymous", *SCOPES)).text, HERE)
    own = registry_beside(ledger)
    owner, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with owner.transaction():
        await owner.execute("LOCK exposure IN EXCLUSIVE MODE")
        changing = asyncio.create_task(own.change(Pause(), "x", by))
        while not await other.fetch(waiting):
            await asyncio.sleep(0.01)
        await other.execute(f"SELECT pg_terminate_backend(pid) FROM ({waiting}) w")  # noqa: S608
        with pytest.raises(OutcomeUnknown):
            await changing
    assert not (await own.desk()).paused
    async with owner.transaction():
        await owner.execute("LOCK exposure IN EXCLUSIVE MODE")
        with pytest.raises(Overloaded):  # the wait for the lock is bounded; certainly nothing was done
            await own.change(Pause(), "x", by)
    await owner.close()
    await other.close()
    await ledger.close()


def refusal(number: int, client: str = "shop") -> Refusal:
    at = utc_now().replace(microsecond=number)
    order = new_order()
    return Refusal(at, client, order.id, f"k{number}", "paused", Currency.GBP, 100 + number)


async def test_refusals_are_read_newest_first_by_their_client_or_all(desk: Opened) -> None:
    assert list(await desk.refusals.refusals(None, 10)) == []
    kept = [refusal(1), refusal(2, "other"), refusal(3)]
    kept[2] = replace(kept[2], client_order_id=None)
    await desk.store.note_refusals(kept[:2])
    await desk.store.note_refusals(kept[2:])
    assert list(await desk.refusals.refusals(None, 10)) == kept[::-1]
    assert list(await desk.refusals.refusals("shop", 10)) == [kept[2], kept[0]]
    assert list(await desk.refusals.refusals("shop", 1)) == [kept[2]]
    assert list(await desk.refusals.refusals("nobody", 1)) == []


async def test_a_request_that_comes_again_is_one_refusal(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        first = refusal(1)
        await desk.store.note_refusals([first])
        await desk.store.note_refusals([replace(first, code="price_stale"), refusal(2)])
        assert [each.code for each in await desk.refusals.refusals("shop", 10)] == ["paused", "paused"]


async def test_what_was_placed_after_all_is_no_refusal(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        assert desk.dsn is not None
        item = priced_order()
        lost = replace(refusal(1), order_id=item.order.id)
        await desk.store.note_refusals([lost, refusal(2)])
        ledger = PostgresLedger(as_db_proxy(desk.dsn), settings(), livemode=False)
        await ledger.place([item], 5)
        await ledger.close()
        assert [each.client_order_id for each in await desk.refusals.refusals("shop", 10)] == ["k2"]
        assert [each.client_order_id for each in await desk.refusals.refusals(None, 10)] == ["k2"]


async def counted(dsn: str, query: str) -> Sequence[Any]:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch(query)
    await connection.close()
    return [tuple(row) for row in rows]


async def test_old_refusals_go_and_no_more_than_so_many_are_kept(databases: Databases) -> None:
    async with opened("postgres18", databases) as desk:
        assert desk.dsn is not None
        await run(
            desk.dsn,
            "INSERT INTO refusals (at, client, order_id, code, currency, amount_cents) "
            "SELECT now() - CASE WHEN n <= 3 THEN interval '31 days' ELSE interval '0' END, 'old-' || n, "
            "gen_random_uuid(), 'paused', 'EUR', 1 FROM generate_series(1, 100004) AS n",
        )
        await desk.store.note_refusals([refusal(1)])
        query = "SELECT count(*), min(client) FROM refusals WHERE number < 10"
        assert await counted(desk.dsn, query) == [(7, "old-3")]
        await desk.store.note_refusals([refusal(2)])
        await desk.store.note_refusals([refusal(3)])
        assert await counted(desk.dsn, "SELECT min(number), max(number) - min(number) FROM refusals") == [(7, 100_000)]
