"""Buyers: orders at a steady rate, whatever becomes of those before (an open load), each with a key of its own."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

from chaos.journal import Answer, Journal

CLIENT_SECONDS_MAX = 15.0
NORMAL_SECONDS = 0.5
RECOVERY_SECONDS_MAX = 60.0
_TIMEOUT = aiohttp.ClientTimeout(total=CLIENT_SECONDS_MAX)


@dataclass(frozen=True)
class Load:
    """So many orders a second for so many seconds. `retries` are sent, after a pause, when an order is refused or
    lost."""

    orders_per_second: float
    seconds: float
    retries: int = 0
    pause_seconds: float = 0.0


@dataclass(frozen=True)
class Wish:
    """An order that somebody wants to place, with its key: it may be sent more than once."""

    key: str
    body: dict[str, str]


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
                group.create_task(self._order(session, self.wish(), load))

    async def buy_one(self) -> Answer:
        """One order, sent once."""
        return await self.send(self.wish())

    def wish(self) -> Wish:
        """Another order, not sent yet."""
        self._count += 1
        key = f"chaos-{self._random.randrange(2**64):016x}-{self._count}"
        body = {"currency": self._random.choice(("EUR", "GBP", "USD")), "amount": f"0.{self._random.randint(5, 99):02}"}
        return Wish(key, body)

    async def send(self, wish: Wish) -> Answer:
        """Sends an order once."""
        async with aiohttp.ClientSession() as session:
            return await self._order(session, wish, Load(0, 0))

    async def look_up(self, url: str, wish: Wish, *, is_final: bool) -> Answer:
        """Looks an order up by its key; `is_final` after the time in `final_after`."""
        async with aiohttp.ClientSession() as session:
            answer = await _ask(session, "GET", url, params={"client_order_id": wish.key})
        self._journal.looked_up(wish.key, answer, is_final=is_final)
        return answer

    async def until_normal(self) -> float:
        """The seconds until three orders in a row were placed within half a second each."""
        started, well = time.monotonic(), 0
        while well < 3 and time.monotonic() - started < RECOVERY_SECONDS_MAX:
            since = time.monotonic()
            answer = await self.buy_one()
            well = well + 1 if answer.status == 201 and time.monotonic() - since < NORMAL_SECONDS else 0
        return time.monotonic() - started

    async def _order(self, session: aiohttp.ClientSession, wish: Wish, load: Load) -> Answer:
        for left in range(load.retries, -1, -1):
            self._journal.sent(wish.key, wish.body)
            headers = {"Idempotency-Key": wish.key}
            answer = await _ask(session, "POST", self._url, json=wish.body, headers=headers)
            self._journal.answered(wish.key, answer)
            if answer.status == 201:
                break
            if left:
                await asyncio.sleep(load.pause_seconds)
        self.outcomes["placed" if answer.status == 201 else (answer.document or {}).get("code", "no_answer")] += 1
        return answer


async def _ask(session: aiohttp.ClientSession, method: str, url: str, **what: Any) -> Answer:
    try:
        async with session.request(method, url, timeout=_TIMEOUT, **what) as response:
            return Answer(response.status, await response.json(content_type=None))
    except (aiohttp.ClientConnectorError, ConnectionRefusedError):
        return Answer(503, {"code": "no_connection"})  # certainly not sent
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return Answer(0)
