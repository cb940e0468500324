"""A ledger recounted from its facts: its counters and numbers follow from the orders and closings that are stored."""

import asyncpg

# Every account beside what the orders and closings of its client, or of all, add up to.
_ACCOUNTS = """
WITH placed AS (
    SELECT client, count(*) AS orders, max(coalesce(client_number, number)) AS last, sum(satoshi) AS satoshi
    FROM orders GROUP BY client
), closed AS (
    SELECT c.client, count(*) AS closings, max(c.client_closing) AS last, sum(o.satoshi) AS satoshi
    FROM closings c JOIN orders o ON o.number = c.number AND o.client = c.client GROUP BY c.client
), account AS (
    SELECT '(desk)' AS name, last_number, last_closing, placed_satoshi, closed_satoshi FROM exposure
    UNION ALL SELECT name, last_number, last_closing, placed_satoshi, closed_satoshi FROM clients
), fact AS (
    SELECT '(desk)' AS name, (SELECT count(*) FROM orders) AS orders, (SELECT max(number) FROM orders) AS last_order,
           (SELECT sum(satoshi) FROM placed) AS placed, (SELECT count(*) FROM closings) AS closings,
           (SELECT max(closing) FROM closings) AS last_closing, (SELECT sum(satoshi) FROM closed) AS closed
    UNION ALL
    SELECT p.client, p.orders, p.last, p.satoshi, c.closings, c.last, c.satoshi
    FROM placed p LEFT JOIN closed c ON c.client = p.client
)
SELECT a, f FROM account a LEFT JOIN fact f ON f.name = a.name
WHERE (a.last_number, a.last_number, a.placed_satoshi, a.last_closing, a.last_closing, a.closed_satoshi)
    IS DISTINCT FROM (coalesce(f.orders, 0), coalesce(f.last_order, 0), coalesce(f.placed, 0),
                      coalesce(f.closings, 0), coalesce(f.last_closing, 0), coalesce(f.closed, 0))
"""
# Events whose numbers are not those of their place: among all, and among their client's.
_EVENTS = """
SELECT * FROM (
    SELECT e.*, row_number() OVER (ORDER BY event_number) AS nth,
           row_number() OVER (PARTITION BY client ORDER BY event_number) AS nth_of_client,
           count(*) FILTER (WHERE is_order) OVER (ORDER BY event_number) AS orders_until,
           count(*) FILTER (WHERE is_order) OVER (PARTITION BY client ORDER BY event_number) AS orders_of_client
    FROM (
        SELECT coalesce(event_number, number) AS event_number, client,
               coalesce(client_event_number, number) AS client_event_number, number AS own,
               coalesce(client_number, number) AS own_of_client, true AS is_order
        FROM orders
        UNION ALL
        SELECT event_number, client, client_event_number, closing, client_closing, false FROM closings
    ) e
) x
WHERE event_number <> nth OR client_event_number <> nth_of_client
    OR own <> CASE WHEN is_order THEN orders_until ELSE nth - orders_until END
    OR own_of_client <> CASE WHEN is_order THEN orders_of_client ELSE nth_of_client - orders_of_client END
"""
# Closings before their orders, and orders whose times go back.
_TIMES = """
SELECT o.number FROM orders o JOIN closings c ON c.number = o.number
WHERE c.closed_at < o.created_at OR c.event_number <= o.event_number OR c.client <> o.client
"""
# What clients have bought on the last day on which they did, where that is limited.
_DAYS = """
SELECT l.client, l.currency, l.cents, f.cents FROM daily_limits l CROSS JOIN LATERAL (
    SELECT coalesce(sum(o.amount_cents), 0) AS cents FROM orders o
    WHERE o.client = l.client AND o.currency = l.currency AND (o.created_at AT TIME ZONE 'UTC')::date = l.day
) f
WHERE l.cents <> f.cents
"""
# Orders whose rate is not the market's and the markup, rounded up to 8 places, or whose bitcoin is not what the amount
# buys at that rate, rounded up to the satoshi: the least that is enough. By products, which are exact.
_AMOUNTS = """
SELECT number FROM orders
WHERE coalesce(market_rate_e8, rate_e8)::numeric * (10000 + markup_bp) NOT BETWEEN (rate_e8 - 1)::numeric * 10000 + 1
        AND rate_e8::numeric * 10000
    OR amount_cents * 1e14 NOT BETWEEN (satoshi - 1)::numeric * rate_e8 + 1 AND satoshi::numeric * rate_e8
"""
# Orders by quotes whose price records were not valid when they were given, by clocks that may differ by 10 s; that were
# placed when the quotes had ended; or of quotes valid for more than 15 minutes.
_QUOTES = """
SELECT o.number FROM orders o LEFT JOIN price_records p ON p.id = o.price_id CROSS JOIN LATERAL (
    SELECT (p.document::json ->> 'expires_at')::timestamptz AS expires_at,
           (p.document::json ->> 'decided_at')::timestamptz AS decided_at
) r
WHERE o.quote_id IS NOT NULL AND (
    o.quoted_at < r.expires_at AND o.quoted_at >= r.decided_at - interval '10 s'
    AND o.created_at < o.quote_expires_at AND o.quote_expires_at <= o.quoted_at + interval '15 minutes'
) IS NOT TRUE
"""


async def assert_adds_up(dsn: str) -> None:
    """Fails unless all that is counted in the ledger is what its orders and closings say."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            for query in (_ACCOUNTS, _EVENTS, _TIMES, _DAYS, _AMOUNTS, _QUOTES):
                assert await connection.fetch(query) == []
    finally:
        await connection.close()
