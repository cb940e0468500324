"""Migrations: once, whoever starts first; an existing database keeps what it is; what goes wrong is one line."""

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import asyncpg
import msgspec
import pytest
from alembic import command
from msgspec.structs import replace

from buydesk.backends.postgres import migrate as migrations
from buydesk.backends.postgres.accounts import TABLES
from buydesk.backends.postgres.anchors import PostgresAnchors
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.life import PostgresLife
from buydesk.backends.postgres.migrate import migrate
from buydesk.backends.postgres.rows import place_arguments
from buydesk.backends.postgres.sql import REVISION
from buydesk.errors import CannotStart
from buydesk.http.orders import created
from buydesk.money import Currency
from buydesk.orders.life import Closing
from buydesk.orders.model import Order, PageAfter, PageBefore, PageFrom, Placed, PricedOrder, Refused, Replayed
from buydesk.orders.representations import PlacedDocument1
from buydesk.prices.anchors import Anchor
from buydesk.times import utc_now
from tests.builders import new_order, priced_order, record, settings
from tests.conftest import PostgresServers
from tests.databases import ANY_TIME, CAP_SATOSHI, DB_PROXY, as_db_proxy
from tests.recount import assert_adds_up

_names = itertools.count()

# How a program of the versions before 0008 places a batch, one of those before 0011, and one of those before 0003.
PLACE_BEFORE_8 = """
    SELECT outcomes, numbers, used_then, moment, cap, is_live FROM place_batch(
        $1::text::uuid[], $2, $3, $4::text::text[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
        ARRAY(SELECT to_timestamp(deadline) FROM unnest($8::text::float8[]) AS deadline),
        $9::text::int[], $10::text::int[], $11::text::int[], $12, $13, $14, $15, $16,
        to_timestamp($17::float8), to_timestamp($18::float8)
    )
"""
PLACE_BEFORE_11 = """
    SELECT outcomes, numbers, client_numbers, used_then, limits_then, moment, is_live FROM place_orders(
        $1::text::uuid[], $2::text::int[], $3, $4::text::text[], $5::text::bigint[], $6::text::bigint[],
        $7::text::bigint[], ARRAY(SELECT to_timestamp(deadline) FROM unnest($8::text::float8[]) AS deadline),
        $9::text::float8[], $10::text::smallint[], $11, $12, $13::text::int[], $14::text::int[], $15::text::int[],
        $16, $17, $18, $19, $20, to_timestamp($21::float8), to_timestamp($22::float8)
    )
"""
PLACE_BEFORE_3 = """
    SELECT outcomes, numbers FROM place_orders(
        $1::text::uuid[], $2, $3, $4::text::text[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
        ARRAY(SELECT to_timestamp(deadline) FROM unnest($8::text::float8[]) AS deadline),
        $9::text::int[], $10::text::int[], $11::text::int[], $12, $13, $14, $15, $16
    )
"""


def arguments_before_8(items: Sequence[PricedOrder]) -> tuple[Any, ...]:
    """The arguments of place_batch, by those of today."""
    ids, _, *today = place_arguments(items, ANY_TIME)
    keys, currencies, cents, rates, satoshis, deadlines, _, _, _, _, *slots = today[:13]
    clients = [item.order.client for item in items]
    return ids, clients, keys, currencies, cents, rates, satoshis, deadlines, *slots, *today[14:18], 1, *ANY_TIME


async def migrate_until(revision: str, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a database of a version before."""
    upgrade = command.upgrade
    keys = () if revision < "0004" else settings().accepted_price_keys
    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", lambda config, _, sql: upgrade(config, f"base:{revision}", sql=sql))
        await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI, price_keys=keys)


@pytest.fixture
async def dsn(postgres_dsn: str) -> str:
    """A new, empty database of either version."""
    name = f"migrated_{next(_names)}"
    await run(postgres_dsn, f"CREATE DATABASE {name}")
    return postgres_dsn.replace("/postgres?", f"/{name}?")


async def run(dsn: str, statement: str, *arguments: Any) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments)
        return rows
    finally:
        await connection.close()


# What a schema is: columns, constraints, indexes, triggers, functions and who may call them, in PostgreSQL's own words.
SCHEMA = """
    WITH tables AS (
        SELECT oid, relname::text AS name, reloptions::text FROM pg_class
        WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'
    )
    SELECT name || ' ' || coalesce(reloptions, '') AS line FROM tables
    UNION ALL SELECT format('%s.%s: %s %s %s %s', t.name, a.attname, format_type(a.atttypid, a.atttypmod),
                            CASE WHEN a.attnotnull THEN 'NOT NULL' END, a.attcollation::regcollation,
                            a.attgenerated::text || pg_get_expr(d.adbin, d.adrelid))
    FROM tables t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
    UNION ALL SELECT format('%s.%s: %s', t.name, c.conname, pg_get_constraintdef(c.oid))
    FROM tables t JOIN pg_constraint c ON c.conrelid = t.oid
    UNION ALL SELECT pg_get_indexdef(i.indexrelid) FROM tables t JOIN pg_index i ON i.indrelid = t.oid
    UNION ALL SELECT pg_get_triggerdef(g.oid)
    FROM tables t JOIN pg_trigger g ON g.tgrelid = t.oid AND NOT g.tgisinternal
    UNION ALL SELECT pg_get_functiondef(oid) || coalesce(proacl::text, '') FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace
    ORDER BY line
"""


async def contents(dsn: str) -> list[tuple[object, ...]]:
    """All relations, functions and single rows there are."""
    found = await run(
        dsn,
        """
        SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace
        UNION ALL SELECT proname || md5(prosrc) FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1
        """,
    )
    exposure = await run(dsn, "SELECT * FROM exposure")
    revision = await run(dsn, "SELECT * FROM alembic_version")
    return [tuple(row) for row in (*found, *exposure, *revision)]


async def test_a_new_database_gets_its_mode_its_cap_and_its_tables(dsn: str) -> None:
    await migrate(dsn, livemode=True, cap_satoshi=12345)
    [row] = await run(dsn, "SELECT livemode, cap_satoshi, used_satoshi, last_number FROM exposure")
    assert tuple(row) == (True, 12345, 0, 0)
    tables = await run(dsn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
    assert [row["tablename"] for row in tables] == sorted(TABLES)


async def test_a_second_run_changes_nothing_and_keeps_the_cap(dsn: str) -> None:
    await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    before = await contents(dsn)
    await migrate(dsn, livemode=False, cap_satoshi=1)
    assert await contents(dsn) == before


async def test_orders_placed_before_an_upgrade_are_kept_and_repeated(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrate_until("0001", dsn, monkeypatch)
    unsigned = replace(record(), signature=None)
    items = [
        priced_order(100, "a", price=unsigned),
        priced_order(200, price=unsigned),
        priced_order(300, "c", price=unsigned),
    ]
    placed = await run(dsn, PLACE_BEFORE_3, *arguments_before_8(items)[:-2])
    assert placed[0]["outcomes"] == ["placed"] * 3
    before = await run(dsn, "SELECT * FROM orders ORDER BY number")
    assert (await contents(dsn))[-1] == ("0001",)

    await migrate(dsn, livemode=False, cap_satoshi=1, price_keys=settings().accepted_price_keys)
    after = await run(dsn, "SELECT * FROM orders ORDER BY number")
    assert [{name: row[name] for name in before[0].keys()} for row in after] == [dict(row) for row in before]  # noqa: SIM118
    assert [row["key"] for row in await run(dsn, "SELECT key FROM price_records")] == [None]
    assert (await contents(dsn))[-1] == (REVISION,)
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    try:
        outcomes = await ledger.place([priced_order(100, "a"), *items, priced_order(400, "d")], 5)
        assert [type(outcome) for outcome in outcomes] == [Replayed] * 4 + [Placed]
        assert [order.number for order in (await ledger.page(None, PageFrom(0), 9)).orders] == [4, 3, 2, 1]
    finally:
        await ledger.close()


async def test_desk_that_has_sold_has_a_history_from_the_upgrade_on(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrate_until("0005", dsn, monkeypatch)
    first, last = record(10_000 * 10**8, age=2), record(30_000 * 10**8, age=3)  # by its number, not by its price's time
    in_dollars = replace(new_order(), currency=Currency.USD)
    items = [priced_order(price=first), priced_order(order=in_dollars, price=first), priced_order(price=last)]
    [placed] = await run(dsn, PLACE_BEFORE_8, *arguments_before_8(items))
    assert placed["outcomes"] == ["placed"] * 3
    await migrate(dsn, livemode=False, cap_satoshi=1)
    found = await run(dsn, "SELECT currency, rate_e8, as_of FROM price_anchors ORDER BY currency")
    assert [tuple(row) for row in found] == [("EUR", 30_000 * 10**8, last.as_of), ("USD", 10_000 * 10**8, first.as_of)]


async def test_last_prices_of_the_dollars_own_time_get_its_price_at_the_upgrade(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(command, "upgrade", lambda config, _, sql: upgrade(config, "base:0006", sql=sql))
        await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    kept = (
        "INSERT INTO price_anchors VALUES ('EUR', 1, $1), ('GBP', 2, $1::timestamptz - interval '15 s'), ('USD', 3, $1)"
    )
    await run(dsn, kept, utc_now())
    await migrate(dsn, livemode=False, cap_satoshi=1, account=DB_PROXY)
    found = await run(dsn, "SELECT currency, dollar_e8 FROM price_anchors ORDER BY currency")
    assert [tuple(row) for row in found] == [("EUR", 3), ("GBP", None), ("USD", 3)]
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    try:
        await PostgresAnchors(ledger).keep_anchors({Currency.GBP: Anchor(10**8, utc_now(), 2 * 10**8)})
        assert (await PostgresAnchors(ledger).anchors())[Currency.GBP].dollar_e8 == 2 * 10**8
    finally:
        await ledger.close()


async def test_orders_from_before_there_were_clients_are_anonymous_s_with_their_numbers_and_bytes(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_until("0007", dsn, monkeypatch)
    items = [priced_order(100 + each, key) for each, key in enumerate(["a", None, "c"])]
    [placed] = await run(dsn, PLACE_BEFORE_8, *arguments_before_8(items))
    assert placed["outcomes"] == ["placed"] * 3
    await run(dsn, "UPDATE exposure SET cap_satoshi = used_satoshi + 600")

    await migrate(dsn, livemode=False, cap_satoshi=1)
    await assert_adds_up(dsn)
    [client] = await run(dsn, "SELECT name, cap_satoshi, last_number FROM clients")
    assert tuple(client) == ("anonymous", None, 3)
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    life = PostgresLife(ledger)
    try:
        outcomes = await ledger.place([*items, priced_order(9, "d"), priced_order(100)], 5)
        assert [type(outcome) for outcome in outcomes] == [Replayed] * 3 + [Placed, Refused]
        for outcome in outcomes[:3]:
            assert isinstance(outcome, Replayed)
            body = msgspec.json.decode(bytes(created(outcome.order, "", is_replay=True).body))
            assert set(body["order"]) == set(PlacedDocument1.__struct_fields__)
            order = outcome.order
            assert (order.client_number, order.received_at) == (order.number, order.created_at)
            assert (order.market_rate_e8, order.markup_bp) == (order.rate_e8, 0)
        assert isinstance(outcomes[3], Placed)
        assert (outcomes[3].order.number, outcomes[3].order.client_number) == (4, 4)
        [settled] = await life.close_orders([Closing(items[1].order.id, "settled", None)])
        assert isinstance(settled, Order)
        for owner in (None, "anonymous"):  # those of before are its own, under the numbers they had
            assert [event.order.number for event in await life.events(owner, 0, 9)] == [1, 2, 3, 4, 2]
            assert [event.order.number for event in await life.events(owner, 3, 1)] == [4]
            assert [order.number for order in (await ledger.page(owner, PageFrom(1), 9)).orders] == [3, 2, 1]
            assert [order.number for order in (await ledger.page(owner, PageBefore(3), 9)).orders] == [2, 1]
            assert [order.number for order in (await ledger.page(owner, PageAfter(1), 2)).orders] == [3, 2]
    finally:
        await ledger.close()
    await assert_adds_up(dsn)


async def test_programs_of_before_place_orders_on_the_upgraded_database(dsn: str) -> None:
    await migrate(
        dsn, livemode=False, cap_satoshi=CAP_SATOSHI, price_keys=settings().accepted_price_keys, account=DB_PROXY
    )
    through = as_db_proxy(dsn)
    item, too_much = priced_order(100, "a"), priced_order(99_999_999_999)
    [row] = await run(through, PLACE_BEFORE_8, *arguments_before_8([item, item, too_much]))
    assert (row["outcomes"], row["numbers"], row["cap"]) == (
        ["placed", "repeat", "over_cap"],
        [1, 1, None],
        CAP_SATOSHI,
    )
    assert row["used_then"] == [None, None, item.satoshi]
    empty = ", ".join(["'{}'"] * 15)
    nothing = f"SELECT outcomes, cap FROM place_batch({empty}, 1::smallint, '-infinity', 'infinity')"  # noqa: S608
    assert [tuple(row) for row in await run(through, nothing)] == [([], CAP_SATOSHI)]
    ledger = PostgresLedger(through, settings(), livemode=False)
    [repeat] = await ledger.place([item], 5)
    await ledger.close()
    assert isinstance(repeat, Replayed)
    assert repeat.order.representation == 1
    await assert_adds_up(dsn)


async def test_program_of_before_there_were_markups_goes_on_placing_orders(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_until("0010", dsn, monkeypatch)
    items = [priced_order(100, f"k{number}") for number in range(3)]
    connection = await asyncpg.connect(dsn)
    try:
        place = await connection.prepare(PLACE_BEFORE_11)
        outcomes = [(await place.fetch(*place_arguments(items[:1], ANY_TIME)[:22]))[0]["outcomes"]]
        await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI, account=DB_PROXY)
        outcomes.append((await place.fetch(*place_arguments(items[:2], ANY_TIME)[:22]))[0]["outcomes"])
    finally:
        await connection.close()
    outcomes.append(
        (await run(as_db_proxy(dsn), PLACE_BEFORE_11, *place_arguments(items, ANY_TIME)[:22]))[0]["outcomes"]
    )
    assert outcomes == [["placed"], ["repeat", "placed"], ["repeat", "repeat", "placed"]]
    stored = await run(dsn, "SELECT market_rate_e8, markup_bp, rate_e8 FROM orders")
    assert [tuple(row) for row in stored] == [(2 * 10**12, 0, 2 * 10**12)] * 3
    await assert_adds_up(dsn)


async def test_orders_are_placed_while_the_database_is_upgraded(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are under way then, and wait for a lock, find what they called."""
    await migrate_until("0010", dsn, monkeypatch)
    done = asyncio.Event()

    async def place_forever() -> list[str]:
        connection = await asyncpg.connect(dsn)
        outcomes: list[str] = []
        try:
            place = await connection.prepare(PLACE_BEFORE_11)
            while not done.is_set() or len(outcomes) < 10:
                [row] = await place.fetch(*place_arguments([priced_order(1)], ANY_TIME)[:22])
                outcomes += row["outcomes"]
        finally:
            await connection.close()
        return outcomes

    placing = [asyncio.create_task(place_forever()) for _ in range(6)]
    await asyncio.sleep(0.2)
    await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    await asyncio.sleep(0.1)
    done.set()
    outcomes = [each for found in await asyncio.gather(*placing) for each in found]
    assert set(outcomes) == {"placed"}
    await assert_adds_up(dsn)


async def test_orders_of_another_client_than_anonymous_are_not_guessed_at(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate_until("0007", dsn, monkeypatch)
    theirs = priced_order(order=replace(new_order(), client="other"))
    await run(dsn, PLACE_BEFORE_8, *arguments_before_8([priced_order(), theirs]))
    with pytest.raises(CannotStart, match="there are orders of another client than anonymous"):
        await migrate(dsn, livemode=False, cap_satoshi=1)
    assert (await contents(dsn))[-1] == ("0007",)


async def test_several_at_once_on_one_new_database_do_not_collide(dsn: str) -> None:
    await asyncio.gather(*(migrate(dsn, livemode=False, cap_satoshi=each) for each in range(1, 5)))
    [row] = await run(dsn, "SELECT cap_satoshi FROM exposure")
    assert row["cap_satoshi"] in range(1, 5)


@pytest.mark.parametrize("livemode", [True, False])
async def test_the_other_mode_s_database_is_refused_unchanged(dsn: str, livemode: bool) -> None:
    await migrate(dsn, livemode=livemode, cap_satoshi=CAP_SATOSHI)
    before = await contents(dsn)
    has = "live" if livemode else "sandbox"
    with pytest.raises(CannotStart, match=f"holds {has} orders: start with PRICE_FEED={has}"):
        await migrate(dsn, livemode=not livemode, cap_satoshi=1)
    assert await contents(dsn) == before


async def test_a_newer_database_is_refused(dsn: str) -> None:
    await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    await run(dsn, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(CannotStart, match=r"newer version than this program.*update buydesk"):
        await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)


async def test_a_migration_that_fails_leaves_nothing_behind(dsn: str) -> None:
    with pytest.raises(CannotStart, match=r'cannot use the database .*violates check constraint "exposure_cap'):
        await migrate(dsn, livemode=False, cap_satoshi=-1)
    assert await run(dsn, "SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace") == []
    await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)


async def test_a_table_in_the_way_is_one_line(dsn: str) -> None:
    await run(dsn, "CREATE TABLE orders ()")
    with pytest.raises(CannotStart) as raised:
        await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    assert 'relation "orders" already exists' in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_a_migration_that_hangs_is_not_waited_for_for_ever(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "_LOCK_SECONDS_MAX", 0.1)
    monkeypatch.setattr(migrations, "_LOCK_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(migrations, "_LOCK_PAUSE_SECONDS", 0.05)
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", migrations._LOCK)
        with pytest.raises(CannotStart, match="lock timeout"):
            await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    finally:
        await connection.close()


async def test_readers_do_not_wait_for_a_migration_that_waits_for_one_of_them(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_LOCK_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(migrations, "_LOCK_PAUSE_SECONDS", 0.1)
    await migrate_until("0010", dsn, monkeypatch)
    connection = await asyncpg.connect(dsn)
    try:
        backup = connection.transaction()
        await backup.start()
        await connection.fetch("SELECT FROM orders")
        migrating = asyncio.create_task(migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI))
        slowest = 0.0
        for _ in range(10):
            await asyncio.sleep(0.1)
            started = time.monotonic()
            await run(dsn, "SELECT FROM orders")
            slowest = max(slowest, time.monotonic() - started)
        assert not migrating.done()
        assert slowest < 1
        await backup.rollback()
        await migrating
    finally:
        await connection.close()
    assert (await contents(dsn))[-1] == (REVISION,)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://desk:hidden@127.0.0.1:1/db",
        "postgresql://desk:hidden@127.0.0.1:port/db",
        "postgresql://desk:hid[den@127.0.0.1/db",
        "postgresql:///db?host=/nonexistent&password=hidden",
        "mysql://desk:hidden@127.0.0.1/db",
        "hidden",
    ],
)
async def test_a_database_that_cannot_be_reached_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(CannotStart, match=r"cannot use the database .*: check DATABASE_URL") as raised:
        await migrate(url, livemode=False, cap_satoshi=1)
    assert "hid" not in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_what_the_server_says_is_told(postgres_servers: PostgresServers) -> None:
    server = await postgres_servers.server(18)
    with pytest.raises(CannotStart, match='database "missing" does not exist'):
        await migrate(server.dsn_of("missing"), livemode=False, cap_satoshi=1)


async def test_a_database_that_is_not_there_yet_is_waited_for(
    postgres_servers: PostgresServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await postgres_servers.server(18)
    monkeypatch.setattr(migrations, "_WAIT_POLL_SECONDS", 0.01)
    name = f"migrated_{next(_names)}"
    migrating = asyncio.create_task(
        migrate(server.dsn_of(name), livemode=False, cap_satoshi=CAP_SATOSHI, wait_seconds=60)
    )
    await run(server.dsn_of("postgres"), f"CREATE DATABASE {name}")
    await migrating
    assert (await contents(server.dsn_of(name)))[-1] == (REVISION,)


async def test_a_server_that_does_not_come_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "_WAIT_POLL_SECONDS", 0.01)
    with pytest.raises(CannotStart, match="cannot use the database"):
        await migrate("postgresql:///db?host=/nonexistent", livemode=False, cap_satoshi=1, wait_seconds=0.03)


def test_services_never_load_what_migrates() -> None:
    loads = (
        "import sys, buydesk.runtime.serve; print([name for name in ('sqlalchemy', 'alembic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"


async def test_schema_to_be_read_is_what_the_migrations_make(dsn: str, postgres_dsn: str) -> None:
    await migrate(dsn, livemode=False, cap_satoshi=CAP_SATOSHI)
    name = f"read_{next(_names)}"
    await run(postgres_dsn, f"CREATE DATABASE {name}")
    read = await asyncpg.connect(postgres_dsn.replace("/postgres?", f"/{name}?"))
    try:
        await read.execute((files("buydesk.backends.postgres") / "schema.sql").read_text(encoding="utf-8"))
        described = [row["line"] for row in await read.fetch(SCHEMA)]
    finally:
        await read.close()
    assert described == [row["line"] for row in await run(dsn, SCHEMA)]
    assert len(described) > 40
