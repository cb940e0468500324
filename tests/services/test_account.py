"""db_proxy's account in PostgreSQL: it can do what db_proxy does, and nothing that changes what may be sold."""

import contextlib
from base64 import b64decode
from collections.abc import AsyncIterator

import asyncpg
import pytest
from msgspec.structs import replace

from buydesk.backends.postgres.accounts import FUNCTIONS, Account, account_of, verifier
from buydesk.backends.postgres.ledger import PostgresLedger
from buydesk.backends.postgres.migrate import migrate
from buydesk.embedded.postgres import USER
from buydesk.errors import CannotStart, LedgerUnavailable
from buydesk.orders.model import Placed, Replayed
from buydesk.prices.model import RejectedQuote
from tests.builders import priced_order, record, settings, signed
from tests.databases import CAP_SATOSHI, COPY_ORDER, DB_PROXY, Databases, as_db_proxy, run
from tests.recount import assert_adds_up

PLANTED = """
    CREATE FUNCTION cardinality(uuid[]) RETURNS int LANGUAGE plpgsql
    AS $$BEGIN UPDATE exposure SET cap_satoshi = 2100000000000000; RETURN 0; END$$
"""


@pytest.fixture(params=[18, 16], ids=["postgres18", "postgres16"])
async def dsn(request: pytest.FixtureRequest, databases: Databases) -> str:
    """A database with an order in it, for its owner."""
    dsn = await databases.new(request.param)
    ledger = PostgresLedger(dsn, settings(), livemode=False)
    await ledger.place([priced_order(key="first")], 5)
    await ledger.close()
    return dsn


@pytest.fixture
async def db_proxy(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(as_db_proxy(dsn))
    yield connection
    await connection.close()


async def test_it_places_and_reads_all_that_a_ledger_does(dsn: str) -> None:
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    await ledger.check()
    item = priced_order(key="second")
    [placed] = await ledger.place([item], 5)
    assert isinstance(placed, Placed)
    assert isinstance((await ledger.place([item], 5))[0], Replayed)
    assert (await ledger.exposure(None)).orders == 2
    assert await ledger.order_by_key(placed.order.client, "second") == placed.order
    assert (await ledger.price_record(placed.order.price_id)).id == placed.order.price_id
    await ledger.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE exposure SET cap_satoshi = 2100000000000000",
        "UPDATE exposure SET placed_satoshi = 0",
        "UPDATE exposure SET cap_counts_open = true",
        "UPDATE clients SET cap_satoshi = NULL",
        "INSERT INTO clients (name) VALUES ('mine')",
        "DELETE FROM clients",
        "DELETE FROM closings",
        "UPDATE closings SET status = 'settled'",
        "INSERT INTO closings VALUES (2, 1, 1, 1, 2, now(), 'anonymous', 'settled')",
        "DELETE FROM orders",
        "UPDATE orders SET satoshi = 1",
        COPY_ORDER.format(price_id="price_id"),
        "INSERT INTO price_records (id, document) VALUES (gen_random_uuid(), '{}')",
        "INSERT INTO price_keys VALUES ('mine')",
        "INSERT INTO price_anchors VALUES ('EUR', 1, now())",
        "UPDATE price_anchors SET rate_e8 = 1",
        "DELETE FROM price_anchors",
        "INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at) "
        "VALUES ('EUR', 1, 2, 'mine', now(), now() + interval '1 minute')",
        "UPDATE price_confirmations SET high_e8 = 9e18",
        "DELETE FROM price_confirmations",
        "SELECT nextval('price_confirmations_id_seq')",
        "SELECT confirm_price('me', 'here', 'why', 'EUR', 1, 2, 1)",
        "SELECT act('me', 'here', 'why', 'set_cap', '{\"cap_satoshi\": 1}')",
        "SELECT set_cap('me', 'here', 'why', 1)",
        "ALTER FUNCTION act_by_key SECURITY INVOKER",
        "DO $$ BEGIN LOCK audit IN SHARE ROW EXCLUSIVE MODE; END $$",  # by which acts wait for each other
        "UPDATE exposure SET paused = true",
        "UPDATE daily_limits SET cents_max = 1",
        "INSERT INTO markups VALUES ('other', 'EUR', 0)",
        "UPDATE markups SET markup_bp = 0",
        "DELETE FROM markups",
        "DELETE FROM refusals",
        "INSERT INTO keys (id, client, digest, scopes) VALUES ('0000000000', 'other', sha256(''), '{desk:cap}')",
        "INSERT INTO audit SELECT * FROM audit",
        "UPDATE alembic_version SET version_num = '0001'",
        "TRUNCATE orders",
        "DROP TABLE orders CASCADE",
        "ALTER TABLE orders ADD COLUMN mine int",
        "CREATE TABLE mine ()",
        "CREATE SCHEMA mine",
        "CREATE OR REPLACE FUNCTION place_items() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "DROP FUNCTION place_items",
        "ALTER FUNCTION place_items SECURITY INVOKER",
        "ALTER FUNCTION close_orders SECURITY INVOKER",
        "SET session_replication_role = replica",
        "CREATE ROLE mine",
    ],
)
async def test_what_else_there_is_it_may_not_do(
    statement: str, db_proxy: "asyncpg.Connection[asyncpg.Record]", dsn: str
) -> None:
    with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.DuplicateFunctionError)):
        await db_proxy.execute(statement)


async def test_tables_of_its_own_by_our_names_are_not_those_that_orders_go_to(
    db_proxy: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    empty = ", ".join(["'{}'"] * 20)
    call = f"SELECT cap, is_live FROM place_items({empty}, '-infinity', 'infinity')"  # noqa: S608
    await db_proxy.execute("CREATE TEMPORARY TABLE exposure AS SELECT * FROM exposure")
    await db_proxy.execute("UPDATE pg_temp.exposure SET cap_satoshi = 2100000000000000, livemode = true")
    [row] = await db_proxy.fetch(call)
    assert tuple(row) == (CAP_SATOSHI, False)


@pytest.mark.parametrize(
    ("slots", "currencies", "clients"),
    [
        ("'{1,1}'", "'[0:1]={GBP,EUR}'", "'{anonymous}'"),
        ("'[0:1]={2,1}'", "'{EUR,EUR}'", "'{anonymous,other}'"),
        ("'{1,1}'", "'{EUR,EUR}'", "'{anonymous}'"),
    ],
)
async def test_no_array_gets_around_a_limit_a_day(
    dsn: str, db_proxy: "asyncpg.Connection[asyncpg.Record]", slots: str, currencies: str, clients: str
) -> None:
    owner = await asyncpg.connect(dsn)
    await owner.execute("SELECT set_limits('anonymous', '{\"daily_cents_max\": {\"EUR\": 1}}')")
    price = await owner.fetchrow("SELECT id, document FROM price_records LIMIT 1")
    assert price is not None
    ids = "'{00000000-0000-4000-8000-000000000005,00000000-0000-4000-8000-000000000006}'"
    call = f"""
        SELECT outcomes FROM place_items(
            {ids}, {slots}, '{{NULL,NULL}}', {currencies}, '{{100,100}}', '{{100,100}}', '{{100,100}}',
            '{{infinity,infinity}}', '{{0,0}}', '{{2,2}}', NULL, NULL, '{{1,1}}', '{{1,2}}', '{{0,0}}', {clients},
            ARRAY[$1::uuid], ARRAY[now()], '{{infinity}}', ARRAY[$2], '-infinity', 'infinity')
        """  # noqa: S608
    with contextlib.suppress(asyncpg.IntegrityConstraintViolationError):
        await db_proxy.fetch(call, price["id"], price["document"])
    stored = "SELECT count(*) FROM orders WHERE client = 'anonymous' AND currency = 'EUR' AND number > 1"
    assert await owner.fetchval(stored) == 0
    await owner.close()
    await assert_adds_up(dsn)


@pytest.mark.parametrize(
    ("ids", "satoshi"),
    [
        ("'[5:5]={00000000-0000-4000-8000-000000000005}'", -(10**10)),  # what no row can be made of lowers nothing
        ("'[5:5]={00000000-0000-4000-8000-000000000005}'", 10**9),
        ("'[2:2][2:2]={{00000000-0000-4000-8000-000000000005}}'", -(10**10)),
        ("'{00000000-0000-4000-8000-000000000005}'", -(10**10)),
        ("'{00000000-0000-4000-8000-000000000005}'", 0),
    ],
)
async def test_no_array_makes_room_under_the_cap(
    dsn: str, db_proxy: "asyncpg.Connection[asyncpg.Record]", ids: str, satoshi: int
) -> None:
    owner = await asyncpg.connect(dsn)
    before = await owner.fetchrow("SELECT * FROM exposure")
    price = await owner.fetchrow("SELECT id, document FROM price_records LIMIT 1")
    assert price is not None
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await db_proxy.fetch(
            f"""
            SELECT outcomes FROM place_items(
                {ids}, '{{1}}', '{{NULL}}', '{{EUR}}', '{{100}}', '{{100}}', '{{{satoshi}}}', '{{infinity}}',
                '{{0}}', '{{2}}', NULL, NULL, '{{1}}', '{{1}}', '{{0}}', '{{anonymous}}', ARRAY[$1::uuid], ARRAY[now()],
                '{{infinity}}', ARRAY[$2], '-infinity', 'infinity')
            """,  # noqa: S608
            price["id"],
            price["document"],
        )
    assert await owner.fetchrow("SELECT * FROM exposure") == before
    await owner.close()


async def test_tables_of_its_own_by_our_names_are_not_those_that_anchors_go_to(
    db_proxy: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    await db_proxy.execute("CREATE TEMPORARY TABLE price_anchors AS SELECT * FROM price_anchors")
    await db_proxy.execute("SELECT keep_price_anchors('{EUR}', '{7}', '{now}', '{8}')")
    assert await db_proxy.fetchval("SELECT count(*) FROM pg_temp.price_anchors") == 0
    assert await db_proxy.fetchval("SELECT rate_e8 FROM public.price_anchors") == 7


@pytest.mark.parametrize(
    ("call", "constraint"),
    [
        ("confirm_price('me', 'here', 'why', 'EUR', 2, 1, 15)", "price_confirmations_range"),
        ("confirm_price('me', 'here', 'why', 'EUR', 1, 2, 16)", "price_confirmations_end"),
        ("confirm_price('me', 'here', 'why', 'EUR', 1, 2, 0)", "price_confirmations_end"),
        ("confirm_price('me', 'here', 'why', 'EUR', 0, 2, 15)", "price_confirmations_low_e8_check"),
        ("confirm_price('me', 'here', '', 'EUR', 1, 2, 15)", "price_confirmations_why_check"),
        ("confirm_price('me', 'here', repeat('w', 501), 'EUR', 1, 2, 15)", "price_confirmations_why_check"),
        ("confirm_price('me', 'here', 'why', 'eur', 1, 2, 15)", "price_confirmations_currency_check"),
        ("keep_price_anchors('{EUR}', '{0}', '{now}', '{1}')", "price_anchors_rate_e8_check"),
        ("keep_price_anchors('{euro}', '{1}', '{now}', '{1}')", "price_anchors_currency_check"),
        ("keep_price_anchors('{EUR}', '{1}', '{now}', '{0}')", "price_anchors_dollar_e8_check"),
    ],
)
async def test_limits_of_what_is_kept_hold_in_the_database_too(dsn: str, call: str, constraint: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await run(dsn, f"SELECT {call}")
    assert refused.value.constraint_name == constraint


async def test_confirmations_are_changed_and_deleted_by_nobody(dsn: str) -> None:
    owner = await asyncpg.connect(dsn)
    await owner.execute("SELECT confirm_price('me', 'here', 'why', 'EUR', 1, 2, 15)")
    for statement in (
        "UPDATE price_confirmations SET why = 'because'",
        "DELETE FROM price_confirmations",
        "TRUNCATE price_confirmations",
    ):
        with pytest.raises(asyncpg.RestrictViolationError, match="price confirmations stay as they are"):
            await owner.execute(statement)
    assert await owner.fetchval("SELECT why FROM price_confirmations") == "why"
    await owner.close()


async def test_price_of_a_key_that_was_never_accepted_is_not_stored(dsn: str) -> None:
    owner = await asyncpg.connect(dsn)
    document = '{"signature":{"key":"mine","value":"x"}}'
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="price_records_key_known"):
        await owner.execute("INSERT INTO price_records (id, document) VALUES (gen_random_uuid(), $1)", document)
    assert await owner.fetchval("SELECT key FROM price_records") == settings().accepted_price_keys[0]
    await owner.close()


async def test_what_a_source_says_changes_no_key_and_keeps_no_order_away(dsn: str) -> None:
    said = 'an error: \x00 "signature":{"key":"mine"} \\"signature":{"key":"mine"}'
    price = signed(replace(record(), rejected=(RejectedQuote("sandbox-3", said),)))
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    [placed] = await ledger.place([priced_order(price=price)], 5)
    assert isinstance(placed, Placed)
    assert await ledger.price_record(price.id) == price
    await ledger.close()
    owner = await asyncpg.connect(dsn)
    assert (
        await owner.fetchval("SELECT key FROM price_records WHERE id = $1", price.id) in settings().accepted_price_keys
    )
    await owner.close()


async def test_ledger_that_does_not_know_an_accepted_key_is_not_ready_until_it_is_migrated(dsn: str) -> None:
    known = settings().accepted_price_keys
    new = settings(price_keys=(*known, "A" * 43))
    ledger = PostgresLedger(as_db_proxy(dsn), new, livemode=False)
    with pytest.raises(Exception, match=rf"does not know keys that prices are signed with \({'A' * 43}\): run"):
        await ledger.check()
    await migrate(dsn, livemode=False, cap_satoshi=1, price_keys=new.accepted_price_keys)
    await ledger.check()
    await ledger.close()
    owner = await asyncpg.connect(dsn)
    assert {row["key"] for row in await owner.fetch("SELECT key FROM price_keys")} == set(new.accepted_price_keys)
    await owner.close()


def salt_of(kept: str) -> bytes:
    return b64decode(kept.split("$")[1].partition(":")[2])


async def test_password_is_that_of_the_address_from_then_on(dsn: str) -> None:
    """The servers of the tests ask for none, so what they keep of it is looked at."""
    owner = await asyncpg.connect(dsn)
    kept = "SELECT rolpassword FROM pg_authid WHERE rolname = $1"
    first = await owner.fetchval(kept, DB_PROXY.name)
    account = Account('odd "name', "it's a $ecret: with % and more")
    for _ in range(2):
        await migrate(dsn, livemode=False, cap_satoshi=1, account=account)
        of_migrate = await owner.fetchval(kept, account.name)
        # PostgreSQL's own verifier of the same password with its own salt is the same as ours with that salt.
        alter = "SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)"
        await owner.execute(await owner.fetchval(alter, account.name, account.password))
        of_postgresql = await owner.fetchval(kept, account.name)
        assert of_postgresql == verifier(account.password, salt_of(of_postgresql))
        assert of_migrate == verifier(account.password, salt_of(of_migrate))
        assert of_migrate != of_postgresql
    assert await owner.fetchval(kept, DB_PROXY.name) == first
    await owner.execute("""DROP OWNED BY "odd ""name"; DROP ROLE "odd ""name" """)
    await owner.close()


async def test_rights_that_a_restored_backup_has_lost_are_made_again(dsn: str) -> None:
    owner = await asyncpg.connect(dsn)
    functions = ", ".join(FUNCTIONS)
    await owner.execute(f"DROP OWNED BY {DB_PROXY.name}; GRANT EXECUTE ON FUNCTION {functions} TO PUBLIC")
    ledger = PostgresLedger(as_db_proxy(dsn), settings(), livemode=False)
    with pytest.raises(LedgerUnavailable, match="InsufficientPrivilegeError"):
        await ledger.check()
    await migrate(dsn, livemode=False, cap_satoshi=1, account=DB_PROXY)
    await ledger.check()
    assert isinstance((await ledger.place([priced_order()], 5))[0], Placed)
    await ledger.close()
    public = "SELECT count(*) FROM pg_proc, aclexplode(proacl) WHERE proname = ANY ($1::text[]) AND grantee = 0"
    assert await owner.fetchval(public, FUNCTIONS) == 0
    await owner.close()


async def test_where_everybody_could_make_functions_it_can_slip_none_under_placing(dsn: str) -> None:
    """Databases from PostgreSQL 14 and older have that grant, through upgrades too."""
    owner = await asyncpg.connect(dsn)
    await owner.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    thief = await asyncpg.connect(as_db_proxy(dsn))
    await thief.execute(PLANTED)
    with pytest.raises(CannotStart, match=r"could have another's function run by our functions: cardinality\(uuid"):
        await migrate(dsn, livemode=False, cap_satoshi=1, account=DB_PROXY)
    await thief.execute("DROP FUNCTION public.cardinality")
    await migrate(dsn, livemode=False, cap_satoshi=1, account=DB_PROXY)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await thief.execute(PLANTED)
    await thief.close()
    await owner.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (f"GRANT {USER} TO thief", f"is a member of the role {USER}"),
        ("GRANT friend TO thief; GRANT UPDATE ON exposure TO friend; ALTER ROLE thief NOINHERIT", "is a member of the"),
        ("ALTER ROLE friend SUPERUSER; GRANT friend TO thief", "is a member of the role friend"),
        ("GRANT pg_execute_server_program TO thief", "is a member of the role pg_execute_server_program"),
        ("GRANT pg_write_all_data TO thief", "is a member of the role pg_write_all_data"),
        ("ALTER ROLE thief SUPERUSER", "is a superuser, or may make roles or replicas"),
        ("ALTER ROLE thief CREATEROLE", "is a superuser, or may make roles or replicas"),
        ("ALTER TABLE orders OWNER TO thief", "owns the table orders"),
        ("ALTER SCHEMA public OWNER TO thief", "owns the database or the schema of the tables"),
        ("GRANT UPDATE (cap_satoshi) ON exposure TO thief", "may write into the table exposure"),
        ("GRANT TRIGGER ON orders TO thief", "may write into the table orders"),
        (
            "GRANT CREATE ON SCHEMA public TO friend; SET ROLE friend; " + PLANTED + "; RESET ROLE",
            "could have another's",
        ),
    ],
)
async def test_account_that_could_do_more_than_place_and_read_is_refused_unchanged(
    dsn: str, make: str, says: str
) -> None:
    kept = "SELECT rolpassword FROM pg_authid WHERE rolname = 'thief'"
    owner = await asyncpg.connect(dsn)
    await owner.execute(f"CREATE ROLE friend; CREATE ROLE thief LOGIN; {make}")
    try:
        with pytest.raises(CannotStart, match=f"BUYDESK_DB_PROXY_DATABASE_URL: thief {says}.*: give db_proxy"):
            await migrate(dsn, livemode=False, cap_satoshi=1, account=Account("thief", "x"))
        assert await owner.fetchval(kept) is None
    finally:
        give_back = f"ALTER TABLE orders OWNER TO {USER}; ALTER SCHEMA public OWNER TO pg_database_owner"
        await owner.execute(f"{give_back}; DROP OWNED BY friend, thief; DROP ROLE friend, thief")
        await owner.close()


async def test_owner_is_no_account_for_db_proxy(dsn: str) -> None:
    with pytest.raises(CannotStart, match=f"{USER} is a superuser, or may make roles or replicas: give"):
        await migrate(dsn, livemode=False, cap_satoshi=1, account=Account(USER, "x"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/db",
        "postgresql://u@h/db",
        "postgresql://:p@h/db",
        "postgresql://u:p%C3%A4@h/d",
        "postgresql://u:%00@h/d",
    ],
)
def test_address_without_an_account_is_refused(url: str) -> None:
    with pytest.raises(CannotStart, match="BUYDESK_DB_PROXY_DATABASE_URL: must have the name of an account"):
        account_of(url)


def test_account_is_that_of_the_address() -> None:
    assert account_of("postgresql://db%5Fproxy:p%40%2F'x@h:5432/db?sslmode=require") == Account("db_proxy", "p@/'x")
