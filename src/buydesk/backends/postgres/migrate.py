"""Brings a database up to date. Alembic is loaded here and nowhere else: run it in a short process.

Alembic only writes down what is missing, as SQL ("offline"); asyncpg runs it. So there is one driver.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from buydesk.backends.postgres.accounts import EXCESS, TABLES, Account, statements
from buydesk.backends.postgres.sessions import FAULTS, connect
from buydesk.errors import CannotStart

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

# Any number that no other program locks: the letters "buydesk".
_LOCK = int.from_bytes(b"buydesk", "big")
_LOCK_SECONDS_MAX = 60.0
# Whoever reads or places waits behind a table's lock that is waited for: for so long at most, with a pause between. It
# is less than PostgreSQL waits before it ends a deadlock (deadlock_timeout, 1 s), maybe at the cost of an order.
_LOCK_WAIT_SECONDS = 0.5
_LOCK_PAUSE_SECONDS = 1.0
_HELD_UP = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
_CONNECT_SECONDS_MAX = 10.0
_WAIT_POLL_SECONDS = 0.02
_ADD_KEYS = "INSERT INTO price_keys (key) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
# The last one: no host takes writes, and one may be about to.
_NOT_THERE_YET = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.TargetServerAttributeNotMatched,
)


async def migrate(
    database_url: str,
    *,
    livemode: bool,
    cap_satoshi: int,
    price_keys: Sequence[str] = (),
    account: Account | None = None,
    wait_seconds: float = 0,
) -> None:
    """Runs what is missing, once, whoever starts first: lock and migrations share one connection and transaction.

    `cap_satoshi` is the cap of a new database; an existing one keeps its own. `price_keys` are added to those that
    price records may name. `account` is made for db_proxy, or gets its password and its rights anew. A server or
    database that is not there yet, or takes no writes yet, is waited for.

    Where others hold a lock that it needs for longer, it lets go of its own and tries again, for a minute.

    Raises CannotStart when the database cannot be reached, belongs to the other mode or is of a newer version than this
    program, and when the account could do more than place and read.
    """

    async def everything() -> None:
        async with connection.transaction():
            await _migrate(connection, livemode, cap_satoshi)
            if price_keys:
                await connection.execute(_ADD_KEYS, price_keys)
            if account is not None:
                await _let_in(connection, account)

    try:
        connection = await _connect(database_url, time.monotonic() + wait_seconds)
        try:
            await _when_free(everything)
        finally:
            await connection.close(timeout=_CONNECT_SECONDS_MAX)
    except CommandError as error:
        raise CannotStart(f"the database is of a newer version than this program ({error}): update buydesk") from error
    except FAULTS as error:
        raise CannotStart(f"cannot use the database ({_said(error)}): check DATABASE_URL and its server") from error


async def _connect(database_url: str, give_up_at: float) -> Connection:
    while True:
        try:
            return await connect(database_url, _CONNECT_SECONDS_MAX, must_write=True)
        except _NOT_THERE_YET:
            if time.monotonic() >= give_up_at:
                raise
            await asyncio.sleep(_WAIT_POLL_SECONDS)


async def _when_free(act: Callable[[], Awaitable[None]]) -> None:
    """Tries the act again while others hold locks that it needs; between two tries it holds none itself."""
    give_up_at = time.monotonic() + _LOCK_SECONDS_MAX
    while True:
        try:
            return await act()
        except _HELD_UP:
            if time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(_LOCK_PAUSE_SECONDS)


async def _migrate(connection: Connection, livemode: bool, cap_satoshi: int) -> None:
    await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT_SECONDS:g}s'")
    await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
    is_new = await connection.fetchval("SELECT to_regclass('alembic_version') IS NULL")
    revision = None if is_new else await connection.fetchval("SELECT version_num FROM alembic_version")
    if missing := _missing_since(revision):
        await connection.execute(missing)
    await connection.execute(
        "INSERT INTO exposure (livemode, cap_satoshi) VALUES ($1, $2) ON CONFLICT DO NOTHING", livemode, cap_satoshi
    )
    stored = await connection.fetchval("SELECT livemode FROM exposure")
    if stored != livemode:
        has = "live" if stored else "sandbox"
        raise CannotStart(f"this database holds {has} orders: start with PRICE_FEED={has}, or use another one")


async def _let_in(connection: Connection, account: Account) -> None:
    """Gives the account its password and its rights; raises CannotStart for one that has more than these anyway."""
    row = await connection.fetchrow(
        "SELECT current_schema() AS schema, EXISTS (SELECT FROM pg_roles WHERE rolname = $1) AS exists", account.name
    )
    assert row is not None  # noqa: S101  # always one
    for statement in statements(account, row["schema"], exists=row["exists"]):
        await connection.execute(statement)
    if excess := await connection.fetchval(EXCESS, account.name, TABLES):
        raise CannotStart(
            f"BUYDESK_DB_PROXY_DATABASE_URL: {account.name} {excess}: give db_proxy an account that may not"
        )


def _missing_since(revision: str | None) -> str:
    """The SQL from the revision on, "" when there is none; raises CommandError for a revision that is not known."""
    sql = io.StringIO()
    config = Config(output_buffer=sql)
    # Alembic reads a % in a setting as the start of a reference.
    config.set_main_option("script_location", str(files("buydesk.backends.postgres") / "migrations").replace("%", "%%"))
    command.upgrade(config, f"{revision or 'base'}:head", sql=True)
    return sql.getvalue()


def _said(error: Exception) -> str:
    """What PostgreSQL or the network said, in one line. What the driver says of the URL might show the password."""
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "no host of it takes writes"
    is_harmless = isinstance(error, (asyncpg.PostgresError, OSError)) and str(error)
    return str(error).splitlines()[0] if is_harmless else type(error).__name__
