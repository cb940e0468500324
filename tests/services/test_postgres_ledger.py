"""The ledger against what may happen to a real PostgreSQL: what it says is certain is certain, and nothing is lost."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from asyncpg import ConnectionDoesNotExistError
from msgspec.structs import replace

from buydesk import limits
from buydesk.backends.postgres import ledger as postgres
from buydesk.backends.postgres import prices, storing
from buydesk.backends.postgres.clients import PostgresKeys
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.rows import place_arguments
from buydesk.backends.postgres.sessions import Session, open_session
from buydesk.backends.postgres.sql import QUERIES, REVISION
from buydesk.errors import LedgerUnavailable, OutcomeUnknown, Overloaded, PriceNotFound, PriceUnavailable, WrongMode
from buydesk.http import app
from buydesk.money import Currency
from buydesk.orders.model import NewOrder, Order, Outcome, PageFrom, PricedOrder, Refused, Replayed, new_order_id
from buydesk.orders.pricing import price_order
from buydesk.prices.signing import Signer
from buydesk.signing_keys import new_signing_key
from buydesk.times import utc_now
from tests.builders import new_order, order_quote, priced_order, quoted_order, record, settings, signed
from tests.databases import ANY_TIME, CAP_SATOSHI, COPY_ORDER, Databases
from tests.lines import Line, line_to_postgres

SECONDS = 5.0
END_THE_OTHERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
EVERY_PATH = [
    "place",
    "page",
    "order",
    "order_by_key",
    "exposure",
    "price_record",
    "keep_price",
    "place_by_quote",
    "check",
]


@pytest.fixture
async def own_dsn(databases: Databases) -> str:
    """A database that a test may spoil."""
    return await databases.new()


@pytest.fixture(scope="module")
async def shared_dsn(databases: Databases) -> str:
    return await databases.new()


@pytest.fixture
async def dsn(shared_dsn: str) -> str:
    """An empty ledger, with nobody left at it."""
    async with session(shared_dsn) as connection:
        await connection.execute(END_THE_OTHERS)
        await connection.execute(
            "SET session_replication_role = replica; TRUNCATE orders, closings, price_records;"
            "UPDATE exposure SET placed_satoshi = 0, closed_satoshi = 0, last_number = 0, last_closing = 0;"
            "UPDATE clients SET placed_satoshi = 0, closed_satoshi = 0, last_number = 0, last_closing = 0"
        )
    return shared_dsn


@contextlib.asynccontextmanager
async def ledger_at(dsn: str, *, livemode: bool = False, **given: Any) -> AsyncIterator[PostgresLedger]:
    ledger = PostgresLedger(dsn, settings(**given), livemode=livemode)
    try:
        yield ledger
    finally:
        await ledger.close()


@contextlib.asynccontextmanager
async def session(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def row_held(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """While entered, somebody else holds the exposure row: every batch waits."""
    async with session(dsn) as other, other.transaction():
        await other.execute("SELECT FROM exposure FOR UPDATE")
        yield other


async def waiting_backends(connection: "asyncpg.Connection[asyncpg.Record]") -> list[int]:
    """The backends that wait for a lock, once there are any."""
    while True:
        pids = await connection.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        if pids:
            return [row["pid"] for row in pids]
        await asyncio.sleep(0.005)


async def stored(dsn: str) -> list[int]:
    """The numbers of the orders there are; the exposure row must tell the same."""
    async with session(dsn) as connection:
        rows = await connection.fetch("SELECT number, satoshi FROM orders ORDER BY number")
        exposure = await connection.fetchrow("SELECT used_satoshi, last_number FROM exposure")
    assert exposure is not None
    assert exposure["used_satoshi"] == sum(row["satoshi"] for row in rows)
    assert exposure["last_number"] == len(rows)
    return [row["number"] for row in rows]


async def ask(ledger: PostgresLedger, path: str) -> object:
    match path:
        case "place":
            return await ledger.place([priced_order()], SECONDS)
        case "page":
            return await ledger.page(None, PageFrom(0), 10)
        case "order":
            return await ledger.order(new_order_id(), None)
        case "keep_price":
            await ledger.keep_price(record())
            return None
        case "place_by_quote":
            return await ledger.place([quoted_order(order_quote(record()))], SECONDS)
        case "price_record":
            return await ledger.price_record(new_order_id())
        case "exposure":
            return await ledger.exposure(None)
        case "order_by_key":
            return await ledger.order_by_key("anonymous", "k")
    await ledger.check()
    return None


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        outcome.problem.code if isinstance(outcome, Refused) else type(outcome).__name__.lower() for outcome in outcomes
    ]


def order_of(outcome: Outcome) -> Order:
    assert not isinstance(outcome, Refused)
    return outcome.order


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:secret@127.0.0.1:1/db",
        "postgresql:///db?host=/nonexistent",
        "postgresql://u:secret@h:port/db",
        "secret",
    ],
)
async def test_a_server_that_is_not_there_is_unavailable_on_every_path(dsn: str) -> None:
    async with ledger_at(dsn) as ledger:
        for path in EVERY_PATH:
            with pytest.raises(LedgerUnavailable) as raised:
                await ask(ledger, path)
            assert raised.value.retry_after_seconds == 1
            assert "secret" not in raised.value.detail


async def test_a_ledger_that_never_connected_closes() -> None:
    await PostgresLedger("postgresql:///db", settings(), livemode=False).close()


async def test_a_closed_ledger_is_unavailable(dsn: str) -> None:
    async with ledger_at(dsn) as ledger:
        await ledger.check()
    with pytest.raises(LedgerUnavailable):
        await ledger.exposure(None)


async def test_the_other_mode_s_database_is_refused_on_every_path(dsn: str) -> None:
    async with ledger_at(dsn, livemode=True) as ledger:
        for path in EVERY_PATH:
            with pytest.raises(WrongMode, match="holds sandbox orders: start with PRICE_FEED=sandbox"):
                await ask(ledger, path)
    assert await stored(dsn) == []


async def test_a_live_database_is_refused_to_the_sandbox(own_dsn: str) -> None:
    async with session(own_dsn) as connection:
        await connection.execute("UPDATE exposure SET livemode = true")
    async with ledger_at(own_dsn) as ledger:
        with pytest.raises(WrongMode, match="holds live orders"):
            await ledger.place([priced_order()], SECONDS)
    async with ledger_at(own_dsn, livemode=True) as ledger:
        [outcome] = await ledger.place([priced_order()], SECONDS)
        assert order_of(outcome).livemode
        assert (await ledger.order(order_of(outcome).id, None)).livemode


async def test_a_database_without_tables_says_how_to_get_them(own_dsn: str) -> None:
    async with session(own_dsn) as connection:
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    async with ledger_at(own_dsn) as ledger:
        for path in EVERY_PATH:
            with pytest.raises(LedgerUnavailable, match="run `buydesk migrate`"):
                await ask(ledger, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE alembic_version SET version_num = '0000'", f"at revision 0000, not {REVISION}: run `buydesk migrate`"),
        ("DELETE FROM alembic_version", f"at revision none, not {REVISION}: run `buydesk migrate`"),
        ("DROP TABLE alembic_version", "run `buydesk migrate`"),
        ("DELETE FROM exposure", "no exposure row: run `buydesk migrate`"),
    ],
)
async def test_a_database_that_is_not_migrated_to_the_end_is_not_ready(change: str, says: str, own_dsn: str) -> None:
    async with session(own_dsn) as connection:
        await connection.execute(change)
    async with ledger_at(own_dsn) as ledger:
        with pytest.raises(LedgerUnavailable, match=says):
            await ledger.check()


async def test_a_newer_database_is_ready(own_dsn: str) -> None:
    async with session(own_dsn) as connection:
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
    async with ledger_at(own_dsn) as ledger:
        await ledger.check()


async def test_a_database_without_the_function_refuses_the_batch_and_no_item_is_blamed(
    own_dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with session(own_dsn) as connection:
        await connection.execute("ALTER FUNCTION place_items RENAME TO place_items_of_another_version")
    async with ledger_at(own_dsn) as ledger:
        with pytest.raises(LedgerUnavailable, match="run `buydesk migrate`"):
            await ledger.place([priced_order(), priced_order()], SECONDS)
        monkeypatch.setattr(storing, "FAILURE_SHOWN_SECONDS", 0.0)
        with pytest.raises(LedgerUnavailable, match="run `buydesk migrate`"):  # however long ago that was
            await ledger.check()
    [logged] = caplog.messages
    assert logged.startswith("orders are refused: The database does not have the tables that this program needs")


async def test_checks_that_fail_take_a_bounded_number_of_connections(
    own_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may poll /readyz, as often as he likes."""
    monkeypatch.setattr(limits, "FAILURE_COUNTS_SECONDS", 1.0)
    opened = 0

    async def counted(*given: Any) -> Session:
        nonlocal opened
        opened += 1
        return await open_session(*given)

    monkeypatch.setattr(postgres, "open_session", counted)
    async with ledger_at(own_dsn) as ledger, session(own_dsn) as connection:
        await connection.execute("ALTER FUNCTION place_items RENAME TO elsewhere")
        for _ in range(50):
            with pytest.raises(LedgerUnavailable, match="run `buydesk migrate`"):
                await ledger.check()
        assert opened <= 2
        await connection.execute("ALTER FUNCTION elsewhere RENAME TO place_items")
        await asyncio.sleep(1.0)
        await ledger.check()


@pytest.mark.parametrize(
    ("hold", "says"),
    [
        ("SELECT FROM exposure FOR UPDATE", "Another session of PostgreSQL holds a lock that the ledger needs"),
        ("SELECT pg_advisory_xact_lock(31644362927074919)", "Another session of PostgreSQL holds a lock"),
        ("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE", "Another session of PostgreSQL holds a lock"),
        ("LOCK TABLE orders IN SHARE MODE", "Another session of PostgreSQL holds a lock"),  # as CREATE INDEX does
        ("LOCK TABLE price_records IN SHARE MODE", "Another session of PostgreSQL holds a lock"),
        ("LOCK TABLE exposure IN SHARE MODE", "Another session of PostgreSQL holds a lock"),
    ],
)
async def test_database_whose_locks_somebody_holds_is_not_ready_until_they_are_let_go(
    hold: str, says: str, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ledger_at(dsn, lock_seconds_max=0.05) as ledger, session(dsn) as other:
        await ledger.check()
        async with other.transaction():
            await other.execute(hold)
            await ledger.check()  # it was well a moment ago
            monkeypatch.setattr(storing, "STORING_SHOWN_SECONDS", 0.0)
            with pytest.raises(LedgerUnavailable, match=says):
                await ledger.check()
            monkeypatch.setattr(storing, "STORING_SHOWN_SECONDS", 60.0)
            with pytest.raises(Overloaded):
                await ledger.place([priced_order()], SECONDS)
            with pytest.raises(LedgerUnavailable, match=says):  # whatever was seen before the order
                await ledger.check()
        await ledger.check()


async def test_check_stores_nothing_and_asks_again_only_after_a_while(dsn: str) -> None:
    locks = "SELECT xmax FROM exposure"
    async with ledger_at(dsn) as ledger, session(dsn) as other:
        await ledger.check()
        seen = await other.fetchval(locks)
        await asyncio.gather(*(ledger.check() for _ in range(5)))
        assert await other.fetchval(locks) == seen
        assert (await ledger.exposure(None)).orders == 0


async def test_database_that_takes_no_order_at_all_is_not_ready(own_dsn: str) -> None:
    async with ledger_at(own_dsn) as ledger, session(own_dsn) as connection:
        assert codes(await ledger.place([priced_order(key="k")], SECONDS)) == ["placed"]
        await connection.execute("ALTER TABLE orders ADD CONSTRAINT never CHECK (number < 2)")
        refused = await ledger.place([priced_order()] * 2, SECONDS)
        assert codes(refused) == ["internal_error"] * 2
        for _ in range(2):
            with pytest.raises(LedgerUnavailable, match="Orders cannot be stored") as raised:
                await ledger.check()
            assert "never" in raised.value.server_said
            # That one is stored already says nothing about others.
            assert codes(await ledger.place([priced_order(key="k")], SECONDS)) == ["replayed"]
        await connection.execute("ALTER TABLE orders DROP CONSTRAINT never")
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]
        await ledger.check()


async def test_nothing_stored_between_two_batches_that_took_too_long_is_a_failure(own_dsn: str) -> None:
    slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(60); END$$"
    async with ledger_at(own_dsn, statement_seconds_max=0.1, lock_seconds_max=0.1) as ledger, session(own_dsn) as owner:
        await owner.execute(f"{slow}; CREATE TRIGGER slow BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION slow()")
        with pytest.raises(Overloaded):
            await ledger.place([priced_order()], SECONDS)
        await ledger.check()  # one may have been too much
        with pytest.raises(Overloaded):
            await ledger.place([priced_order()], SECONDS)
        with pytest.raises(LedgerUnavailable, match="Orders cannot be stored"):
            await ledger.check()
        await owner.execute("DROP FUNCTION slow CASCADE; ALTER TABLE orders ADD CONSTRAINT never CHECK (number < 0)")
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["internal_error"]
        async with row_held(own_dsn):
            with pytest.raises(Overloaded):
                await ledger.place([priced_order()], SECONDS)
        with pytest.raises(LedgerUnavailable) as raised:  # which being overloaded does not hide
            await ledger.check()
        assert "never" in raised.value.server_said


async def test_check_ends_before_whoever_asks_gives_up(own_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert postgres.CHECK_SECONDS_MAX < app.CHECK_SECONDS_MAX
    monkeypatch.setattr(postgres, "CHECK_SECONDS_MAX", 0.05)
    async with ledger_at(own_dsn) as ledger, row_held(own_dsn):
        with pytest.raises(LedgerUnavailable, match="TimeoutError"):
            await ledger.check()


async def test_check_waits_for_the_batch_that_is_under_way_and_takes_it_for_the_proof(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    fetch = Session.fetch

    async def noted(self: Session, query: str, *arguments: object, seconds: float) -> list[Any]:
        asked.append(query)
        return await fetch(self, query, *arguments, seconds=seconds)

    monkeypatch.setattr(Session, "fetch", noted)
    async with ledger_at(dsn, lock_seconds_max=5, statement_seconds_max=5) as ledger:
        async with row_held(dsn):
            batch = asyncio.create_task(ledger.place([priced_order()], SECONDS))
            while "place_items" not in asked:
                await asyncio.sleep(0.001)
            checking = asyncio.create_task(ledger.check())
            await asyncio.sleep(0.05)
            assert not checking.done()
        await checking
        assert codes(await batch) == ["placed"]
    assert "place_nothing" not in asked


async def test_that_orders_are_refused_and_stored_again_is_logged_once(
    own_dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    full = "RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'"
    async with ledger_at(own_dsn) as ledger, session(own_dsn) as connection:
        await connection.execute(
            f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {full}; END$$;
            CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse()
            """
        )
        for _ in range(2):
            with pytest.raises(LedgerUnavailable, match="DiskFullError"):
                await ledger.place([priced_order()], SECONDS)
            with pytest.raises(LedgerUnavailable, match="DiskFullError"):
                await ledger.check()
        monkeypatch.setattr(storing, "FAILURE_SHOWN_SECONDS", 0.0)
        await ledger.check()  # nobody has tried since, and it may be well
        monkeypatch.setattr(storing, "FAILURE_SHOWN_SECONDS", 60.0)
        await connection.execute("DROP FUNCTION refuse CASCADE")
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]
        await ledger.check()
        monkeypatch.setattr(storing, "FAILURE_SHOWN_SECONDS", 0.0)
        for _ in range(2):
            assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]
    refused = "orders are refused: PostgreSQL cannot be used (DiskFullError). The server said: No space left on device"
    assert caplog.messages == [refused, "orders are stored again"]


async def test_a_read_only_database_is_unavailable_for_orders_and_readable(own_dsn: str) -> None:
    async with ledger_at(own_dsn) as ledger:
        await ledger.place([priced_order(key="k")], SECONDS)
    async with session(own_dsn) as connection:
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with ledger_at(own_dsn) as ledger:
        with pytest.raises(LedgerUnavailable, match="ReadOnlySQLTransactionError"):
            await ledger.place([priced_order()], SECONDS)
        with pytest.raises(LedgerUnavailable, match="read-only"):
            await ledger.check()
        assert (await ledger.order_by_key("anonymous", "k")).number == 1
        # A session would outlast the fault (a standby that is promoted, another server behind the same name).
        async with session(own_dsn) as connection:
            await connection.execute("SET default_transaction_read_only = off")
            await connection.execute(f"ALTER DATABASE {name} RESET ALL")
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]


async def test_a_row_that_stays_locked_is_overload_and_nothing_is_stored(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=0.05) as ledger, row_held(dsn):
        with pytest.raises(Overloaded) as raised:
            await ledger.place([priced_order()], SECONDS)
    assert raised.value.retry_after_seconds == 1
    assert isinstance(raised.value.__cause__, asyncpg.LockNotAvailableError)
    assert await stored(dsn) == []


async def test_a_statement_that_takes_too_long_is_overload_and_nothing_is_stored(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=0.05, statement_seconds_max=0.05) as ledger, row_held(dsn):
        with pytest.raises(Overloaded) as raised:
            await ledger.place([priced_order()], SECONDS)
    assert isinstance(raised.value.__cause__, asyncpg.QueryCanceledError)
    assert await stored(dsn) == []


async def test_a_time_limit_below_a_millisecond_is_still_one(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=0.0001) as ledger, row_held(dsn):
        with pytest.raises(Overloaded):
            await ledger.place([priced_order()], SECONDS)


async def test_no_answer_in_time_leaves_the_outcome_unknown_and_the_ledger_working(dsn: str) -> None:
    item = priced_order()
    async with ledger_at(dsn) as ledger:
        await ledger.check()
        async with row_held(dsn):
            with pytest.raises(OutcomeUnknown, match="TimeoutError"):
                await ledger.place([item], 0.1)
        assert codes(await ledger.place([item], SECONDS))[0] in {"placed", "replayed"}
    assert await stored(dsn) == [1]


async def test_parts_of_a_batch_whose_time_is_up_are_not_sent(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [priced_order(100), poisonous("\x00"), priced_order(200)]
    now = 0.0
    monkeypatch.setattr("buydesk.backends.postgres.ledger.time", SimpleNamespace(monotonic=lambda: now))
    async with ledger_at(dsn) as ledger:
        place_one = ledger._place

        async def take_long(*arguments: Any) -> Sequence[Outcome]:
            nonlocal now
            try:
                return await place_one(*arguments)
            finally:
                now += SECONDS / 2

        monkeypatch.setattr(ledger, "_place", take_long)
        # The whole batch takes half of the time, its first item the other half.
        assert codes(await ledger.place(items, SECONDS)) == ["placed", "overloaded", "overloaded"]
    assert await stored(dsn) == [1]


async def test_a_backend_that_is_killed_in_mid_batch_leaves_the_outcome_unknown(dsn: str) -> None:
    items = [priced_order(100), priced_order(200)]
    async with ledger_at(dsn, lock_seconds_max=10, statement_seconds_max=10) as ledger:
        async with row_held(dsn) as other, session(dsn) as watcher:
            placing = asyncio.create_task(ledger.place(items, SECONDS))
            [pid] = await waiting_backends(watcher)
            await other.execute("SELECT pg_terminate_backend($1)", pid)
            with pytest.raises(OutcomeUnknown):
                await placing
        assert await stored(dsn) == []
        assert codes(await ledger.place(items, SECONDS)) == ["placed", "placed"]
    assert await stored(dsn) == [1, 2]


async def test_a_statement_that_an_operator_cancels_is_certainly_not_stored(dsn: str) -> None:
    async with (
        ledger_at(dsn, lock_seconds_max=10, statement_seconds_max=10) as ledger,
        row_held(dsn) as other,
        session(dsn) as watcher,
    ):
        placing = asyncio.create_task(ledger.place([priced_order()], SECONDS))
        [pid] = await waiting_backends(watcher)
        await other.execute("SELECT pg_cancel_backend($1)", pid)
        with pytest.raises(Overloaded):
            await placing
    assert await stored(dsn) == []


async def test_a_batch_waits_for_the_one_before_it_but_not_for_long(dsn: str) -> None:
    limits: Any = {"lock_seconds_max": 10, "statement_seconds_max": 10, "connect_seconds_max": 0.2}
    async with ledger_at(dsn, **limits) as ledger, session(dsn) as watcher:
        await ledger.place([priced_order()], SECONDS)  # connected
        async with row_held(dsn):
            first = asyncio.create_task(ledger.place([priced_order()], SECONDS))
            await waiting_backends(watcher)
            with pytest.raises(LedgerUnavailable, match="TimeoutError"):
                await ledger.place([priced_order()], SECONDS)
        assert codes(await first) == ["placed"]
    assert await stored(dsn) == [1, 2]


async def test_cancelling_an_order_in_flight_hands_no_broken_connection_back(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=10, statement_seconds_max=10, database_connections_max=5) as ledger:
        async with row_held(dsn), session(dsn) as watcher:
            for _ in range(4):  # more than there are connections
                placing = asyncio.create_task(ledger.place([priced_order()], SECONDS))
                await waiting_backends(watcher)
                placing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await placing
        outcomes = await asyncio.gather(*(ledger.place([priced_order()], SECONDS) for _ in range(4)))
        assert [codes(each) for each in outcomes] == [["placed"]] * 4
    numbers = await stored(dsn)
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.fixture
async def line(dsn: str, tmp_path: Path) -> AsyncIterator[tuple[str, Line]]:
    async with line_to_postgres(dsn, tmp_path) as (through, line):
        yield through, line


@contextlib.asynccontextmanager
async def warm_ledger(through: str, **given: Any) -> AsyncIterator[PostgresLedger]:
    """A ledger whose two connections have made all that they ask for before their statements."""
    async with ledger_at(through, **given) as ledger:
        assert codes(await ledger.place([priced_order(key="warm")] * 2, SECONDS)) == ["placed", "replayed"]
        await ledger.exposure(None)
        yield ledger


async def test_a_connection_cut_before_the_batch_got_through(dsn: str, line: tuple[str, Line]) -> None:
    through, wire = line
    items = [priced_order(100, "a"), priced_order(200)]
    async with warm_ledger(through) as ledger:
        wire.fault = "before"
        with pytest.raises(OutcomeUnknown, match="ConnectionDoesNotExistError"):
            await ledger.place(items, SECONDS)
        assert await stored(dsn) == [1]
        assert codes(await ledger.place(items, SECONDS)) == ["placed", "placed"]
    assert await stored(dsn) == [1, 2, 3]


async def test_a_connection_cut_after_the_batch_got_through(dsn: str, line: tuple[str, Line]) -> None:
    through, wire = line
    items = [priced_order(100, "a"), priced_order(200)]
    async with warm_ledger(through) as ledger:
        wire.fault = "after"
        with pytest.raises(OutcomeUnknown):
            await ledger.place(items, SECONDS)
        assert await stored(dsn) == [1, 2, 3]
        again = await ledger.place(items, SECONDS)
        assert [type(outcome) for outcome in again] == [Replayed, Replayed]
        assert [order_of(outcome).id for outcome in again] == [item.order.id for item in items]
    assert await stored(dsn) == [1, 2, 3]


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_a_connection_cut_while_repeats_are_read_leaves_the_outcome_unknown(
    dsn: str, line: tuple[str, Line], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is committed by then; only the order that it repeats is still to be read."""
    through, wire = line
    items = [priced_order(key="warm"), priced_order(100, "new")]
    async with warm_ledger(through) as ledger:
        repeated = ledger._repeated

        async def cut_then_read(*arguments: Any) -> dict[int, Order]:
            wire.fault = fault
            return await repeated(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "_repeated", cut_then_read)
            with pytest.raises(OutcomeUnknown):
                await ledger.place(items, SECONDS)
        assert codes(await ledger.place(items, SECONDS)) == ["replayed", "replayed"]
    assert await stored(dsn) == [1, 2]


async def test_a_driver_that_lost_its_footing_leaves_the_outcome_unknown_and_its_connection_is_not_used_again(
    dsn: str, line: tuple[str, Line]
) -> None:
    through, wire = line
    item = priced_order(100)
    async with warm_ledger(through) as ledger:
        # A row of 99 columns, and ready for the next query.
        wire.instead = b"D\x00\x00\x00\x06\x00\x63Z\x00\x00\x00\x05I"
        with pytest.raises(OutcomeUnknown) as raised:
            await ledger.place([item], SECONDS)
        assert isinstance(raised.value.__cause__, asyncpg.InternalClientError)
        calls = wire.calls
        assert codes(await ledger.place([item], SECONDS)) == ["replayed"]
        assert (await ledger.exposure(None)).orders == 2
        assert wire.calls == calls + 2  # the connection beside it was not trusted either
        wire.instead = b"D\x00\x00\x00\x06\x00\x63Z\x00\x00\x00\x05I"
        with pytest.raises(LedgerUnavailable, match="ProtocolError"):
            await ledger.exposure(None)
        assert (await ledger.exposure(None)).orders == 2
        assert wire.calls == calls + 3


@pytest.mark.parametrize("error", [asyncpg.InternalClientError("cannot switch"), ConnectionDoesNotExistError("gone")])
async def test_read_is_made_again_whatever_the_driver_says_of_a_connection_that_died(
    dsn: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It depends on how much of the end the driver has seen."""
    async with ledger_at(dsn) as ledger:
        await ledger.check()
        [kept] = ledger._idle
        fetch = asyncpg.Connection.fetch

        async def fail_once(connection: Any, *arguments: Any) -> Any:
            if connection is kept._connection:
                raise error
            return await fetch(connection, *arguments)

        monkeypatch.setattr(asyncpg.Connection, "fetch", fail_once)
        assert (await ledger.exposure(None)).orders == 0
        assert kept.is_closed


async def test_a_kept_connection_that_died_does_not_fail_the_next_read(dsn: str, line: tuple[str, Line]) -> None:
    through, wire = line
    async with warm_ledger(through) as ledger:
        async with session(dsn) as connection:
            await connection.execute(END_THE_OTHERS)
        assert (await ledger.exposure(None)).orders == 1
        wire.fault = "before"
        assert (await ledger.exposure(None)).orders == 1
        wire.fault = "after"
        assert len((await ledger.page(None, PageFrom(0), 10)).orders) == 1
        wire.cut_all()
        wire.refusing = True
        with pytest.raises(LedgerUnavailable):
            await ledger.exposure(None)
        with pytest.raises(LedgerUnavailable):
            await ledger.place([priced_order()], SECONDS)
        wire.refusing = False
        assert (await ledger.exposure(None)).orders == 1


def poisonous(key: str) -> PricedOrder:
    return priced_order(700, order=replace(new_order(700), client_order_id=key))


@pytest.mark.parametrize("key", ["\x00", "\ud800", "x" * 256], ids=["nul", "surrogate", "long"])
async def test_an_item_that_postgresql_refuses_hurts_only_itself(
    dsn: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    price = record(1000 * 10**8)
    items = [priced_order(cents, f"k{cents}", price=price) for cents in range(100, 120)]
    items[7] = poisonous(key)
    items[13] = poisonous(key)
    items[15] = priced_order(108, "k108", price=price)
    async with ledger_at(dsn) as ledger:
        with caplog.at_level(logging.ERROR):
            outcomes = await ledger.place(items, SECONDS)
        assert [codes([outcome])[0] for outcome in outcomes] == [
            {7: "internal_error", 13: "internal_error", 15: "replayed"}.get(place, "placed") for place in range(20)
        ]
        assert order_of(outcomes[15]) == order_of(outcomes[8])
        assert [str(items[place].order.id) in caplog.text for place in (6, 7, 13)] == [False, True, True]
        assert codes(await ledger.place([poisonous(key)], SECONDS)) == ["internal_error"]
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]
    assert await stored(dsn) == list(range(1, 19))


async def test_items_that_come_apart_from_a_poisonous_one_are_judged_in_list_order(dsn: str) -> None:
    price = record(1000 * 10**8)
    whole = 100 * 1000 * 100
    items = [
        priced_order(whole - 300, price=price),
        priced_order(301, price=price),
        priced_order(200, price=price),
        poisonous("\x00"),
        priced_order(101, price=price),
        priced_order(100, price=price),
        priced_order(1, price=price),
    ]
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place(items, SECONDS)) == [
            "placed", "exposure_cap_exceeded", "placed", "internal_error", "exposure_cap_exceeded", "placed",
            "exposure_cap_exceeded",
        ]  # fmt: skip
        assert (await ledger.exposure(None)).used_satoshi == CAP_SATOSHI
    assert await stored(dsn) == [1, 2, 3]


async def test_what_fails_for_certain_after_a_part_was_stored_is_said_of_the_other_part_only(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [priced_order(100), poisonous("\x00"), priced_order(200), priced_order(300)]
    async with ledger_at(dsn, lock_seconds_max=0.05) as ledger:
        place_one = ledger._place

        async def block_the_second_half(*arguments: Any) -> Sequence[Outcome]:
            if arguments[1] == items[2:]:
                async with row_held(dsn):
                    return await place_one(*arguments)
            return await place_one(*arguments)

        monkeypatch.setattr(ledger, "_place", block_the_second_half)
        outcomes = await ledger.place(items, SECONDS)
        assert codes(outcomes) == ["placed", "internal_error", "overloaded", "overloaded"]
    assert await stored(dsn) == [1]


async def test_a_cut_after_a_part_was_stored_makes_the_whole_batch_unknown(
    dsn: str, line: tuple[str, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    through, wire = line
    items = [priced_order(100), poisonous("\x00"), priced_order(200), priced_order(300)]
    async with warm_ledger(through) as ledger:
        place_one = ledger._place

        async def cut_the_second_half(*arguments: Any) -> Sequence[Outcome]:
            if arguments[1] == items[2:]:
                wire.fault = "after"
            return await place_one(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ledger, "_place", cut_the_second_half)
            with pytest.raises(OutcomeUnknown):
                await ledger.place(items, SECONDS)
        assert codes(await ledger.place(items, SECONDS)) == ["replayed", "internal_error", "replayed", "replayed"]
    assert await stored(dsn) == [1, 2, 3, 4]


async def test_numbers_have_no_gaps_after_refused_and_failed_batches(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=0.05) as ledger:
        refused = [
            priced_order(99_999_999_999),
            priced_order(100, price=record(age=100)),
            priced_order(100, seconds=-1),
        ]
        for _ in range(3):
            await ledger.place([priced_order(100)], SECONDS)
            assert "placed" not in codes(await ledger.place(refused, SECONDS))
            await ledger.place([poisonous("\x00")], SECONDS)
            async with row_held(dsn):
                with pytest.raises(Overloaded):
                    await ledger.place([priced_order(100)], SECONDS)
    assert await stored(dsn) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE exposure SET placed_satoshi = cap_satoshi + 1",
        "UPDATE exposure SET cap_satoshi = used_satoshi - 1",
        "UPDATE exposure SET placed_satoshi = -1",
        "UPDATE exposure SET placed_satoshi = placed_satoshi + cap_satoshi",
        "UPDATE exposure SET closed_satoshi = placed_satoshi + 1",
        "UPDATE exposure SET closed_satoshi = -1",
        "UPDATE clients SET cap_satoshi = used_satoshi - 1 WHERE name = 'anonymous'",
        "UPDATE clients SET closed_satoshi = placed_satoshi + 1 WHERE name = 'anonymous'",
        "INSERT INTO exposure (livemode, cap_satoshi) VALUES (false, 1)",
        "INSERT INTO exposure (singleton, livemode, cap_satoshi) VALUES (false, false, 1)",
    ],
)
async def test_the_cap_holds_against_anybody_who_writes_sql(dsn: str, change: str) -> None:
    async with ledger_at(dsn) as ledger, session(dsn) as connection:
        await ledger.place([priced_order()], SECONDS)
        with pytest.raises((asyncpg.CheckViolationError, asyncpg.UniqueViolationError)):
            await connection.execute(change)
        assert (await ledger.exposure(None)).cap_satoshi == CAP_SATOSHI


@pytest.mark.parametrize(("connections", "short", "large"), [(5, 1, 1), (9, 4, 2)])
async def test_with_all_readers_places_taken_orders_checks_and_keys_go_on_and_a_further_read_is_overloaded(
    dsn: str, connections: int, short: int, large: int
) -> None:
    limits: Any = {"statement_seconds_max": 60, "remote_seconds_max": 60, "read_wait_seconds_max": 60}
    async with (
        ledger_at(dsn, database_connections_max=connections, reads_waiting_max=3, **limits) as ledger,
        session(dsn) as other,
        session(dsn) as watcher,
    ):
        await ledger.place([priced_order(100, "k")], SECONDS)
        async with other.transaction():
            # Whoever reads an order or a price record waits; orders whose price was refused need neither.
            await other.execute("LOCK TABLE price_records IN ACCESS EXCLUSIVE MODE")
            prices = [asyncio.create_task(ledger.price_record(new_order_id())) for _ in range(short + 3)]
            while len(await waiting_backends(watcher)) < short:
                pass
            for read in (
                ledger.price_record(new_order_id()),
                ledger.page(None, PageFrom(0), 100),
                ledger.exposure(None),
            ):
                with pytest.raises(Overloaded, match="3 reads are waiting already"):
                    await read
            assert len((await ledger.page(None, PageFrom(0), 101)).orders) == 1
            await asyncio.gather(*(ledger.check() for _ in range(50)))
            assert await PostgresKeys(ledger).key("0" * 10) is None
            refusal = PriceUnavailable("no price")
            assert codes(await ledger.place([priced_order(price=refusal)], SECONDS)) == ["price_unavailable"]
        found = await asyncio.gather(*prices, return_exceptions=True)
        assert {type(each) for each in found} == {PriceNotFound}

        async with other.transaction():
            await other.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            pages = [asyncio.create_task(ledger.page(None, PageFrom(0), 1000)) for _ in range(large + 3)]
            while len(await waiting_backends(watcher)) < large:
                pass
            with pytest.raises(Overloaded, match="3 reads are waiting already"):
                await ledger.page(None, PageFrom(0), 1000)
            assert (await ledger.exposure(None)).orders == 1
            await ledger.check()  # an order was stored a moment ago
        assert [len((await page).orders) for page in pages] == [1] * (large + 3)
        assert (await ledger.order_by_key("anonymous", "k")).number == 1


async def test_a_read_that_gets_no_answer_in_time_ends_the_connections_that_idle_beside_it(dsn: str) -> None:
    mine = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'buydesk'"
    limits: Any = {"statement_seconds_max": 60, "remote_seconds_max": 0.2}
    async with ledger_at(dsn, **limits) as ledger, session(dsn) as other, session(dsn) as watcher:
        await asyncio.gather(ledger.check(), ledger.exposure(None))
        before = {row["pid"] for row in await watcher.fetch(mine)}
        assert len(before) == 2
        async with other.transaction():
            await other.execute("LOCK TABLE price_records IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(LedgerUnavailable, match="TimeoutError"):
                await ledger.price_record(new_order_id())
        await ledger.check()
        while before & (after := {row["pid"] for row in await watcher.fetch(mine)}):
            await asyncio.sleep(0.005)
        assert len(after) == 1


async def test_a_price_that_was_used_is_stored_once_as_it_was(dsn: str) -> None:
    price = record(EUR=4119191 * 10**6)
    async with ledger_at(dsn) as ledger, session(dsn) as connection:
        for _ in range(3):
            await ledger.place([priced_order(price=price), priced_order(price=price)], SECONDS)
        assert await connection.fetchval("SELECT count(*) FROM price_records") == 1
        assert await ledger.price_record(price.id) == price


async def test_a_driver_that_cannot_decode_is_not_a_refusal(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that fails after the batch was sent: the batch may be stored."""
    item = priced_order()
    async with ledger_at(dsn) as ledger:
        fetch = asyncpg.Connection.fetch

        async def fetch_then_fail(self: Any, query: str, *arguments: Any, **named: Any) -> Any:
            rows = await fetch(self, query, *arguments, **named)
            if "place_items" in query:
                raise asyncpg.InternalClientError("lost its footing")
            return rows

        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", fetch_then_fail)
            with pytest.raises(OutcomeUnknown):
                await ledger.place([item], SECONDS)
        assert codes(await ledger.place([item], SECONDS)) == ["replayed"]


async def test_repeats_are_answered_while_somebody_else_holds_the_row(dsn: str) -> None:
    items = [priced_order(100, "a"), priced_order(200), priced_order(300, "c")]
    async with ledger_at(dsn, lock_seconds_max=0.05) as ledger:
        placed = await ledger.place(items, SECONDS)
        async with row_held(dsn):
            expected = [Replayed(order_of(outcome)) for outcome in placed]
            assert await ledger.place(items, SECONDS) == expected
            assert await ledger.place([items[2], items[2], items[1]], SECONDS) == [
                expected[2],
                expected[2],
                expected[1],
            ]
            with pytest.raises(Overloaded):
                await ledger.place([*items, priced_order()], SECONDS)
    assert await stored(dsn) == [1, 2, 3]


async def test_repeats_write_nothing(dsn: str) -> None:
    items = [priced_order(100, "a"), priced_order(200)]
    async with session(dsn) as connection:
        for kind, is_written in (("placed", True), ("repeat", False)):
            async with connection.transaction():
                [row] = await connection.fetch(QUERIES["place_items"], *place_arguments(items, ANY_TIME))
                assert (row["outcomes"], row["numbers"]) == ([kind] * 2, [1, 2])
                has_written = await connection.fetchval("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
                assert has_written == is_written


@pytest.mark.parametrize("version", [16, 18])
async def test_what_is_committed_between_the_look_up_and_the_lock_is_seen(databases: Databases, version: int) -> None:
    dsn = await databases.new(version)
    rival = [priced_order(100, "a"), priced_order(200, "b")]
    mine = [priced_order(300, "new"), priced_order(100, "a"), priced_order(999, "b"), rival[1]]
    async with (
        ledger_at(dsn, lock_seconds_max=10, statement_seconds_max=10) as ledger,
        session(dsn) as other,
        session(dsn) as watcher,
    ):
        async with other.transaction():
            await other.fetch(QUERIES["place_items"], *place_arguments(rival, ANY_TIME))
            placing = asyncio.create_task(ledger.place(mine, SECONDS))
            await waiting_backends(watcher)
        outcomes = await placing
        assert codes(outcomes) == ["placed", "replayed", "idempotency_key_reused", "replayed"]
        assert [order_of(outcomes[place]).number for place in (0, 1, 3)] == [3, 1, 2]

        async with other.transaction():
            await other.fetch(QUERIES["place_items"], *place_arguments([priced_order(400, "c")], ANY_TIME))
            placing = asyncio.create_task(ledger.place([priced_order(400, "c")], SECONDS))
            await waiting_backends(watcher)
        assert codes(await placing) == ["replayed"]
    assert await stored(dsn) == [1, 2, 3, 4]


async def test_what_is_rolled_back_between_the_look_up_and_the_lock_leaves_no_trace(dsn: str) -> None:
    async with ledger_at(dsn, lock_seconds_max=10, statement_seconds_max=10) as ledger, session(dsn) as other:
        undone = other.transaction()
        await undone.start()
        await other.fetch(QUERIES["place_items"], *place_arguments([priced_order(100, "a")], ANY_TIME))
        placing = asyncio.create_task(ledger.place([priced_order(200, "a")], SECONDS))
        async with session(dsn) as watcher:
            await waiting_backends(watcher)
        await undone.rollback()
        assert codes(await placing) == ["placed"]
    assert await stored(dsn) == [1]


async def test_another_client_s_stored_key_is_no_repeat(dsn: str) -> None:
    mine = priced_order(100, "a")
    theirs = price_order(NewOrder(new_order_id(), "other", "a", Currency.EUR, 100), mine.price, mine.deadline)
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place([mine], SECONDS)) == ["placed"]
        assert codes(await ledger.place([theirs], SECONDS)) == ["placed"]
        assert codes(await ledger.place([theirs, mine], SECONDS)) == ["replayed", "replayed"]
    assert await stored(dsn) == [1, 2]


@pytest.mark.parametrize("version", [16, 18])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("UPDATE orders SET price_id = gen_random_uuid()", asyncpg.RestrictViolationError),
        (COPY_ORDER.format(price_id="gen_random_uuid()"), asyncpg.ForeignKeyViolationError),
        ("DELETE FROM price_records", asyncpg.RestrictViolationError),
        ("UPDATE price_records SET document = document || ' '", asyncpg.RestrictViolationError),
        ("TRUNCATE price_records", asyncpg.RestrictViolationError),
    ],
)
async def test_no_order_is_without_its_price_record_whoever_writes_sql(
    databases: Databases, version: int, change: str, error: type[Exception]
) -> None:
    dsn = await databases.new(version)
    item = priced_order()
    async with ledger_at(dsn) as ledger, session(dsn) as connection:
        await ledger.place([item], SECONDS)
        with pytest.raises(error):
            await connection.execute(change)
        assert await ledger.price_record(order_of((await ledger.place([item], SECONDS))[0]).price_id) == item.price


@pytest.mark.parametrize("ahead_seconds", [-3600.0, -13.1, 11.0, 3600.0])
async def test_a_ledger_whose_clock_differs_from_ours_stores_nothing_and_answers_repeats(
    dsn: str, monkeypatch: pytest.MonkeyPatch, ahead_seconds: float
) -> None:
    stored_before = priced_order(100, "a")
    async with ledger_at(dsn) as ledger:
        await ledger.place([stored_before], SECONDS)
        monkeypatch.setattr(
            "buydesk.backends.postgres.ledger.utc_now", lambda: utc_now() + timedelta(seconds=ahead_seconds)
        )
        items = [stored_before, priced_order(200), priced_order(300, price=PriceUnavailable("none"))]
        outcomes = await ledger.place(items, SECONDS)
    assert codes(outcomes) == ["replayed", "clock_skewed", "clock_skewed"]
    assert isinstance(outcomes[1], Refused)
    assert "The clocks differ: at the ledger it is 20" in outcomes[1].problem.detail
    assert await stored(dsn) == [1]


@pytest.mark.parametrize("ahead_seconds", [-11.5, 9.5])
async def test_clocks_may_differ_as_far_as_is_allowed(
    dsn: str, monkeypatch: pytest.MonkeyPatch, ahead_seconds: float
) -> None:
    monkeypatch.setattr(
        "buydesk.backends.postgres.ledger.utc_now", lambda: utc_now() + timedelta(seconds=ahead_seconds)
    )
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place([priced_order()], SECONDS)) == ["placed"]


async def test_copy_that_was_shortened_ends_for_its_own_orders_and_for_no_others(dsn: str) -> None:
    price = record()
    shortened = replace(price, expires_at=utc_now() + timedelta(seconds=0.3))
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place([priced_order(100, price=shortened)], SECONDS)) == ["placed"]
        await asyncio.sleep(0.35)
        both = [priced_order(200, price=shortened), priced_order(300, price=price)]
        assert codes(await ledger.place(both, SECONDS)) == ["price_stale", "placed"]
        assert await ledger.price_record(price.id) == price
    assert await stored(dsn) == [1, 2]


async def test_another_document_of_a_stored_record_is_refused(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever may place orders could otherwise leave some that nobody can prove."""
    price = record()
    other = signed(replace(record(), id=price.id))
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place([priced_order(100, price=price)], SECONDS)) == ["placed"]
        assert codes(await ledger.place([priced_order(200, price=other)], SECONDS)) == ["internal_error"]
        assert "a price record is stored with another document" in caplog.text
        assert codes(await ledger.place([priced_order(300, price=price)], SECONDS)) == ["placed"]
        assert await ledger.price_record(price.id) == price
    assert await stored(dsn) == [1, 2]


async def test_record_that_is_not_signed_is_not_stored(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async with ledger_at(dsn) as ledger:
        unsigned = replace(record(), signature=None)
        assert codes(await ledger.place([priced_order(100, price=unsigned)], SECONDS)) == ["internal_error"]
    assert "price_records_signed" in caplog.text
    assert await stored(dsn) == []


@pytest.mark.parametrize("satoshi", [0, -1])
async def test_what_is_answered_as_placed_is_stored(dsn: str, caplog: pytest.LogCaptureFixture, satoshi: int) -> None:
    """No item of db_proxy's has such an amount; whoever calls the function by its account could bring one."""
    item = replace(priced_order(), satoshi=satoshi)
    async with ledger_at(dsn) as ledger:
        assert codes(await ledger.place([item], SECONDS)) == ["internal_error"]
    assert "orders_satoshi_check" in caplog.text
    assert await stored(dsn) == []


async def test_a_session_that_was_opened_read_only_is_not_kept(own_dsn: str) -> None:
    database = own_dsn.rpartition("@/")[2].partition("?")[0]
    async with session(own_dsn) as other, ledger_at(own_dsn) as ledger:
        await other.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        for _ in range(2):
            with pytest.raises(LedgerUnavailable, match="read-only now"):
                await ledger.check()
        await other.execute("SET default_transaction_read_only = off")
        await other.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        await ledger.check()


async def test_record_that_is_kept_is_one_of_a_known_key_and_has_one_document(dsn: str) -> None:
    price = record()
    stranger = Signer(new_signing_key()).sign(record())
    other = signed(replace(record(), id=price.id))
    async with ledger_at(dsn) as ledger:
        await ledger.keep_price(price)
        for wrong in (stranger, other, replace(record(), signature=None)):
            with pytest.raises(LedgerUnavailable):
                await ledger.keep_price(wrong)
        with pytest.raises(PriceNotFound):
            await ledger.price_record(stranger.id)
        assert await ledger.price_record(price.id) == price


async def test_quotes_at_more_prices_than_are_remembered_are_all_proven(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices, "_RECORDS_KNOWN_MAX", 2)
    async with ledger_at(dsn) as ledger:
        records = [record() for _ in range(6)]
        for price in records:
            await ledger.keep_price(price)
        items = [quoted_order(order_quote(price)) for price in records]
        assert codes(await ledger.place(items, SECONDS)) == ["placed"] * 6
        again = [quoted_order(order_quote(price)) for price in records[4:]]
        assert codes(await ledger.place(again, SECONDS)) == ["placed"] * 2


async def test_batch_by_quotes_that_fails_is_placed_but_for_what_it_fails_for(dsn: str) -> None:
    """What is wrong with one order, which no check before saw, is no fault of the quotes beside it."""
    price = record()
    async with ledger_at(dsn) as ledger:
        await ledger.keep_price(price)
        good, plain = quoted_order(order_quote(price)), priced_order(100, price=price)
        wrong = replace(plain, satoshi=0)
        assert codes(await ledger.place([good, wrong, good], SECONDS)) == ["placed", "internal_error", "replayed"]
