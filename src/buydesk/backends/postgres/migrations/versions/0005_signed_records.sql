-- A price record is what was signed: one document, the same for whoever brings it first. Its times are in there.
ALTER TABLE price_records DROP COLUMN as_of, DROP COLUMN expires_at;
-- Records from before they were signed stay as they are.
ALTER TABLE price_records ADD CONSTRAINT price_records_signed CHECK (key IS NOT NULL) NOT VALID;

-- As before (0003), but: another document of a stored record is refused; a record that is shortened ends earlier for the
-- orders it is brought with, and for no others; whatever is answered as placed is stored.
CREATE OR REPLACE FUNCTION place_batch(
    ids uuid[], clients text[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], price_slots int[], id_slots int[], key_slots int[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    new_representation smallint, not_before timestamptz, not_after timestamptz,
    OUT outcomes text[], OUT numbers bigint[], OUT used_then bigint[], OUT moment timestamptz, OUT cap bigint,
    OUT is_live boolean
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
SECURITY DEFINER
AS $function$
DECLARE
    count int := cardinality(ids);
    nothing bigint[] := array_fill(NULL::bigint, ARRAY[count]);
    used bigint;
    last bigint;
    last_seen bigint;
    any_stored boolean;
    is_locked boolean := false;
    is_in_time boolean;
    rows_stored int;
    holders_by_id bigint[];           -- per id slot: the number of the order that has the id
    holders_by_key bigint[];          -- per key slot: the number of the order that has the key
    holders bigint[];
    holder bigint;
BEGIN
    LOOP
        SELECT e.last_number, e.cap_satoshi, e.livemode,
               EXISTS (SELECT FROM orders o WHERE o.id = ANY (ids))
                   OR EXISTS (SELECT FROM orders o WHERE o.client_order_id = ANY (keys))
        INTO STRICT last_seen, cap, is_live, any_stored
        FROM exposure e;
        holders_by_id := nothing;
        holders_by_key := nothing;
        IF any_stored THEN
            SELECT array_agg(o.number ORDER BY i.slot), array_agg(k.number ORDER BY i.slot),
                   array_agg(coalesce(o.number, k.number) ORDER BY i.slot)
            INTO holders_by_id, holders_by_key, holders
            FROM unnest(ids, clients, keys) WITH ORDINALITY AS i (id, client, key, slot)
            LEFT JOIN orders o ON o.id = i.id
            LEFT JOIN orders k ON k.client_order_id = i.key AND k.client = i.client AND k.client_order_id IS NOT NULL;
            IF array_position(holders, NULL) IS NULL THEN
                outcomes := array_fill('repeat'::text, ARRAY[count]);
                numbers := holders;
                used_then := nothing;
                moment := clock_timestamp();
                RETURN;
            END IF;
        END IF;
        EXIT WHEN is_locked;
        PERFORM pg_advisory_xact_lock(31644362927074919);
        SELECT e.used_satoshi, e.last_number, e.cap_satoshi INTO STRICT used, last, cap FROM exposure e FOR UPDATE;
        EXIT WHEN last = last_seen;
        is_locked := true;
    END LOOP;
    moment := clock_timestamp();
    is_in_time := moment BETWEEN not_before AND not_after;

    outcomes := array_fill('placed'::text, ARRAY[count]);
    numbers := nothing;
    used_then := nothing;
    FOR i IN 1..count LOOP
        holder := coalesce(holders_by_id[id_slots[i]], holders_by_key[key_slots[i]]);
        IF holder IS NULL AND is_in_time AND moment < deadlines[i] AND price_slots[i] > 0
            AND moment < prices_expire_at[price_slots[i]] AND satoshis[i] <= cap - used
        THEN
            last := last + 1;
            used := used + satoshis[i];
            numbers[i] := last;
            holders_by_id[id_slots[i]] := last;
            IF key_slots[i] > 0 THEN
                holders_by_key[key_slots[i]] := last;
            END IF;
        ELSIF holder IS NOT NULL THEN
            outcomes[i] := 'repeat';
            numbers[i] := holder;
        ELSIF NOT is_in_time THEN
            outcomes[i] := 'clock';
        ELSIF deadlines[i] <= moment THEN
            outcomes[i] := 'late';
        ELSIF price_slots[i] = 0 THEN
            outcomes[i] := 'unpriced';
        ELSIF prices_expire_at[price_slots[i]] <= moment THEN
            outcomes[i] := 'expired';
        ELSE
            outcomes[i] := 'over_cap';
            used_then[i] := used;
        END IF;
    END LOOP;

    IF last > last_seen OR count = 0 THEN
        IF count = 0 OR EXISTS (
            SELECT FROM unnest(price_ids) AS given (id)
            WHERE NOT EXISTS (SELECT FROM price_records p WHERE p.id = given.id)
        ) THEN
            INSERT INTO price_records (id, document)
            SELECT price_ids[p], price_documents[p]
            FROM generate_subscripts(price_ids, 1) AS p
            WHERE EXISTS (SELECT FROM generate_series(1, count) AS i WHERE price_slots[i] = p AND outcomes[i] = 'placed')
            ON CONFLICT (id) DO NOTHING;
        END IF;
        IF EXISTS (
            SELECT FROM unnest(price_ids, price_documents) AS given (id, document)
            JOIN price_records p ON p.id = given.id
            WHERE p.document IS DISTINCT FROM given.document
        ) THEN
            RAISE integrity_constraint_violation USING MESSAGE = 'a price record is stored with another document';
        END IF;
        INSERT INTO orders (number, amount_cents, rate_e8, satoshi, created_at, price_as_of, id, price_id,
                            representation, currency, client, client_order_id)
        SELECT numbers[i], amounts_cents[i], rates_e8[i], satoshis[i], moment, prices_as_of[price_slots[i]], ids[i],
               price_ids[price_slots[i]], new_representation, currencies[i], clients[i], keys[i]
        FROM generate_series(1, count) AS i
        WHERE outcomes[i] = 'placed';
        GET DIAGNOSTICS rows_stored = ROW_COUNT;
        IF rows_stored <> last - last_seen THEN
            RAISE integrity_constraint_violation USING MESSAGE = 'not every order that was placed is stored';
        END IF;
        UPDATE exposure SET used_satoshi = used, last_number = last;
    END IF;
END
$function$;

-- The programs that called it bring no signatures.
DROP FUNCTION place_orders;

-- As in 0004: a function that is replaced loses its search path.
DO $do$
BEGIN
    EXECUTE format('ALTER FUNCTION place_batch SET search_path = pg_catalog, %I, pg_temp', current_schema());
END
$do$;
