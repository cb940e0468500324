-- One row: what the desk may sell, what it has sold, and how many orders that were. Whoever places orders locks it first.
CREATE TABLE exposure (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    livemode boolean NOT NULL,
    cap_satoshi bigint NOT NULL CHECK (cap_satoshi BETWEEN 0 AND 2100000000000000),
    used_satoshi bigint NOT NULL DEFAULT 0,
    last_number bigint NOT NULL DEFAULT 0 CHECK (last_number >= 0),
    CONSTRAINT used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 10);  -- room for new versions of the row on its own page

-- The price records that orders were priced with, each stored with the first order that used it.
CREATE TABLE price_records (
    id uuid PRIMARY KEY,
    as_of timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    document text NOT NULL
);

-- The orders. They are inserted once and never changed; number is without gaps and in the order of commit.
CREATE TABLE orders (
    number bigint PRIMARY KEY CHECK (number > 0),
    amount_cents bigint NOT NULL CHECK (amount_cents BETWEEN 1 AND 99999999999),
    rate_e8 bigint NOT NULL CHECK (rate_e8 > 0),
    satoshi bigint NOT NULL CHECK (satoshi > 0),
    created_at timestamptz NOT NULL,
    price_as_of timestamptz NOT NULL,
    id uuid NOT NULL CONSTRAINT orders_id_unique UNIQUE,
    price_id uuid NOT NULL REFERENCES price_records (id),
    representation smallint NOT NULL,
    currency text NOT NULL CHECK (currency IN ('EUR', 'GBP', 'USD')),
    client text NOT NULL,
    client_order_id text CHECK (length(client_order_id) BETWEEN 1 AND 255)
);
CREATE UNIQUE INDEX orders_key_unique ON orders (client, client_order_id) WHERE client_order_id IS NOT NULL;

-- Places a batch, as if its items came one by one, and returns one outcome for each:
--   'repeat'    stored already under this id or key, in this batch or before: numbers[i] says as which order
--   'late'      past its deadline        'unpriced'  price_slots[i] is 0
--   'expired'   its price record is      'over_cap'  does not fit; used_then[i] is what was used when it was tried
--   'placed'    stored as numbers[i]
-- Items with equal ids share a slot in id_slots, items with equal keys one in key_slots (0: no key). A slot is the index of
-- the first such item. price_slots index the prices_* arrays.
-- Read committed, so that every statement after the lock sees all that was committed before the lock was got. Plans are
-- generic and go by index whatever the statistics say: a plan made while the tables were empty must not hurt later.
CREATE FUNCTION place_orders(
    ids uuid[], clients text[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], price_slots int[], id_slots int[], key_slots int[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    new_representation smallint,
    OUT outcomes text[], OUT numbers bigint[], OUT used_then bigint[], OUT moment timestamptz, OUT cap bigint,
    OUT is_live boolean
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $function$
DECLARE
    count int := cardinality(ids);
    used bigint;
    last bigint;
    used_before bigint;
    holders_by_id bigint[];   -- per id slot: the number of the order that has the id
    holders_by_key bigint[];  -- per key slot: the number of the order that has the key
    new_numbers bigint[] := array_fill(NULL::bigint, ARRAY[count]);  -- only of the orders to insert
    price_used boolean[] := array_fill(false, ARRAY[cardinality(price_ids)]);
    holder bigint;
BEGIN
    SELECT e.used_satoshi, e.last_number, e.cap_satoshi, e.livemode INTO STRICT used, last, cap, is_live
    FROM exposure e FOR UPDATE;
    used_before := used;
    moment := clock_timestamp();

    SELECT array_agg(o.number ORDER BY i.slot) INTO holders_by_id
    FROM unnest(ids) WITH ORDINALITY AS i (id, slot) LEFT JOIN orders o ON o.id = i.id;
    SELECT array_agg(o.number ORDER BY i.slot) INTO holders_by_key
    FROM unnest(clients, keys) WITH ORDINALITY AS i (client, key, slot)
    LEFT JOIN orders o ON o.client = i.client AND o.client_order_id = i.key AND o.client_order_id IS NOT NULL;

    outcomes := array_fill(NULL::text, ARRAY[count]);
    numbers := array_fill(NULL::bigint, ARRAY[count]);
    used_then := array_fill(NULL::bigint, ARRAY[count]);
    FOR i IN 1..count LOOP
        holder := holders_by_id[id_slots[i]];
        IF holder IS NULL AND key_slots[i] > 0 THEN
            holder := holders_by_key[key_slots[i]];
        END IF;
        IF holder IS NOT NULL THEN
            outcomes[i] := 'repeat';
            numbers[i] := holder;
        ELSIF deadlines[i] <= moment THEN
            outcomes[i] := 'late';
        ELSIF price_slots[i] = 0 THEN
            outcomes[i] := 'unpriced';
        ELSIF prices_expire_at[price_slots[i]] <= moment THEN
            outcomes[i] := 'expired';
        ELSIF satoshis[i] > cap - used THEN
            outcomes[i] := 'over_cap';
            used_then[i] := used;
        ELSE
            last := last + 1;
            used := used + satoshis[i];
            outcomes[i] := 'placed';
            numbers[i] := last;
            new_numbers[i] := last;
            holders_by_id[id_slots[i]] := last;
            IF key_slots[i] > 0 THEN
                holders_by_key[key_slots[i]] := last;
            END IF;
            price_used[price_slots[i]] := true;
        END IF;
    END LOOP;

    IF used > used_before THEN
        INSERT INTO price_records (id, as_of, expires_at, document)
        SELECT p.id, p.as_of, p.expires_at, p.document
        FROM unnest(price_ids, prices_as_of, prices_expire_at, price_documents, price_used)
            AS p (id, as_of, expires_at, document, is_used)
        WHERE p.is_used
        ON CONFLICT (id) DO NOTHING;
        INSERT INTO orders (number, amount_cents, rate_e8, satoshi, created_at, price_as_of, id, price_id,
                            representation, currency, client, client_order_id)
        SELECT n.number, n.amount_cents, n.rate_e8, n.satoshi, moment, prices_as_of[n.price_slot], n.id,
               price_ids[n.price_slot], new_representation, n.currency, n.client, n.key
        FROM unnest(new_numbers, amounts_cents, rates_e8, satoshis, ids, price_slots, currencies, clients, keys)
            AS n (number, amount_cents, rate_e8, satoshi, id, price_slot, currency, client, key)
        WHERE n.number IS NOT NULL;
        UPDATE exposure SET used_satoshi = used, last_number = last;
    END IF;
END
$function$;
