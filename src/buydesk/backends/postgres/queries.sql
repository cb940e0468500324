-- {order} stands for an order's columns, in the order of the fields of `Order`; {placed} for the same as of its placing;
-- {stored} for those of them that the table orders has; {closing} for the join with what became of it. sql.py puts them
-- in, and for {key} a key's columns, for {client} a client's, for {webhook} those of an endpoint.

-- name: page_from
-- The page that leaves out the $1 newest orders: an index seek, the same for every $1, because numbers have no gaps.
SELECT {order}, e.last_number AS total
FROM exposure e
LEFT JOIN LATERAL (
    SELECT {stored} FROM orders
    WHERE number <= e.last_number - $1::bigint ORDER BY number DESC LIMIT $2::int
) o ON true
{closing}

-- name: page_before
-- The $2 highest numbers below $1.
SELECT {order} FROM orders o CROSS JOIN exposure e
{closing}
WHERE o.number < $1::bigint
ORDER BY o.number DESC LIMIT $2::int

-- name: page_after
-- The $2 lowest numbers above $1, lowest first.
SELECT {order} FROM orders o CROSS JOIN exposure e
{closing}
WHERE o.number > $1::bigint
ORDER BY o.number LIMIT $2::int

-- name: client_page_from
-- The page that leaves out the $2 newest orders of the client $1: a seek too, by its own count. Without an account: none.
SELECT {order}, coalesce(c.last_number, 0) AS total
FROM exposure e
LEFT JOIN clients c ON c.name = $1::text
LEFT JOIN LATERAL (
    SELECT {stored} FROM orders
    WHERE client = $1::text AND coalesce(client_number, number) <= c.last_number - $2::bigint
    ORDER BY coalesce(client_number, number) DESC LIMIT $3::int
) o ON true
{closing}

-- name: client_page_before
-- The $3 highest of the client's own numbers below $2.
SELECT {order} FROM orders o CROSS JOIN exposure e
{closing}
WHERE o.client = $1::text AND coalesce(o.client_number, o.number) < $2::bigint
ORDER BY coalesce(o.client_number, o.number) DESC LIMIT $3::int

-- name: client_page_after
-- The $3 lowest of the client's own numbers above $2, lowest first.
SELECT {order} FROM orders o CROSS JOIN exposure e
{closing}
WHERE o.client = $1::text AND coalesce(o.client_number, o.number) > $2::bigint
ORDER BY coalesce(o.client_number, o.number) LIMIT $3::int

-- name: orders_by_number
-- The orders with these numbers, as they were placed.
SELECT {placed} FROM orders o CROSS JOIN exposure e
WHERE o.number = ANY ($1::bigint[])

-- name: order_by_id
-- The order with this id, if $2 is null or its client, or a row of nulls; and whether there are standbys, this one maybe.
SELECT {order},
       (current_setting('synchronous_standby_names') <> '' OR pg_is_in_recovery()) AS has_standbys
FROM exposure e
-- The limit keeps the planner from looking for it among the client's.
LEFT JOIN LATERAL (SELECT {stored} FROM orders WHERE id = $1::uuid LIMIT 1) o ON $2::text IS NULL OR o.client = $2::text
{closing}

-- name: order_by_key
-- The order that holds a client's key, or a row of nulls; and whether there are standbys, this one maybe.
SELECT {order},
       (current_setting('synchronous_standby_names') <> '' OR pg_is_in_recovery()) AS has_standbys
FROM exposure e LEFT JOIN orders o ON o.client = $1::text AND o.client_order_id = $2::text
{closing}

-- name: all_placed
-- Nothing, once the batches that are being stored now are committed or rolled back. See place_batch.
SELECT pg_advisory_xact_lock_shared(31644362927074919)

-- name: durable_point
-- A row, once all committed so far is where this server promises to have it; none if another waits $1 s for that.
SELECT pg_logical_emit_message(true, 'buydesk', '')
WHERE NOT EXISTS (
    SELECT FROM pg_stat_activity
    WHERE query = current_query() AND wait_event = 'SyncRep'
      AND query_start < clock_timestamp() - make_interval(secs => $1)
)

-- name: exposure
-- The cap, what is used of it, how many orders there are, and whether they are real.
SELECT cap_satoshi, used_satoshi, last_number, livemode FROM exposure

-- name: client_exposure
-- The same of a client, whose cap may be null.
SELECT cap_satoshi, used_satoshi, last_number FROM clients WHERE name = $1::text

-- name: price_record
-- The document of a price record.
SELECT document FROM price_records WHERE id = $1::uuid

-- name: price_records
-- The documents of price records.
SELECT document FROM price_records WHERE id = ANY ($1::uuid[])

-- name: keep_price_record
-- Stores the document of a price record; whether it was not there before, and whether commits wait for standbys.
SELECT keep_price_record($1::uuid, $2::text) AS is_new,
       current_setting('synchronous_standby_names') <> '' AS has_standbys

-- name: place_items
-- Places a batch; schema.sql explains the function. Some arrays come as text; times are Unix times.
SELECT outcomes, numbers, client_numbers, used_then, limits_then, moment, is_live,
       current_setting('synchronous_standby_names') <> '' AS has_standbys
FROM place_items(
    $1::text::uuid[], $2::text::int[], $3, $4::text::text[], $5::text::bigint[], $6::text::bigint[], $7::text::bigint[],
    ARRAY(SELECT to_timestamp(deadline) FROM unnest($8::text::float8[]) AS deadline),
    $9::text::float8[], $10::text::smallint[], $11, $12, $13::text::int[], $14::text::int[], $15::text::int[],
    $16, $17, $18, $19, $20, to_timestamp($21::float8), to_timestamp($22::float8), $23::text::bigint[], $24::text::int[],
    $25::text::boolean[], $26::text::uuid[], $27::timestamptz[]
)

-- name: place_nothing
-- The cap, once placing has taken all its locks and been committed.
SELECT cap
FROM place_items('{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
                  '{}', '{}', '-infinity', 'infinity')

-- name: close_orders
-- Settles and cancels orders; schema.sql explains the function.
SELECT outcomes, numbers, current_setting('synchronous_standby_names') <> '' AS has_standbys
FROM close_orders($1::uuid[], $2::text[], $3::text[])

-- name: closed_orders
-- The orders with these numbers, as they are now.
SELECT {order} FROM orders o CROSS JOIN exposure e
{closing}
WHERE o.number = ANY ($1::bigint[])

-- name: accepted_after
-- The $3 lowest numbers above $1 that are open, out of the next $2; a row of nulls if there are none.
SELECT {placed}, e.last_number AS total
FROM exposure e
LEFT JOIN LATERAL (
    SELECT {stored} FROM orders i
    LEFT JOIN LATERAL (SELECT true AS is_closed FROM closings x WHERE x.number = i.number LIMIT 1) c ON true
    WHERE i.number > $1::bigint AND i.number <= $1::bigint + $2::int AND c.is_closed IS NULL
    ORDER BY i.number LIMIT $3::int
) o ON true

-- name: last_events
-- The numbers of the newest events of the desk, under no name, and of the clients $1.
SELECT NULL AS client, last_number + last_closing AS sequence FROM exposure
UNION ALL
SELECT name, last_number + last_closing FROM clients WHERE name = ANY ($1::text[])

-- name: events_after
-- The $2 events after the $1-th, in any order: two seeks, as closings in schema.sql explains.
SELECT {placed}, coalesce(o.event_number, o.number) AS sequence
FROM exposure e CROSS JOIN LATERAL (
    SELECT $1::bigint - coalesce((
        SELECT closing FROM closings WHERE event_number <= $1::bigint ORDER BY event_number DESC LIMIT 1
    ), 0) AS last_number
) seen
JOIN orders o ON o.number > seen.last_number AND o.number <= seen.last_number + $2::int
WHERE coalesce(o.event_number, o.number) <= $1::bigint + $2::int
UNION ALL
SELECT {order}, x.event_number AS sequence
FROM closings x JOIN orders o ON o.number = x.number CROSS JOIN exposure e
WHERE x.event_number > $1::bigint AND x.event_number <= $1::bigint + $2::int

-- name: client_events_after
-- The $3 events of the client $1 after the $2-th of its own, in any order: the same two seeks, by its own counts.
SELECT {placed}, coalesce(o.client_event_number, o.number) AS sequence
FROM exposure e CROSS JOIN LATERAL (
    SELECT $2::bigint - coalesce((
        SELECT client_closing FROM closings WHERE client = $1::text AND client_event_number <= $2::bigint
        ORDER BY client_event_number DESC LIMIT 1
    ), 0) AS last_number
) seen
JOIN orders o ON o.client = $1::text AND coalesce(o.client_number, o.number) > seen.last_number
    AND coalesce(o.client_number, o.number) <= seen.last_number + $3::int
WHERE coalesce(o.client_event_number, o.number) <= $2::bigint + $3::int
UNION ALL
SELECT {order}, x.client_event_number AS sequence
FROM closings x JOIN orders o ON o.number = x.number CROSS JOIN exposure e
WHERE x.client = $1::text AND x.client_event_number > $2::bigint AND x.client_event_number <= $2::bigint + $3::int

-- name: price_anchors
-- The last published prices in the currencies $1.
SELECT currency, rate_e8, as_of, dollar_e8 FROM price_anchors WHERE currency = ANY ($1::text[])

-- name: keep_price_anchors
-- Keeps prices of the currencies $1, unless a later one is kept: $2 are the rates, $3 of when, $4 the dollar's rates then.
SELECT keep_price_anchors($1::text[], $2::bigint[], $3::timestamptz[], $4::bigint[])

-- name: price_confirmations
-- The confirmations of prices in the currencies $1 that have not ended, the one that ends last first: $2 of them.
SELECT currency, low_e8, high_e8, why, expires_at FROM price_confirmations
WHERE expires_at > statement_timestamp() AND currency = ANY ($1::text[])
ORDER BY expires_at DESC LIMIT $2::int

-- name: livemode
-- Whether the database holds real orders.
SELECT livemode FROM exposure

-- name: revision
-- The database's revision, whether it can only be read, as a standby, whether commits wait for standbys, and its time.
SELECT version_num, clock_timestamp() AS moment, current_setting('transaction_read_only')::boolean AS is_read_only,
       current_setting('synchronous_standby_names') <> '' AS has_standbys
FROM alembic_version

-- name: unknown_price_keys
-- Those of the public keys $1 that records must not name yet.
SELECT given.key FROM unnest($1::text[]) AS given (key)
WHERE NOT EXISTS (SELECT FROM price_keys k WHERE k.key = given.key)

-- name: session
-- Sets each of the settings named $1 to the value beside it in $2.
SELECT set_config(name, value, false) FROM unnest($1::text[], $2::text[]) AS s (name, value)

-- name: key
-- The key with this id.
SELECT {key} FROM keys k WHERE id = $1::text

-- name: keys
-- The keys of a client, or all, the one that was made last first: $2 of them.
SELECT {key} FROM keys k WHERE coalesce(client = $1::text, true) ORDER BY created_at DESC LIMIT $2::int

-- name: has_keys
-- Whether there was ever a key of another client than $1.
SELECT EXISTS (SELECT FROM keys WHERE client <> $1::text) AS has_keys

-- name: clients
-- Clients after the name $1, and how many keys of each are valid: $2 of them.
SELECT {client} FROM clients c WHERE name > $1::text ORDER BY name LIMIT $2::int

-- name: client
-- The client $1.
SELECT {client} FROM clients c WHERE name = $1::text

-- name: desk
-- The desk's cap, what is used of it, whether it counts open orders only, and whether the desk is paused.
SELECT livemode, cap_satoshi, used_satoshi, cap_counts_open, paused, last_number AS orders FROM exposure

-- name: acts
-- What operators did after the act $1, the first one first: $2 of it.
SELECT number, at, operator, address, act, subject, why, before, after, hash FROM audit
WHERE number > $1::bigint ORDER BY number LIMIT $2::int

-- name: act
-- What the operator $1 at $2 does, because of $3: the act $4, with the JSON $5.
SELECT act($1::text, $2::text, $3::text, $4::text, $5::text::jsonb)::text AS said

-- name: act_by_key
-- The same for whoever shows the key $1.
SELECT act_by_key($1::text, $2::text, $3::text, $4::text, $5::text::jsonb)::text AS said

-- name: note_refusals
-- Notes refusals, one list a column.
SELECT note_refusals($1::timestamptz[], $2::text[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::bigint[])

-- name: refusals
-- The newest refusals, $1 of them, of what was not placed later.
SELECT at, client, order_id, client_order_id, code, currency, amount_cents FROM refusals r
WHERE NOT EXISTS (SELECT FROM orders o WHERE o.id = r.order_id)
ORDER BY number DESC LIMIT $1::int

-- name: client_refusals
-- The same of the client $1: $2 of them.
SELECT at, client, order_id, client_order_id, code, currency, amount_cents FROM refusals r
WHERE client = $1::text AND NOT EXISTS (SELECT FROM orders o WHERE o.id = r.order_id)
ORDER BY number DESC LIMIT $2::int

-- name: note_keys_used
-- Notes that these keys were used today.
SELECT note_keys_used($1::text[])

-- name: change_webhook
-- Makes, changes, deletes or rewinds an endpoint, or gives it a new secret: $1 with the JSON $2. The endpoint, if there is.
SELECT {webhook} FROM change_webhook($1::text, $2::text::jsonb) w

-- name: webhooks
-- The endpoints of the client $1, the oldest first.
SELECT {webhook} FROM webhooks w WHERE client = $1::text ORDER BY client, created_at

-- name: webhook
-- The endpoint $2 of the client $1.
SELECT {webhook} FROM webhooks w WHERE client = $1::text AND id = $2::uuid

-- name: webhook_deliveries
-- The newest attempts of the endpoint $2 of the client $1 before the number $3: $4 of them.
SELECT number, event, type, sequence, at, attempt, outcome, status, milliseconds FROM webhook_deliveries d
WHERE webhook = $2::uuid AND number < $3::bigint
    AND EXISTS (SELECT FROM webhooks w WHERE w.id = d.webhook AND w.client = $1::text)
ORDER BY webhook DESC, number DESC LIMIT $4::int

-- name: note_deliveries
-- Notes attempts beside the endpoint's turns: $2 is a JSON list.
SELECT note_deliveries($1::uuid, $2::text::jsonb)

-- name: event_of_order
-- The client's number of the event that its order $2 was placed or, for $3, what became of it. None if it did not happen.
SELECT coalesce(o.client_event_number, o.number) AS sequence FROM orders o
WHERE o.id = $2::uuid AND o.client = $1::text AND $3::text = 'placed'
UNION ALL
SELECT x.client_event_number FROM orders o JOIN closings x ON x.number = o.number
WHERE o.id = $2::uuid AND o.client = $1::text AND x.status = $3::text

-- name: take_webhooks
-- Makes the lease $1 of endpoints whose turn it is, to whoever has the keys $2: $3 of them, for $4 seconds.
SELECT {webhook} FROM take_webhooks($1::uuid, $2::text[], $3::int, $4::float8) w

-- name: renew_webhooks
-- Makes the leases $2 of the endpoints $1 last $3 seconds from now; of which endpoints.
SELECT id FROM renew_webhooks($1::uuid[], $2::uuid[], $3::float8) AS id

-- name: report_turn
-- What is told under the lease $1 of the turn of the endpoint $2; schema.sql explains the function.
SELECT report_turn($1::uuid, $2::uuid, $3::bigint, $4::int, $5::float8, $6::text, $7::float8, $8::text::jsonb) AS counts

-- name: webhook_totals
-- Enabled endpoints: how many, how many fail, how many have another key than $1, what those that do not fail have not got.
SELECT count(w.id) AS enabled, count(w.id) FILTER (WHERE w.failures > 0) AS failing,
       count(w.id) FILTER (WHERE w.secrets -> 0 ->> 'key' <> ALL ($1::text[])) AS without_key,
       coalesce(sum(c.last_number + c.last_closing - w.delivered) FILTER (WHERE w.failures = 0), 0)::bigint AS waiting
FROM webhooks w JOIN clients c ON c.name = w.client WHERE w.disabled IS NULL
