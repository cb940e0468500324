-- name: page_from
-- The page that leaves out the $1 newest orders: an index seek, the same for every $1, because numbers have no gaps.
SELECT o.number, o.id, o.created_at, o.client, o.client_order_id, o.currency, o.amount_cents, o.rate_e8, o.satoshi,
       o.price_id, o.price_as_of, e.livemode, o.representation, e.last_number AS total
FROM exposure e
LEFT JOIN LATERAL (
    SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
           price_as_of, representation
    FROM orders WHERE number <= e.last_number - $1::bigint ORDER BY number DESC LIMIT $2::int
) o ON true

-- name: page_before
-- The $2 highest numbers below $1.
SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
       price_as_of, (SELECT livemode FROM exposure) AS livemode, representation
FROM orders
WHERE number < $1::bigint
ORDER BY number DESC LIMIT $2::int

-- name: page_after
-- The $2 lowest numbers above $1, lowest first.
SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
       price_as_of, (SELECT livemode FROM exposure) AS livemode, representation
FROM orders
WHERE number > $1::bigint
ORDER BY number LIMIT $2::int

-- name: orders_by_number
-- The orders with these numbers.
SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
       price_as_of, (SELECT livemode FROM exposure) AS livemode, representation
FROM orders
WHERE number = ANY ($1::bigint[])

-- name: order_by_id
-- The order with this id.
SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
       price_as_of, (SELECT livemode FROM exposure) AS livemode, representation
FROM orders
WHERE id = $1::uuid

-- name: order_by_key
-- The order that holds a client's key.
SELECT number, id, created_at, client, client_order_id, currency, amount_cents, rate_e8, satoshi, price_id,
       price_as_of, (SELECT livemode FROM exposure) AS livemode, representation
FROM orders
WHERE client = $1::text AND client_order_id = $2::text

-- name: exposure
-- The cap, what is used of it, how many orders there are, and whether they are real.
SELECT cap_satoshi, used_satoshi, last_number, livemode FROM exposure

-- name: price_record
-- The document of a price record.
SELECT document FROM price_records WHERE id = $1::uuid

-- name: place_orders
-- Places a batch; the function explains itself in its migration. Some arrays come as text; deadlines are Unix times.
SELECT outcomes, numbers, used_then, moment, cap, is_live
FROM place_orders(
    $1::text::uuid[], $2, $3, $4::text::text[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
    ARRAY(SELECT to_timestamp(deadline) FROM unnest($8::text::float8[]) AS deadline),
    $9::text::int[], $10::text::int[], $11::text::int[], $12, $13, $14, $15, $16
)

-- name: livemode
-- Whether the database holds real orders.
SELECT livemode FROM exposure

-- name: revision
-- How far the database is migrated, and whether it can be written to: a standby cannot.
SELECT version_num, current_setting('transaction_read_only')::boolean AS is_read_only FROM alembic_version
