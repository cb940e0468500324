"""Real databases to test with: fresh, migrated, filled."""

import itertools
from typing import TYPE_CHECKING, Any

import asyncpg

from buydesk.backends.postgres.accounts import Account
from buydesk.backends.postgres.migrate import migrate
from buydesk.embedded.postgres import USER
from buydesk.money import SATOSHI_PER_BTC
from tests.builders import settings

if TYPE_CHECKING:
    from tests.conftest import PostgresServers

CAP_SATOSHI = 100 * SATOSHI_PER_BTC
# The Unix times between which a ledger's clock may be.
ANY_TIME = (0.0, 2.0**32)
DB_PROXY = Account("db_proxy_of_tests", "secret-of-tests")
# A copy of order 1 as order 2, as nobody may store one.
COPY_ORDER = (
    "INSERT INTO orders (number, client_number, event_number, client_event_number, amount_cents, rate_e8, "
    "market_rate_e8, satoshi, received_at, created_at, price_as_of, id, price_id, representation, currency, client) "
    "SELECT 2, 2, 2, 2, amount_cents, rate_e8, rate_e8, satoshi, received_at, created_at, price_as_of, "
    "gen_random_uuid(), {price_id}, representation, currency, client FROM orders WHERE number = 1"
)
# Clients that every database of the tests has beside anonymous.
CLIENTS = ("other", "third")
_names = itertools.count()


def as_db_proxy(dsn: str) -> str:
    """The same database for the account of db_proxy."""
    scheme, _, rest = dsn.partition(f"{USER}@")
    assert rest
    return f"{scheme}{DB_PROXY.name}:{DB_PROXY.password}@{rest}"


class Databases:
    """Fresh, migrated databases, copied from a template of each server."""

    def __init__(self, servers: "PostgresServers") -> None:
        self._servers = servers
        self._templates: set[tuple[int, bool]] = set()

    async def new(self, version: Any = 18, *, livemode: bool = False) -> str:
        """The DSN of a database of its own."""
        server = await self._servers.server(version)
        maintenance = await asyncpg.connect(server.dsn_of("postgres"))
        try:
            template = "template_live" if livemode else "template_ledger"
            if (version, livemode) not in self._templates:
                await maintenance.execute(f"CREATE DATABASE {template}")
                keys = settings().accepted_price_keys
                url = server.dsn_of(template)
                await migrate(url, livemode=livemode, cap_satoshi=CAP_SATOSHI, price_keys=keys, account=DB_PROXY)
                await run(url, "INSERT INTO clients (name) SELECT unnest($1::text[])", CLIENTS)
                self._templates.add((version, livemode))
            name = f"ledger_{next(_names)}"
            await maintenance.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        finally:
            await maintenance.close()
        return server.dsn_of(name)


async def run(dsn: str, statement: str, *arguments: Any) -> None:
    """Runs a statement as the database's owner."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement, *arguments)
    finally:
        await connection.close()


async def fill(dsn: str, orders: int, others: int = 0) -> None:
    """Stores many orders of 0.20 EUR, 1000 satoshi each, in a new database; PostgreSQL has no statistics of them.

    With `others`, every other order is one of so many further clients' in turn.
    """
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(
            f"""
            ALTER TABLE orders SET (autovacuum_enabled = off);
            SET session_replication_role = replica; -- 200,000 foreign keys take their time
            INSERT INTO price_records (id, document)
            VALUES ('00000000-0000-4000-8000-000000000000', '{{"signature":{{"key":"filled"}}}}');
            INSERT INTO orders (number, client_number, event_number, client_event_number, amount_cents, rate_e8,
                                market_rate_e8, satoshi, received_at, created_at, price_as_of, id, price_id,
                                representation, currency, client, client_order_id)
            SELECT n, row_number() OVER (PARTITION BY client ORDER BY n), n,
                   row_number() OVER (PARTITION BY client ORDER BY n), 20, 2000000000000, 2000000000000, 1000, now(),
                   now(), now(), gen_random_uuid(), p.id, 1, 'EUR', client, 'filled-' || n
            FROM generate_series(1, {orders}) AS n, price_records p, LATERAL (
                SELECT CASE WHEN {others} > 0 AND n % 2 = 0 THEN 'client-' || n / 2 % {max(others, 1)}
                       ELSE 'anonymous' END AS client
            ) c;
            UPDATE exposure SET placed_satoshi = {orders}::bigint * 1000, last_number = {orders};
            INSERT INTO clients (name) SELECT 'client-' || n FROM generate_series(0, {others} - 1) AS n;
            UPDATE clients SET placed_satoshi = o.orders * 1000, last_number = o.orders
            FROM (SELECT client, count(*) AS orders FROM orders GROUP BY client) o
            WHERE name = o.client;
            """  # noqa: S608
        )
    finally:
        await connection.close()
