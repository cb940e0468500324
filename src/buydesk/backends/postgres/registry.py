"""Clients, keys and the record of acts, for whoever owns the database."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

import asyncpg
import msgspec

from buydesk.backends.postgres.sessions import FAULTS, connect
from buydesk.backends.postgres.sql import QUERIES
from buydesk.clients.audit import Act
from buydesk.clients.keys import Key, new_key
from buydesk.clients.model import NewKey, StoredKey
from buydesk.errors import CannotStart
from buydesk.times import utc_now

CONNECT_SECONDS_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts, and from where."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Client:
    """A client: its cap and largest order in satoshi, None without such a limit, whether its cap counts open orders
    only, and what it has bought."""

    name: str
    cap_satoshi: int | None
    order_satoshi_max: int | None
    cap_counts_open: bool
    used_satoshi: int
    orders: int
    keys: int


@dataclass(frozen=True, slots=True)
class DeskCap:
    """What the desk may sell and has sold, in satoshi, and whether only open orders count."""

    cap_satoshi: int
    used_satoshi: int
    cap_counts_open: bool


class Registry:
    """What is done over one connection; each act is noted in its own transaction. Raises CannotStart."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", operator: Operator) -> None:
        self._connection = connection
        self._operator = operator

    async def _act(self, function: str, why: str, *arguments: object) -> None:
        places = ", ".join(f"${place}" for place in range(1, len(arguments) + 4))
        try:
            await self._connection.execute(
                f"SELECT {function}({places})",  # our own names
                *(self._operator.name, self._operator.address, why),
                *arguments,
            )
        except asyncpg.UniqueViolationError as error:
            raise CannotStart("there is a client of this name already") from error
        except asyncpg.ForeignKeyViolationError as error:
            raise CannotStart("there is no client of this name: see `buydesk clients list`") from error
        except asyncpg.CheckViolationError as error:
            raise CannotStart(_BROKEN.get(error.constraint_name or "", error.args[0])) from error

    async def create_client(self, name: str, cap_satoshi: int | None, order_satoshi_max: int | None, why: str) -> None:
        """Makes a client."""
        await self._act("create_client", why, name, cap_satoshi, order_satoshi_max)

    async def limit_client(self, name: str, changes: Mapping[str, int | None], why: str) -> Client:
        """Changes the limits of a client that are named, as fields of Client; None takes one away."""
        await self._client(name)
        await self._act("limit_client", why, name, msgspec.json.encode(changes).decode())
        return await self._client(name)

    async def _client(self, name: str) -> Client:
        for each in await self.clients():
            if each.name == name:
                return each
        raise CannotStart(f"there is no client {name}: see `buydesk clients list`")

    async def clients(self) -> list[Client]:
        """All clients, by name."""
        return [Client(**row) for row in await self._connection.fetch(QUERIES["clients"])]

    async def desk_cap(self) -> DeskCap:
        """The desk's cap."""
        [row] = await self._connection.fetch(QUERIES["desk_cap"])
        return DeskCap(**row)

    async def set_cap(self, cap_satoshi: int, why: str) -> DeskCap:
        """Sets the desk's cap, never below what is used of it."""
        await self._act("set_cap", why, cap_satoshi)
        return await self.desk_cap()

    async def set_cap_counts(self, client: str | None, why: str, *, open_only: bool) -> None:
        """Sets what the cap of a client, or of the desk, counts: open orders only, or all that were ever stored; never
        so that more is used than the cap."""
        if client is not None:
            await self._client(client)
        await self._act("set_cap_counts", why, client, open_only)

    async def create_key(self, new: NewKey, why: str) -> Key:
        """Makes a key; its text is known to nobody else and never shown again."""
        key = new_key(livemode=await self._connection.fetchval("SELECT livemode FROM exposure"))
        await self._act("create_key", why, key.id, new.client, key.digest, new.scopes, new.allow_from, new.expires_at)
        return key

    async def revoke_key(self, key_id: str, why: str) -> None:
        """Ends a key now."""
        await self.key(key_id)
        await self._act("end_key", why, key_id, None)

    async def rotate_key(self, key_id: str, overlap: timedelta, why: str) -> Key:
        """A new key that permits the same, and for as long from now on as the old one did; that ends after the
        overlap."""
        async with self._connection.transaction():
            lasts = await self._connection.fetchval(QUERIES["key_lasts"], key_id)  # before the record is
            old = await self.key(key_id)
            if not old.is_valid(utc_now()):
                raise CannotStart(f"the key {key_id} has ended: create one")
            ends_at = None if lasts is None else utc_now() + lasts
            key = await self.create_key(NewKey(old.client, old.scopes, old.allow_from, ends_at), why)
            await self._act("end_key", why, key_id, utc_now() + overlap)
        return key

    async def key(self, key_id: str) -> StoredKey:
        """The key with this id."""
        row = await self._connection.fetchrow(QUERIES["key"], key_id)
        if row is None:
            raise CannotStart(f"there is no key {key_id}: see `buydesk keys list`")
        return StoredKey(**row)

    async def keys(self, client: str | None) -> list[StoredKey]:
        """The keys of a client, or all, the newest last."""
        return [StoredKey(**row) for row in await self._connection.fetch(QUERIES["keys"], client)]

    async def acts(self) -> list[Act]:
        """What was done, the first one first."""
        return [Act(**row) for row in await self._connection.fetch(QUERIES["acts"])]


_BROKEN = {
    "clients_order_satoshi_max_check": "a client's largest order is more than 0",
    "clients_name_check": "a client's name has 1 to 32 characters: a to z, 0 to 9 and, but for the first, -",
    "client_used_within_cap": "the client has bought more than its cap would be",
    "used_within_cap": "more is sold already than the cap would be",
    "exposure_cap_satoshi_check": "the cap is at most 21,000,000 BTC",
    "clients_cap_satoshi_check": "a cap is at most 21,000,000 BTC",
}


@asynccontextmanager
async def registry_at(database_url: str, operator: Operator) -> AsyncIterator[Registry]:
    """The registry of a database; raises CannotStart when it cannot be used."""
    try:
        connection = await connect(database_url, CONNECT_SECONDS_MAX, must_write=True)
    except FAULTS as error:
        raise CannotStart(f"cannot use the database ({type(error).__name__}): check it and its server") from error
    try:
        yield Registry(connection, operator)
    except (asyncpg.UndefinedFunctionError, asyncpg.UndefinedTableError) as error:
        raise CannotStart("the database is of an older version: run `buydesk migrate`") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise CannotStart("the account in DATABASE_URL may not do this: use that of the database's owner") from error
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        connection.terminate()  # what a driver makes of a connection that was cut depends on the moment
        said = f"the database failed meanwhile ({type(error).__name__}): `buydesk audit` shows whether it was done"
        raise CannotStart(said) from error
    finally:
        await connection.close(timeout=CONNECT_SECONDS_MAX)
