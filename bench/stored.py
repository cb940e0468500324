"""Many stored orders, without placing them: straight into a desk's tables, as if it had placed them."""

import time
from collections.abc import Callable

import asyncpg

ORDERS_A_TRANSACTION = 250_000
SECONDS_MAX = 600.0

# Copies of order 1, so that its price record fits; keys and ids as real ones are: the ids grow with time, the keys are
# scattered. The exposure row is locked as the desk itself locks it.
_COPY = """
WITH e AS (SELECT last_number FROM exposure FOR UPDATE)
INSERT INTO orders (number, client_number, event_number, client_event_number, amount_cents, market_rate_e8, rate_e8,
                    satoshi, received_at, created_at, price_as_of, id, price_id, representation, currency, client,
                    client_order_id)
SELECT e.last_number + i, e.last_number + i, e.last_number + i, e.last_number + i, o.amount_cents, o.market_rate_e8,
       o.rate_e8, o.satoshi, clock_timestamp(), clock_timestamp(), o.price_as_of, uuidv7(), o.price_id,
       o.representation, o.currency, o.client, gen_random_uuid()::text
FROM e, orders o, generate_series(1, $1::bigint) i
WHERE o.number = 1
"""
# All orders of a bench's desk are anonymous's, and none is closed.
_COUNT = """
UPDATE {table} SET last_number = last_number + $1::bigint,
                   placed_satoshi = placed_satoshi + $1::bigint * (SELECT satoshi FROM orders WHERE number = 1)
"""


async def store(database: "asyncpg.Connection[asyncpg.Record]", count: int, say: Callable[[str], None]) -> None:
    """Adds so many orders; afterwards the load has left nothing behind for the server to do."""
    started = time.monotonic()
    # Their price record is there: it need not be looked up for each.
    await database.execute("SET session_replication_role = replica")
    stored = 0
    while stored < count:
        some = min(ORDERS_A_TRANSACTION, count - stored)
        async with database.transaction():
            await database.execute(_COPY, some, timeout=SECONDS_MAX)
            for table in ("exposure", "clients"):
                await database.execute(_COUNT.format(table=table), some)
        stored += some
        say(f"  {stored:,} of {count:,} orders after {time.monotonic() - started:.0f} s")
    await database.execute("SET session_replication_role = origin")
    await database.execute("VACUUM (ANALYZE) orders", timeout=SECONDS_MAX)
    await database.execute("CHECKPOINT", timeout=SECONDS_MAX)
