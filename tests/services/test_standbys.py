"""The ledger where PostgreSQL waits for a standby that does not answer: nothing is said that a failover takes back.

`synchronous_standby_names` names a standby that is not there, so that every commit waits; once it names none, what
waited is done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from buydesk.backends.postgres import sessions
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.errors import LedgerUnavailable, OrderNotFound, OutcomeUnknown, Overloaded
from buydesk.orders.model import OrderLedger, Outcome, Placed, PricedOrder, Refused, Replayed
from tests.builders import priced_order, record, settings
from tests.databases import Databases

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

SECONDS = 5.0
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'buydesk'"


@pytest.fixture
async def dsn(databases: Databases) -> str:
    return await databases.new()


@pytest.fixture
async def server(dsn: str) -> AsyncIterator[Connection]:
    """A session of an operator's; it waits for no standby."""
    connection = await asyncpg.connect(dsn, server_settings={"synchronous_commit": "local"})
    yield connection
    await connection.close()


@pytest.fixture
async def ledger(dsn: str) -> AsyncIterator[PostgresLedger]:
    given: Any = {"lock_seconds_max": 0.2, "statement_seconds_max": 0.3, "remote_seconds_max": 0.4}
    ledger = PostgresLedger(dsn, settings(**given), livemode=False)
    yield ledger
    await ledger.close()


@contextlib.asynccontextmanager
async def standby_away(server: Connection) -> AsyncIterator[None]:
    """While entered, commits wait for a standby."""
    await server.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
    try:
        await _reload(server, "away")
        await _until_commits_wait(server)
        yield
    finally:
        await server.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await _reload(server, "")


async def _reload(server: Connection, names: str) -> None:
    await server.execute("SELECT pg_reload_conf()")
    while await server.fetchval("SELECT current_setting('synchronous_standby_names')") != names:
        await asyncio.sleep(0.005)


async def _until_commits_wait(server: Connection) -> None:
    """Those who wait are told of by the checkpointer, some time after the setting changed."""
    await server.execute("SET synchronous_commit = on")
    try:
        while True:
            await server.execute("SELECT pg_logical_emit_message(true, 'test', '')", timeout=0.1)
    except TimeoutError:
        await server.execute("SET synchronous_commit = local")


async def waiting_backend(server: Connection) -> int:
    """The one whose commit waits for the standby, once there is one."""
    while True:
        pid = await server.fetchval("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        if pid is not None:
            return int(pid)
        await asyncio.sleep(0.005)


async def place(ledger: OrderLedger, item: PricedOrder, seconds: float = SECONDS) -> Outcome:
    [outcome] = await ledger.place([item], seconds)
    return outcome


async def refused_look_ups(ledger: OrderLedger, item: PricedOrder) -> None:
    """Neither 200 nor 404 can be said of the order now."""
    assert item.order.client_order_id is not None
    for look_up in (
        ledger.order(item.order.id, None),
        ledger.order_by_key(item.order.client, item.order.client_order_id),
    ):
        with pytest.raises(LedgerUnavailable):
            await look_up


async def test_what_a_commit_that_waits_may_store_is_not_told_to_be_nowhere(
    ledger: PostgresLedger, server: Connection
) -> None:
    item = priced_order(key="k")
    async with standby_away(server):
        with pytest.raises(OutcomeUnknown, match="TimeoutError"):
            await place(ledger, item, 0.3)
        await refused_look_ups(ledger, item)
    assert (await ledger.order(item.order.id, None)).number == 1


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_what_only_the_primary_has_is_not_told_to_be_stored(
    ledger: PostgresLedger, server: Connection, how: str
) -> None:
    item = priced_order(key="k")
    async with standby_away(server):
        placing = asyncio.create_task(place(ledger, item))
        await server.execute(f"SELECT {how}($1)", await waiting_backend(server))
        with pytest.raises(OutcomeUnknown):
            await placing
        # It is there now, for whoever asks this server, and would be lost with it.
        assert await server.fetchval("SELECT count(*) FROM orders") == 1
        with pytest.raises(OutcomeUnknown, match="TimeoutError"):
            await place(ledger, item, 0.3)
        await refused_look_ups(ledger, item)
    outcome = await place(ledger, item)
    assert isinstance(outcome, Replayed)
    assert await ledger.order(item.order.id, None) == outcome.order


async def test_a_refusal_waits_for_the_standby_too(ledger: PostgresLedger, server: Connection) -> None:
    """A primary that was replaced must not refuse what the new one has stored."""
    refused = priced_order(price=LedgerUnavailable("no price"))
    async with standby_away(server):
        with pytest.raises(OutcomeUnknown, match="TimeoutError"):
            await place(ledger, refused, 0.3)
    assert isinstance(await place(ledger, refused), Refused)


async def test_a_cancelled_wait_of_a_repeat_or_a_look_up_proves_nothing(
    ledger: PostgresLedger, server: Connection
) -> None:
    item = priced_order(key="k")
    await place(ledger, item)
    async with standby_away(server):
        for asking in (place(ledger, item), ledger.order(item.order.id, None)):
            task = asyncio.create_task(asking)
            await server.execute("SELECT pg_cancel_backend($1)", await waiting_backend(server))
            with pytest.raises((OutcomeUnknown, LedgerUnavailable), match="Warned"):
                await task


@pytest.mark.parametrize("given_up_by", ["timeout", "cancellation"])
async def test_giving_up_cancels_no_wait_for_the_standby(
    ledger: PostgresLedger, server: Connection, given_up_by: str
) -> None:
    async with standby_away(server):
        placing = asyncio.create_task(place(ledger, priced_order(), 0.3 if given_up_by == "timeout" else SECONDS))
        pid = await waiting_backend(server)
        if given_up_by == "cancellation":
            placing.cancel()
        await asyncio.wait([placing])
        await asyncio.sleep(0.3)
        assert await waiting_backend(server) == pid
        assert await server.fetchval("SELECT count(*) FROM orders") == 0


async def test_the_check_asks_for_the_standby_and_recovers(ledger: PostgresLedger, server: Connection) -> None:
    await ledger.check()
    async with standby_away(server):
        with pytest.raises(LedgerUnavailable, match="TimeoutError"):
            await ledger.check()
    await ledger.check()


@pytest.mark.parametrize("what", ["checks", "look-ups"])
async def test_what_waits_for_the_standby_is_not_joined_by_more(
    ledger: PostgresLedger, server: Connection, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nobody may end such a wait, so each that is given up leaves a backend: they must not fill max_connections."""
    monkeypatch.setattr(sessions, "STANDBY_SECONDS_MAX", 0.3)
    item = priced_order(key="k")
    await place(ledger, item)
    ask: dict[str, Callable[[], Awaitable[object]]] = {
        "checks": ledger.check,
        "look-ups": lambda: ledger.order(item.order.id, None),
    }
    async with standby_away(server):
        for _ in range(4):
            with pytest.raises(LedgerUnavailable):
                await ask[what]()
        assert await server.fetchval(WAITING) == 1
        with pytest.raises(LedgerUnavailable, match="StandbyAway"):
            await ledger.check()
        with pytest.raises(LedgerUnavailable, match="StandbyAway"):
            await ledger.order(item.order.id, None)
    await ledger.check()
    assert (await ledger.order(item.order.id, None)).number == 1


async def test_orders_leave_one_backend_that_waits_for_the_standby(ledger: PostgresLedger, server: Connection) -> None:
    """It holds the locks of placing for so long."""
    async with standby_away(server):
        for item in (priced_order(), priced_order(), priced_order(price=LedgerUnavailable("no price"))):
            with pytest.raises((OutcomeUnknown, Overloaded)):
                await place(ledger, item, 0.5)
        assert await server.fetchval(WAITING) == 1


async def test_without_standbys_repeats_and_look_ups_write_nothing(ledger: PostgresLedger, server: Connection) -> None:
    item = priced_order(key="k")
    assert isinstance(await place(ledger, item), Placed)
    written = []
    for _ in range(5):
        before = await server.fetchval("SELECT pg_current_wal_insert_lsn()")
        assert isinstance(await place(ledger, item), Replayed)
        await ledger.order(item.order.id, None)
        await ledger.check()
        with pytest.raises(OrderNotFound):
            await ledger.order_by_key("anonymous", "another")
        written.append(await server.fetchval("SELECT pg_current_wal_insert_lsn()") - before)
    # PostgreSQL itself notes something now and then; what we wrote would be there each time.
    assert 0 in written


async def test_a_look_up_waits_for_what_is_being_stored(dsn: str, server: Connection) -> None:
    """A slow disk delays a commit as a standby does; here somebody else holds the row."""
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    item = priced_order()
    try:
        async with server.transaction():
            await server.execute("SELECT FROM exposure FOR UPDATE")
            placing = asyncio.create_task(place(ledger, item))
            while not await server.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"):
                await asyncio.sleep(0.005)
            looking = asyncio.create_task(ledger.order(item.order.id, None))
            while not await server.fetchval(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            ):
                await asyncio.sleep(0.005)
        assert isinstance(await placing, Placed)
        assert (await looking).id == item.order.id
    finally:
        await ledger.close()


async def test_a_price_is_not_told_to_be_kept_before_the_standby_has_it(
    ledger: PostgresLedger, server: Connection
) -> None:
    price = record()
    async with standby_away(server):
        keeping = asyncio.create_task(ledger.keep_price(price))
        await server.execute("SELECT pg_cancel_backend($1)", await waiting_backend(server))
        with pytest.raises(LedgerUnavailable):
            await keeping
        # It is there now, for whoever asks this server, and would be lost with it.
        assert await server.fetchval("SELECT count(*) FROM price_records") == 1
        with pytest.raises(LedgerUnavailable):
            await ledger.keep_price(price)
    await ledger.keep_price(price)
    assert await ledger.price_record(price.id) == price
