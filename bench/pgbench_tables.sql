-- The desk's tables as pgbench needs them: the same columns and unique indexes, without the reference to the price
-- records and without most checks, which would only slow it down.
CREATE TABLE exposure (
    singleton boolean PRIMARY KEY DEFAULT true,
    cap_satoshi bigint NOT NULL,
    used_satoshi bigint NOT NULL DEFAULT 0,
    last_number bigint NOT NULL DEFAULT 0,
    CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 10);
INSERT INTO exposure (cap_satoshi) VALUES (10000000000);

CREATE TABLE orders (
    number bigint PRIMARY KEY,
    amount_cents bigint NOT NULL,
    rate_e8 bigint NOT NULL,
    satoshi bigint NOT NULL,
    created_at timestamptz NOT NULL,
    price_as_of timestamptz NOT NULL,
    id uuid NOT NULL UNIQUE,
    price_id uuid NOT NULL,
    representation smallint NOT NULL,
    currency text NOT NULL,
    client text NOT NULL,
    client_order_id text
);
CREATE UNIQUE INDEX ON orders (client, client_order_id) WHERE client_order_id IS NOT NULL;

-- What every durable order has to wait for at the least: one committed insert.
CREATE TABLE bare (n int);
