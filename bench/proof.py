"""Proof from the database: every 201 is there exactly once, and the counters are what the orders add up to."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from bench.processes import BenchFailed

QUIET_SECONDS = 0.1
QUIET_SECONDS_MAX = 20.0

# One statement, so that all of it is of one moment.
_ACCOUNT = """
SELECT e.used_satoshi, e.last_number, o.count, o.highest, o.satoshi
FROM exposure e, (SELECT count(*) AS count, coalesce(max(number), 0) AS highest,
                         coalesce(sum(satoshi), 0) AS satoshi FROM orders) o
"""
_FOUND = """
SELECT count(*) FROM orders
WHERE (client_order_id = ANY ($1::text[]) OR quote_id = ANY ($2::uuid[])) AND currency = 'EUR' AND amount_cents = 5
"""


@dataclass(frozen=True)
class Proof:
    """What was proved of a run: orders answered with 201 and found, and orders that wrk did not wait for."""

    answered: int
    unanswered: int


async def settled(database: "asyncpg.Connection[asyncpg.Record]") -> int:
    """The number of the last order, once no more come in."""
    until = time.monotonic() + QUIET_SECONDS_MAX
    last = await database.fetchval("SELECT last_number FROM exposure")
    while time.monotonic() < until:
        await asyncio.sleep(QUIET_SECONDS)
        now = await database.fetchval("SELECT last_number FROM exposure")
        if now == last:
            return int(now)
        last = now
    raise BenchFailed("orders keep coming in after the load has ended")


async def prove(
    database: "asyncpg.Connection[asyncpg.Record]",
    last_before: int,
    keys: Sequence[str],
    unanswered_max: int,
    *,
    are_quotes: bool = False,
) -> Proof:
    """Raises BenchFailed unless the orders placed after `last_before` are those with these keys, or by the quotes with
    these ids, each once, and at most `unanswered_max` others: requests that were under way when the load ended."""
    last = await settled(database)
    row = await database.fetchrow(_ACCOUNT)
    assert row is not None  # noqa: S101  # the exposure row is always there
    used, last_number, count, highest, satoshi = row
    if not last_number == count == highest or used != satoshi:
        raise BenchFailed(
            f"the ledger does not add up: {count} orders, the highest number {highest}, the last {last_number}; "
            f"used {used}, the sum {satoshi}"
        )
    found = await database.fetchval(_FOUND, *(([], keys) if are_quotes else (keys, [])), timeout=60)
    if len(set(keys)) != len(keys) or found != len(keys):
        raise BenchFailed(f"{len(keys)} keys were answered with 201, {len(set(keys))} different, and {found} are there")
    unanswered = last - last_before - len(keys)
    if not 0 <= unanswered <= unanswered_max:
        raise BenchFailed(f"{last - last_before} orders were placed and {len(keys)} answered with 201")
    return Proof(len(keys), unanswered)
