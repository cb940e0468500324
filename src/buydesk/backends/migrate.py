"""Brings a database up to date. SQLAlchemy and Alembic are loaded here and nowhere else: run it in a short process."""

import asyncio
import time
from importlib.resources import files

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.util import greenlet_spawn

from buydesk.errors import CannotStart

# Any number that no other program locks: the letters "buydesk".
_LOCK = int.from_bytes(b"buydesk", "big")
_LOCK_SECONDS_MAX = 60.0
_CONNECT_SECONDS_MAX = 10.0
_WAIT_POLL_SECONDS = 0.02
_NOT_THERE_YET = (OSError, asyncpg.CannotConnectNowError, asyncpg.InvalidCatalogNameError)


async def migrate(database_url: str, *, livemode: bool, cap_satoshi: int, wait_seconds: float = 0) -> None:
    """Runs what is missing, once, whoever starts first: lock and migrations share one connection and transaction.

    `cap_satoshi` is the cap of a new database; an existing one keeps its own. A server or database that is not there
    yet is waited for. Raises CannotStart when the database cannot be reached, belongs to the other mode or is of a
    newer version than this program.
    """
    give_up_at = time.monotonic() + wait_seconds

    async def connect() -> asyncpg.Connection:
        lock_timeout = f"{_LOCK_SECONDS_MAX:g}s"
        while True:
            try:
                return await asyncpg.connect(
                    database_url, timeout=_CONNECT_SECONDS_MAX, server_settings={"lock_timeout": lock_timeout}
                )
            except _NOT_THERE_YET:
                if time.monotonic() >= give_up_at:
                    raise
                await asyncio.sleep(_WAIT_POLL_SECONDS)

    engine = create_engine("postgresql+asyncpg://", connect_args={"async_creator_fn": connect}, poolclass=NullPool)
    try:
        # As SQLAlchemy's AsyncEngine does it; that one brings the whole ORM, a third of the time that migrating takes.
        await greenlet_spawn(_migrate, engine, livemode, cap_satoshi)
    except CommandError as error:
        raise CannotStart(f"the database is of a newer version than this program ({error}): update buydesk") from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, SQLAlchemyError, ValueError) as error:
        raise CannotStart(f"cannot use the database ({_said(error)}): check DATABASE_URL and its server") from error


def _migrate(engine: Engine, livemode: bool, cap_satoshi: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        _upgrade(connection)
        connection.execute(
            text("INSERT INTO exposure (livemode, cap_satoshi) VALUES (:livemode, :cap) ON CONFLICT DO NOTHING"),
            {"livemode": livemode, "cap": cap_satoshi},
        )
        stored = connection.execute(text("SELECT livemode FROM exposure")).scalar_one()
        if stored != livemode:
            has = "live" if stored else "sandbox"
            raise CannotStart(f"this database holds {has} orders: start with PRICE_FEED={has}, or use another one")


def _said(error: Exception) -> str:
    """What PostgreSQL or the network said, in one line. What the driver says of the URL might show the password."""
    cause = error.__cause__ if isinstance(error, SQLAlchemyError) else None
    told = (cause and cause.__cause__) or error
    is_harmless = isinstance(told, (asyncpg.PostgresError, OSError)) and str(told)
    return str(told).splitlines()[0] if is_harmless else type(told).__name__


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    # Alembic reads a % in a setting as the start of a reference.
    config.set_main_option("script_location", str(files("buydesk.sql") / "migrations").replace("%", "%%"))
    return config
