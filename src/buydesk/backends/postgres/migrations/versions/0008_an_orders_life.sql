-- Until now there was one client, and whoever stored orders for another did it by hand.
DO $do$
BEGIN
    IF EXISTS (SELECT FROM orders WHERE client <> 'anonymous') THEN
        RAISE EXCEPTION 'there are orders of another client than anonymous: their numbers would have gaps';
    END IF;
END
$do$;

-- The desk's account. What is used follows from what was placed and closed, and from what the cap counts.
ALTER TABLE exposure ADD COLUMN placed_satoshi bigint NOT NULL DEFAULT 0;
UPDATE exposure SET placed_satoshi = used_satoshi;
ALTER TABLE exposure DROP COLUMN used_satoshi;
ALTER TABLE exposure
    ADD COLUMN cap_counts_open boolean NOT NULL DEFAULT false,
    ADD COLUMN closed_satoshi bigint NOT NULL DEFAULT 0,
    ADD COLUMN last_closing bigint NOT NULL DEFAULT 0 CHECK (last_closing >= 0),
    ADD COLUMN settings_version bigint NOT NULL DEFAULT 0,
    ADD COLUMN used_satoshi bigint GENERATED ALWAYS AS
        (placed_satoshi - CASE WHEN cap_counts_open THEN closed_satoshi ELSE 0 END) STORED,
    ADD CONSTRAINT closed_were_placed CHECK (closed_satoshi BETWEEN 0 AND placed_satoshi),
    ADD CONSTRAINT used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi);

-- Accounts like the desk's, one a client.
CREATE TABLE clients (
    name text COLLATE "C" PRIMARY KEY CHECK (name ~ '^[a-z0-9][a-z0-9-]{0,31}$'),
    cap_satoshi bigint CHECK (cap_satoshi BETWEEN 0 AND 2100000000000000),
    order_satoshi_max bigint CHECK (order_satoshi_max > 0),
    cap_counts_open boolean NOT NULL DEFAULT false,
    placed_satoshi bigint NOT NULL DEFAULT 0,
    closed_satoshi bigint NOT NULL DEFAULT 0,
    last_number bigint NOT NULL DEFAULT 0 CHECK (last_number >= 0),
    last_closing bigint NOT NULL DEFAULT 0 CHECK (last_closing >= 0),
    used_satoshi bigint GENERATED ALWAYS AS
        (placed_satoshi - CASE WHEN cap_counts_open THEN closed_satoshi ELSE 0 END) STORED,
    CONSTRAINT client_closed_were_placed CHECK (closed_satoshi BETWEEN 0 AND placed_satoshi),
    CONSTRAINT client_used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 50);
INSERT INTO clients (name, placed_satoshi, last_number)
SELECT 'anonymous', coalesce(max(placed_satoshi), 0), coalesce(max(last_number), 0) FROM exposure;

-- What placing reads of clients before it locks the exposure row must not change unseen.
CREATE FUNCTION note_settings() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    UPDATE exposure SET settings_version = settings_version + 1;
    RETURN NULL;
END
$function$;
CREATE TRIGGER noted BEFORE INSERT OR UPDATE OF name, cap_satoshi, order_satoshi_max, cap_counts_open ON clients
FOR EACH STATEMENT EXECUTE FUNCTION note_settings();

-- Orders from before have none of the first five: what they would be follows from the others, and the table need not be written
-- anew.
DROP TRIGGER still_priced ON orders;
ALTER TABLE orders
    ADD COLUMN client_number bigint, ADD COLUMN event_number bigint, ADD COLUMN client_event_number bigint,
    ADD COLUMN market_rate_e8 bigint CHECK (market_rate_e8 > 0), ADD COLUMN received_at timestamptz,
    ADD COLUMN markup_bp int NOT NULL DEFAULT 0 CHECK (markup_bp >= 0),
    ADD COLUMN reference text COLLATE "C" CHECK (length(reference) BETWEEN 1 AND 128),
    ADD COLUMN metadata text CHECK (octet_length(metadata) BETWEEN 2 AND 2048),
    ADD COLUMN quote_id uuid, ADD COLUMN quoted_at timestamptz, ADD COLUMN quote_expires_at timestamptz,
    ADD CONSTRAINT orders_quote_whole CHECK (num_nulls(quote_id, quoted_at, quote_expires_at) IN (0, 3));
ALTER TABLE orders ADD CONSTRAINT orders_whole CHECK (
    num_nulls(client_number, event_number, client_event_number, market_rate_e8, received_at) = 0
) NOT VALID;
CREATE UNIQUE INDEX orders_of_client ON orders (client, coalesce(client_number, number));
CREATE UNIQUE INDEX orders_quote_unique ON orders (quote_id) WHERE quote_id IS NOT NULL;

-- Orders that were settled or cancelled, each once.
CREATE TABLE closings (
    event_number bigint PRIMARY KEY,
    number bigint NOT NULL CONSTRAINT closed_once UNIQUE,
    closing bigint NOT NULL,
    client_closing bigint NOT NULL,
    client_event_number bigint NOT NULL,
    closed_at timestamptz NOT NULL,
    client text COLLATE "C" NOT NULL,
    status text NOT NULL CHECK (status IN ('settled', 'cancelled')),
    settlement_reference text CHECK (length(settlement_reference) BETWEEN 1 AND 128),
    reason text CHECK (length(reason) BETWEEN 1 AND 500),
    CONSTRAINT closings_text_of_status CHECK (
        CASE status WHEN 'settled' THEN reason IS NULL ELSE settlement_reference IS NULL AND reason IS NOT NULL END
    )
);
CREATE UNIQUE INDEX closings_of_client ON closings (client, client_event_number);

CREATE FUNCTION never_changed() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    RAISE restrict_violation USING MESSAGE = 'what has happened stays as it is';
END
$function$;
CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON orders
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();
CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON closings
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON clients
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();

-- As place_batch (0005), but for several clients, each with its account, and with what orders have now.
CREATE FUNCTION place_orders(
    ids uuid[], client_slots int[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], received float8[], representations smallint[],
    new_references text[], metadatas text[], price_slots int[], id_slots int[], key_slots int[],
    batch_clients text[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    not_before timestamptz, not_after timestamptz,
    OUT outcomes text[], OUT numbers bigint[], OUT client_numbers bigint[], OUT used_then bigint[],
    OUT limits_then bigint[], OUT moment timestamptz, OUT cap bigint, OUT is_live boolean
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
SECURITY DEFINER
AS $function$
DECLARE
    count int := cardinality(ids);
    nothing bigint[] := array_fill(NULL::bigint, ARRAY[count]);
    version_seen bigint;
    version bigint;
    used_before bigint;
    used bigint;
    last_before bigint;
    last bigint;
    closings bigint;
    any_stored boolean;
    is_locked boolean := false;
    is_in_time boolean;
    rows_stored int;
    holders_by_id bigint[];           -- per id slot: the number of the order that has the id
    holders_by_key bigint[];          -- per key slot: the number of the order that has the key
    holders bigint[];
    holder bigint;
    c int;
    names text[];                     -- per client slot, as all that follow
    lasts bigint[];
    client_closings bigint[];
    client_caps bigint[];
    largest bigint[];
    rooms bigint[];                   -- under the client's cap, before the batch
    sold bigint[];                    -- of the batch
BEGIN
    LOOP
        SELECT e.last_number + e.last_closing + e.settings_version, e.cap_satoshi, e.livemode,
               EXISTS (SELECT FROM orders o WHERE o.id = ANY (ids))
                   OR EXISTS (SELECT FROM orders o WHERE o.client_order_id = ANY (keys)),
               a.names, a.lasts, a.closings, a.caps, a.largest, a.rooms
        INTO STRICT version_seen, cap, is_live, any_stored, names, lasts, client_closings, client_caps, largest, rooms
        FROM exposure e CROSS JOIN LATERAL (
            SELECT coalesce(array_agg(k.name ORDER BY k.name), '{}') AS names,
                   array_agg(k.last_number ORDER BY k.name) AS lasts,
                   array_agg(k.last_closing ORDER BY k.name) AS closings,
                   array_agg(k.cap_satoshi ORDER BY k.name) AS caps,
                   array_agg(coalesce(k.order_satoshi_max, 9223372036854775807) ORDER BY k.name) AS largest,
                   array_agg(coalesce(k.cap_satoshi - k.used_satoshi, 9223372036854775807) ORDER BY k.name) AS rooms
            FROM clients k WHERE k.name = ANY (batch_clients)
        ) a;
        holders_by_id := nothing;
        holders_by_key := nothing;
        IF any_stored THEN
            SELECT array_agg(o.number ORDER BY i.slot), array_agg(k.number ORDER BY i.slot),
                   array_agg(coalesce(o.number, k.number) ORDER BY i.slot)
            INTO holders_by_id, holders_by_key, holders
            FROM unnest(ids, client_slots, keys) WITH ORDINALITY AS i (id, client_slot, key, slot)
            LEFT JOIN orders o ON o.id = i.id
            LEFT JOIN orders k ON k.client_order_id = i.key AND k.client = batch_clients[i.client_slot]
                AND k.client_order_id IS NOT NULL;
            IF array_position(holders, NULL) IS NULL THEN
                outcomes := array_fill('repeat'::text, ARRAY[count]);
                numbers := holders;
                client_numbers := nothing;
                used_then := nothing;
                limits_then := nothing;
                moment := clock_timestamp();
                RETURN;
            END IF;
        END IF;
        EXIT WHEN is_locked;
        PERFORM pg_advisory_xact_lock(31644362927074919);
        SELECT e.last_number + e.last_closing + e.settings_version, e.used_satoshi, e.last_number, e.last_closing,
               e.cap_satoshi
        INTO STRICT version, used_before, last_before, closings, cap FROM exposure e FOR UPDATE;
        EXIT WHEN version = version_seen;
        is_locked := true;
    END LOOP;
    IF names IS DISTINCT FROM batch_clients THEN
        RAISE foreign_key_violation USING MESSAGE = 'a client is not there, or the clients do not come in order';
    END IF;
    moment := clock_timestamp();
    is_in_time := moment BETWEEN not_before AND not_after;
    used := used_before;
    last := last_before;

    outcomes := array_fill('placed'::text, ARRAY[count]);
    numbers := nothing;
    client_numbers := nothing;
    used_then := nothing;
    limits_then := nothing;
    sold := array_fill(0::bigint, ARRAY[cardinality(names)]);
    FOR i IN 1..count LOOP
        holder := coalesce(holders_by_id[id_slots[i]], holders_by_key[key_slots[i]]);
        c := client_slots[i];
        IF holder IS NULL AND is_in_time AND moment < deadlines[i] AND price_slots[i] > 0
            AND moment < prices_expire_at[price_slots[i]] AND satoshis[i] <= cap - used
            AND satoshis[i] <= largest[c] AND satoshis[i] <= rooms[c] - sold[c]
        THEN
            last := last + 1;
            used := used + satoshis[i];
            lasts[c] := lasts[c] + 1;
            sold[c] := sold[c] + satoshis[i];
            numbers[i] := last;
            client_numbers[i] := lasts[c];
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
        ELSIF satoshis[i] > largest[c] THEN
            outcomes[i] := 'too_large';
            limits_then[i] := largest[c];
        ELSIF satoshis[i] > rooms[c] - sold[c] THEN
            outcomes[i] := 'over_client_cap';
            limits_then[i] := client_caps[c];
            used_then[i] := client_caps[c] - (rooms[c] - sold[c]);
        ELSE
            outcomes[i] := 'over_cap';
            limits_then[i] := cap;
            used_then[i] := used;
        END IF;
    END LOOP;

    IF last > last_before OR count = 0 THEN
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
        INSERT INTO orders (number, client_number, event_number, client_event_number, amount_cents, market_rate_e8,
                            rate_e8, satoshi, received_at, created_at, price_as_of, id, price_id, representation,
                            currency, client, client_order_id, reference, metadata)
        SELECT numbers[i], client_numbers[i], numbers[i] + closings,
               client_numbers[i] + client_closings[client_slots[i]], amounts_cents[i], rates_e8[i], rates_e8[i],
               satoshis[i], to_timestamp(received[i]), moment, prices_as_of[price_slots[i]], ids[i],
               price_ids[price_slots[i]], representations[i], currencies[i], names[client_slots[i]], keys[i],
               new_references[i], metadatas[i]
        FROM generate_series(1, count) AS i
        WHERE outcomes[i] = 'placed';
        GET DIAGNOSTICS rows_stored = ROW_COUNT;
        IF rows_stored <> last - last_before THEN
            RAISE integrity_constraint_violation USING MESSAGE = 'not every order that was placed is stored';
        END IF;
        UPDATE clients k SET last_number = lasts[s], placed_satoshi = k.placed_satoshi + sold[s]
        FROM generate_subscripts(names, 1) AS s
        WHERE k.name = names[s] AND sold[s] > 0;
        UPDATE exposure SET placed_satoshi = placed_satoshi + (used - used_before), last_number = last;
    END IF;
END
$function$;
REVOKE EXECUTE ON FUNCTION place_orders FROM PUBLIC;

-- Settles and cancels orders.
CREATE FUNCTION close_orders(
    order_ids uuid[], new_statuses text[], texts text[], OUT outcomes text[], OUT numbers bigint[]
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
SECURITY DEFINER
AS $function$
DECLARE
    count int := cardinality(order_ids);
    statuses text[];
    texts_stored text[];
    slot int;
    rows_stored int;
    events_before bigint;
    orders_before bigint;
    closed bigint := 0;
    closed_satoshi_more bigint;
BEGIN
    SELECT e.last_number, e.last_number + e.last_closing INTO STRICT orders_before, events_before
    FROM exposure e FOR UPDATE;
    SELECT array_agg(o.number ORDER BY i.slot), array_agg(x.status ORDER BY i.slot),
           array_agg(coalesce(x.settlement_reference, x.reason) ORDER BY i.slot)
    INTO numbers, statuses, texts_stored
    FROM unnest(order_ids) WITH ORDINALITY AS i (id, slot)
    LEFT JOIN orders o ON o.id = i.id
    LEFT JOIN closings x ON x.number = o.number;
    outcomes := array_fill('unknown'::text, ARRAY[count]);
    FOR i IN 1..count LOOP
        CONTINUE WHEN numbers[i] IS NULL;
        slot := array_position(numbers, numbers[i]);
        IF statuses[slot] IS NULL THEN
            outcomes[i] := 'closed';
            closed := closed + 1;
            statuses[slot] := new_statuses[i];
            texts_stored[slot] := texts[i];
        ELSIF statuses[slot] = new_statuses[i] AND texts_stored[slot] IS NOT DISTINCT FROM texts[i] THEN
            outcomes[i] := 'repeat';
        ELSE
            outcomes[i] := 'conflict';
        END IF;
    END LOOP;
    IF closed = 0 THEN
        RETURN;
    END IF;

    INSERT INTO closings (event_number, number, closing, client_closing, client_event_number, closed_at, client, status,
                          settlement_reference, reason)
    SELECT events_before + n.nth, n.number, events_before - orders_before + n.nth, k.last_closing + n.nth_of_client,
           k.last_number + k.last_closing + n.nth_of_client, clock_timestamp(), n.client, n.status,
           CASE n.status WHEN 'settled' THEN n.text END, CASE n.status WHEN 'cancelled' THEN n.text END
    FROM (
        SELECT o.number, o.client, new_statuses[i] AS status, texts[i] AS text, row_number() OVER (ORDER BY i) AS nth,
               row_number() OVER (PARTITION BY o.client ORDER BY i) AS nth_of_client
        FROM generate_series(1, count) AS i JOIN orders o ON o.number = numbers[i]
        WHERE outcomes[i] = 'closed'
    ) n
    JOIN clients k ON k.name = n.client;
    GET DIAGNOSTICS rows_stored = ROW_COUNT;
    IF rows_stored <> closed THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'not every order that was closed is stored as such';
    END IF;
    UPDATE clients k SET closed_satoshi = k.closed_satoshi + t.satoshi, last_closing = k.last_closing + t.closings
    FROM (
        SELECT x.client, sum(o.satoshi)::bigint AS satoshi, count(*) AS closings
        FROM closings x JOIN orders o ON o.number = x.number
        WHERE x.event_number > events_before AND x.event_number <= events_before + closed
        GROUP BY x.client
    ) t
    WHERE k.name = t.client;
    SELECT sum(o.satoshi) INTO STRICT closed_satoshi_more
    FROM closings x JOIN orders o ON o.number = x.number
    WHERE x.event_number > events_before AND x.event_number <= events_before + closed;
    UPDATE exposure SET closed_satoshi = closed_satoshi + closed_satoshi_more, last_closing = last_closing + closed;
END
$function$;
REVOKE EXECUTE ON FUNCTION close_orders FROM PUBLIC;

-- For programs of the version before, until they are gone: received now, by no more than what they bring.
CREATE OR REPLACE FUNCTION place_batch(
    ids uuid[], clients text[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], price_slots int[], id_slots int[], key_slots int[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    new_representation smallint, not_before timestamptz, not_after timestamptz,
    OUT outcomes text[], OUT numbers bigint[], OUT used_then bigint[], OUT moment timestamptz, OUT cap bigint,
    OUT is_live boolean
)
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    SELECT p.outcomes, p.numbers, p.used_then, p.moment, p.cap, p.is_live
    FROM (
        SELECT coalesce(array_agg(DISTINCT c COLLATE "C" ORDER BY c COLLATE "C"), '{}') AS names FROM unnest(clients) AS c
    ) b CROSS JOIN LATERAL place_orders(
        ids, ARRAY(SELECT array_position(b.names, c) FROM unnest(clients) WITH ORDINALITY AS u (c, i) ORDER BY i),
        keys, currencies, amounts_cents, rates_e8, satoshis, deadlines,
        array_fill(extract(epoch FROM clock_timestamp())::float8, ARRAY[cardinality(ids)]),
        array_fill(new_representation, ARRAY[cardinality(ids)]), NULL, NULL, price_slots, id_slots, key_slots, b.names,
        price_ids, prices_as_of, prices_expire_at, price_documents, not_before, not_after
    ) p
$function$;

-- As in 0004.
DO $do$
BEGIN
    EXECUTE format('ALTER FUNCTION place_orders SET search_path = pg_catalog, %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION close_orders SET search_path = pg_catalog, %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION place_batch SET search_path = pg_catalog, %I, pg_temp', current_schema());
END
$do$;
