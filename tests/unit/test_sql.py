"""The named queries: what every one of them is, and that each goes by an index whatever the planner knows."""

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib.resources import files
from typing import Any

import asyncpg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from buydesk.backends.postgres.prices import signed_text
from buydesk.backends.postgres.rows import place_arguments
from buydesk.backends.postgres.sessions import session_settings
from buydesk.backends.postgres.sql import QUERIES, REVISION
from buydesk.orders.model import NUMBER_MAX
from tests.builders import order_quote, priced_order, quoted_order, record, settings
from tests.databases import ANY_TIME, Databases, fill

TEXT = (files("buydesk.backends.postgres") / "queries.sql").read_text(encoding="utf-8")
ORDERS = 30_000
PAGES = {
    "page_from": [0, 1, 15_000, 29_999, 30_000, NUMBER_MAX],
    "page_before": [1, 2, 15_000, 30_001, NUMBER_MAX],
    "page_after": [0, 1, 15_000, 29_999, 30_000, NUMBER_MAX],
}

Plan = Mapping[str, Any]


def test_every_query_has_a_name_of_its_own() -> None:
    names = re.findall(r"^-- name: (\w+)$", TEXT, re.MULTILINE)
    assert len(names) == TEXT.count("-- name:") == len(set(names))
    assert list(QUERIES) == names


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_says_what_it_is_and_names_its_columns(name: str) -> None:
    first, _, statement = QUERIES[name].partition("\n")
    assert re.fullmatch(r"-- [A-Z$].+[.]", first)
    assert statement.startswith("SELECT ")
    assert "*" not in statement
    assert "OFFSET" not in statement.upper()
    assert ";" not in statement


@pytest.fixture(scope="module", params=[18, 16], ids=["postgres18", "postgres16"])
async def dsn(request: pytest.FixtureRequest, databases: Databases) -> str:
    return await databases.new(request.param)


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A session as the ledger's own are."""
    opened = await asyncpg.connect(dsn, server_settings=session_settings(settings()))
    yield opened
    await opened.close()


async def test_postgresql_understands_every_query(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    for text in QUERIES.values():
        await connection.prepare(text)


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


async def plan_of(connection: "asyncpg.Connection[asyncpg.Record]", name: str, mode: str, *arguments: str) -> Plan:
    await connection.execute(f"SET plan_cache_mode = {mode}")
    await connection.execute(f"PREPARE q AS {QUERIES[name]}")
    explained = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE q ({', '.join(arguments)})")
    await connection.execute("DEALLOCATE q")
    plan: Plan = json.loads(explained)[0]["Plan"]
    return plan


def reads(plan: Plan, table: str) -> set[tuple[str, str]]:
    """How the table is read; every scan of it seeks."""
    on_table = [node for node in nodes(plan) if node.get("Relation Name") == table]
    assert all("Index Cond" in node for node in on_table), plan
    return {(node["Node Type"], node["Index Name"]) for node in on_table}


def blocks(plan: Plan) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def most_rows(plan: Plan) -> int:
    """The most rows that any part of the plan read, those that it left out included."""
    return max(int(node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) for node in nodes(plan))


def goes_by(index: str, plan: Plan, blocks_max: int, table: str = "orders") -> None:
    """The plan seeks in the table's index, reads in its order, and touches few blocks."""
    found = list(nodes(plan))
    kinds = {node["Node Type"] for node in found}
    on_table = [node for node in found if node.get("Relation Name") == table]
    assert [(node["Node Type"], node["Index Name"]) for node in on_table] == [("Index Scan", index)], kinds
    assert "Index Cond" in on_table[0]
    assert reads(plan, "closings") <= {("Index Scan", "closed_once")}
    assert not kinds & {"Sort", "Incremental Sort", "Bitmap Heap Scan", "Hash Join", "Merge Join"}
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= blocks_max


async def assert_plans(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    an_id = await connection.fetchval("SELECT coalesce(min(id::text), gen_random_uuid()::text) FROM orders")
    for mode in ("force_generic_plan", "force_custom_plan"):
        for name, anchors in PAGES.items():
            for anchor in anchors:
                goes_by("orders_pkey", await plan_of(connection, name, mode, str(anchor), "10"), 40)
                plan = await plan_of(connection, f"client_{name}", mode, "'anonymous'", str(anchor), "10")
                goes_by("orders_of_client", plan, 40)
                assert most_rows(plan) <= 10
        goes_by("orders_pkey", await plan_of(connection, "orders_by_number", mode, "'{1, 15000, 30000}'"), 40)
        for client in ("NULL", "'anonymous'", "'other'"):
            goes_by("orders_id_unique", await plan_of(connection, "order_by_id", mode, f"'{an_id}'", client), 20)
        goes_by("orders_key_unique", await plan_of(connection, "order_by_key", mode, "'anonymous'", "'filled-7'"), 20)
        goes_by("orders_pkey", await plan_of(connection, "closed_orders", mode, "'{1, 15000, 30000}'"), 40)
        for after in (0, 1, 15_000, 29_995, 30_000, 44_999, 45_000, 50_000):
            plan = await plan_of(connection, "events_after", mode, str(after), "10")
            assert reads(plan, "orders") == {("Index Scan", "orders_pkey")}
            assert reads(plan, "closings") <= {("Index Scan", "closings_pkey"), ("Index Only Scan", "closings_pkey")}
            assert blocks(plan) <= 80
            plan = await plan_of(connection, "client_events_after", mode, "'anonymous'", str(after), "10")
            assert reads(plan, "orders") <= {("Index Scan", "orders_of_client"), ("Index Scan", "orders_pkey")}
            assert reads(plan, "closings") == {("Index Scan", "closings_of_client")}
            assert blocks(plan) <= 100
            assert most_rows(plan) <= 20
        plan = await plan_of(connection, "client_exposure", mode, "'anonymous'")
        assert (reads(plan, "clients"), most_rows(plan)) == ({("Index Scan", "clients_pkey")}, 1)
        plan = await plan_of(connection, "last_events", mode, "'{anonymous,other}'")
        assert (reads(plan, "clients"), most_rows(plan)) == ({("Index Scan", "clients_pkey")}, 3)
        for after in (0, 15_000, 29_990, 30_000):
            plan = await plan_of(connection, "accepted_after", mode, str(after), "10000", "10")
            assert reads(plan, "orders") == {("Index Scan", "orders_pkey")}
            assert reads(plan, "closings") <= {("Index Scan", "closed_once"), ("Index Only Scan", "closed_once")}
            assert blocks(plan) <= 40 + 20 * 4  # every other order is closed


async def close_half(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Every other order of a filled ledger is settled."""
    await connection.execute(
        f"""
        ALTER TABLE closings SET (autovacuum_enabled = off);
        INSERT INTO closings (event_number, number, closing, client_closing, client_event_number, closed_at, client,
                              status)
        SELECT {ORDERS} + n, 2 * n, n, n, {ORDERS} + n, now(), 'anonymous', 'settled'
        FROM generate_series(1, {ORDERS} / 2) AS n;
        UPDATE exposure SET closed_satoshi = {ORDERS} / 2 * 1000, last_closing = {ORDERS} / 2;
        UPDATE clients SET closed_satoshi = {ORDERS} / 2 * 1000, last_closing = {ORDERS} / 2 WHERE name = 'anonymous';
        """  # noqa: S608
    )


async def test_every_page_is_an_index_seek_without_a_sort_whatever_the_planner_knows(
    dsn: str, connection: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    # A plan that was made while there was nothing is kept as long as its connection.
    await assert_plans(connection)
    await fill(dsn, ORDERS)
    assert await connection.fetchval("SELECT reltuples FROM pg_class WHERE relname = 'orders'") == -1
    await assert_plans(connection)
    await close_half(connection)
    assert await connection.fetchval("SELECT reltuples FROM pg_class WHERE relname = 'closings'") == -1
    await assert_plans(connection)
    await connection.execute("ANALYZE")
    await assert_plans(connection)


@pytest.mark.parametrize("version", [18, 16])
async def test_client_s_page_reads_the_same_at_any_depth_however_many_clients_there_are(
    databases: Databases, version: int
) -> None:
    dsn = await databases.new(version)
    await fill(dsn, ORDERS, others=10_000)
    connection = await asyncpg.connect(dsn, server_settings=session_settings(settings()))
    try:
        own = ORDERS // 2
        for analyzed in (False, True):
            if analyzed:
                await connection.execute("ANALYZE")
            for name, anchors in (("from", (0, own // 2, own - 10)), ("before", (own, 11)), ("after", (0, own - 10))):
                for anchor in anchors:
                    query, arguments = f"client_page_{name}", ("'anonymous'", str(anchor), "10")
                    plan = await plan_of(connection, query, "force_generic_plan", *arguments)
                    goes_by("orders_of_client", plan, 60)
                    assert (plan["Actual Rows"], most_rows(plan)) == (10, 10)
            for after in (0, own // 2, own - 10):
                arguments = ("'anonymous'", str(after), "10")
                plan = await plan_of(connection, "client_events_after", "force_generic_plan", *arguments)
                assert (plan["Actual Rows"], most_rows(plan)) == (10, 10)
            plan = await plan_of(connection, "client_page_from", "force_generic_plan", "'client-7'", "0", "10")
            goes_by("orders_of_client", plan, 20)
            assert most_rows(plan) <= 2
    finally:
        await connection.close()


async def test_anchors_and_confirmations_go_by_index_however_many_have_ended(
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    await connection.execute(
        "INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at) "
        "SELECT 'EUR', 1, 2, 'w', now() - interval '1 hour', now() - interval '1 hour' + n * interval '1 millisecond' "
        "FROM generate_series(1, 10000) AS n"
    )
    for mode in ("force_generic_plan", "force_custom_plan"):
        plan = await plan_of(connection, "price_anchors", mode, "'{EUR,USD}'")
        goes_by("price_anchors_pkey", plan, 20, "price_anchors")
        plan = await plan_of(connection, "price_confirmations", mode, "'{EUR,USD}'", "100")
        goes_by("price_confirmations_by_end", plan, 20, "price_confirmations")


async def test_a_page_of_a_thousand_orders_is_read_the_same_way(
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    for name in PAGES:
        plan = await plan_of(connection, name, "force_generic_plan", "12345", "1000")
        goes_by("orders_pkey", plan, 4000)  # what became of each is looked up: some blocks of an index each
        assert plan["Actual Rows"] == 1000
        plan = await plan_of(connection, f"client_{name}", "force_generic_plan", "'anonymous'", "12345", "1000")
        goes_by("orders_of_client", plan, 5000)
        assert plan["Actual Rows"] == 1000


NEW = [f"new-{number}" for number in range(20)]
STORED = [f"filled-{number}" for number in range(1, ORDERS, ORDERS // 20)]


@pytest.mark.parametrize(
    ("keys", "kinds"), [(NEW, {"placed"}), (STORED, {"repeat"}), (NEW + STORED, {"placed", "repeat"})]
)
@pytest.mark.parametrize("of_the_ledger", [True, False])
async def test_placing_goes_by_index_whatever_the_session_s_settings(
    dsn: str, of_the_ledger: bool, keys: list[str], kinds: set[str]
) -> None:
    own = session_settings(settings()) if of_the_ledger else {}
    connection = await asyncpg.connect(dsn, server_settings=own)
    try:
        if not await connection.fetchval("SELECT last_number FROM exposure"):
            await fill(dsn, ORDERS)
        await connection.execute("BEGIN")  # and never committed
        [row] = await connection.fetch(
            QUERIES["place_items"], *place_arguments([priced_order(100, key) for key in keys], ANY_TIME)
        )
        assert set(row["outcomes"]) == kinds
        scans = {
            name: await connection.fetchval("SELECT pg_stat_get_xact_numscans($1::text::regclass)", name)
            for name in ("orders", "price_records", "orders_id_unique", "orders_key_unique", "orders_quote_unique")
        }
        assert (scans["orders"], scans["price_records"]) == (0, 0)
        assert scans["orders_quote_unique"] == 0 or kinds != {"placed"}  # nobody looks for quotes where there are none
        assert scans["orders_id_unique"] > 0
        assert scans["orders_key_unique"] > 0
    finally:
        await connection.close()


@pytest.mark.parametrize("kinds", [{"placed"}, {"repeat"}, {"placed", "repeat"}])
async def test_placing_by_quotes_goes_by_index_too(dsn: str, kinds: set[str]) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        if not await connection.fetchval("SELECT last_number FROM exposure"):
            await fill(dsn, ORDERS)
        price = record()
        stored, fresh = ([order_quote(price) for _ in range(20)] for _ in range(2))
        await connection.execute("BEGIN; SET LOCAL session_replication_role = replica")  # and never committed
        await connection.execute(
            "UPDATE orders o SET quote_id = q.id, quoted_at = now(), quote_expires_at = now() + interval '1 minute' "
            "FROM unnest($1::uuid[]) WITH ORDINALITY AS q (id, n) WHERE o.number = q.n",
            [quote.id for quote in stored],
        )
        await connection.execute("SET LOCAL session_replication_role = origin")
        await connection.fetch(QUERIES["keep_price_record"], price.id, signed_text(price))
        scans = "SELECT pg_stat_get_xact_numscans($1::text::regclass)"
        before = {name: await connection.fetchval(scans, name) for name in ("orders", "orders_quote_unique")}
        quotes = (fresh if "placed" in kinds else []) + (stored if "repeat" in kinds else [])
        items = [quoted_order(quote) for quote in quotes]
        [row] = await connection.fetch(QUERIES["place_items"], *place_arguments(items, ANY_TIME))
        assert set(row["outcomes"]) == kinds
        assert await connection.fetchval(scans, "orders") == before["orders"]
        assert await connection.fetchval(scans, "orders_quote_unique") > before["orders_quote_unique"]
    finally:
        await connection.close()


def test_the_revision_the_program_asks_for_is_the_newest_migration_s() -> None:
    config = Config()
    config.set_main_option("script_location", str(files("buydesk.backends.postgres") / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION
