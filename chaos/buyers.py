"""Buyers: orders at a steady rate, whatever becomes of those before (an open load), each with a key of its own."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

import aiohttp

from chaos.journal import Answer, Journal

CLIENT_SECONDS_MAX = 15.0


@dataclass(frozen=True)
class Load:
    """So many orders a second for so many seconds. `retries` are sent at once when an order is refused or lost."""

    orders_per_second: float
    seconds: float
    retries: int = 0


class Buyers:
    """Places orders at a URL; `outcomes` counts what each order ended in, "placed" or a code."""

    def __init__(self, url: str, journal: Journal, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._journal = journal
        self._random = random.Random(seed)  # noqa: S311  # chance that can be had again
        self._count = 0

    async def buy(self, load: Load) -> None:
        """Returns when the last of them has its answer."""
        started = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for number in range(int(load.orders_per_second * load.seconds)):
                await asyncio.sleep(started + number / load.orders_per_second - time.monotonic())
                group.create_task(self._order(session, load.retries))

    async def buy_one(self) -> Answer:
        """One order, sent once."""
        async with aiohttp.ClientSession() as session:
            return await self._order(session, 0)

    async def _order(self, session: aiohttp.ClientSession, retries: int) -> Answer:
        self._count += 1
        key = f"chaos-{self._random.randrange(2**64):016x}-{self._count}"
        body = {"currency": self._random.choice(("EUR", "GBP", "USD")), "amount": f"0.{self._random.randint(5, 99):02}"}
        for _ in range(retries + 1):
            self._journal.sent(key, body)
            answer = await self._ask(session, key, body)
            self._journal.answered(key, answer)
            if answer.status == 201:
                break
        self.outcomes["placed" if answer.status == 201 else (answer.document or {}).get("code", "no_answer")] += 1
        return answer

    async def _ask(self, session: aiohttp.ClientSession, key: str, body: dict[str, str]) -> Answer:
        timeout = aiohttp.ClientTimeout(total=CLIENT_SECONDS_MAX)
        try:
            async with session.post(
                self._url, json=body, headers={"Idempotency-Key": key}, timeout=timeout
            ) as response:
                return Answer(response.status, await response.json(content_type=None))
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            return Answer(503, {"code": "no_connection"})  # certainly not sent
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return Answer(0)
