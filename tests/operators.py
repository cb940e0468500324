"""Operators as tests need them: who own a database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from buydesk.backends.postgres.registry import OwnDesk, own_desk
from buydesk.clients.keys import Key
from buydesk.clients.model import NewKey
from buydesk.clients.registry import Operator, create_key


@asynccontextmanager
async def operating(dsn: str) -> AsyncIterator[OwnDesk]:
    async with own_desk(dsn, Operator("tester", "here")) as desk:
        yield desk


async def key_for(dsn: str, client: str, *scopes: str) -> Key:
    """A new key of the client."""
    async with operating(dsn) as desk:
        return await create_key(desk.registry, NewKey(client, list(scopes)), "", desk.by)
