"""What the stores in Redis do alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from buydesk.backends.redis.faults import FAULTS, meaning_of
from buydesk.errors import DeskError
from buydesk.settings.model import Settings

# What reading a document raises that is none, is another program's, or is nested too deeply.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class RedisStore:
    """Owns the client it is given (one that answers in bytes), and closes it.

    Whatever is wrong with Redis, or with what it holds, is `unavailable`; `kept` is what should be there: "a report".
    """

    def __init__(self, client: Redis, settings: Settings, unavailable: type[DeskError], kept: str) -> None:
        self._client = client
        self._seconds_max = settings.remote_seconds_max
        self._unavailable = unavailable
        self._kept = kept

    async def check(self) -> None:
        """Raises the "unavailable" error when Redis does not answer."""
        async with self._answering():
            await self._client.ping()

    async def close(self) -> None:
        """Closes the client."""
        await self._client.aclose()

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """While entered, Redis is asked: bounds the time and translates what goes wrong."""
        try:
            async with asyncio.timeout(self._seconds_max):
                yield
        except FAULTS as error:
            raise meaning_of(error, self._unavailable) from error
        except UNREADABLE as error:
            raise self._unavailable(f"Redis holds something that is not {self._kept}.") from error

    async def _run(self, script: str, keys: list[str], *arguments: Any) -> Any:
        """What a script returns."""
        return await self._client.eval(script, len(keys), *keys, *arguments)
