-- Orders by quote: a quote's id is a key of its order, and the order is stored as long as the quote is valid, whatever its
-- price record says by then.

ALTER TABLE orders ADD CONSTRAINT orders_quote_in_time CHECK (
    quote_id IS NULL OR created_at < quote_expires_at AND quote_expires_at - quoted_at <= interval '15 minutes'
) NOT VALID;  -- from now on

ALTER TABLE clients ADD COLUMN quote_seconds_max int CHECK (quote_seconds_max BETWEEN 5 AND 900);

-- Placing as before, with what was added to the market's rates, by quotes, whose records are stored already and need not be
-- brought again, and of dry runs no more than what would become of them. Older programs bring none of these: they sell at the
-- market's rates, and all that they bring is to be placed.
CREATE FUNCTION place_items(
    ids uuid[], client_slots int[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], received float8[], representations smallint[],
    new_references text[], metadatas text[], price_slots int[], id_slots int[], key_slots int[],
    batch_clients text[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    not_before timestamptz, not_after timestamptz,
    market_rates_e8 bigint[] DEFAULT NULL, markups_bp int[] DEFAULT NULL, dry_runs boolean[] DEFAULT NULL,
    quote_ids uuid[] DEFAULT NULL, quoted_ats timestamptz[] DEFAULT NULL,
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
    any_daily boolean;
    is_locked boolean := false;
    is_in_time boolean;
    is_paused boolean;
    rows_stored int;
    holders_by_id bigint[];           -- per id slot: the number of the order that has the id or the quote
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
    day_slots int[];                  -- per item: the first item of the same client and currency, if these are limited
    day_limits bigint[];              -- per item, as the two that follow
    days date[];
    bought bigint[];
    bought_now bigint[];              -- per day slot: bought today, with the batch
    today date;
    d int;
BEGIN
    LOOP
        SELECT e.last_number + e.last_closing + e.settings_version, e.cap_satoshi, e.livemode,
               EXISTS (SELECT FROM orders o WHERE o.id = ANY (ids))
                   OR EXISTS (SELECT FROM orders o WHERE o.client_order_id = ANY (keys))
                   OR (quote_ids IS NOT NULL AND EXISTS (SELECT FROM orders o WHERE o.quote_id = ANY (quote_ids))),
               EXISTS (SELECT FROM daily_limits l WHERE l.client = ANY (batch_clients)),
               a.names, a.lasts, a.closings, a.caps, a.largest, a.rooms
        INTO STRICT version_seen, cap, is_live, any_stored, any_daily, names, lasts, client_closings, client_caps, largest,
                    rooms
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
            SELECT array_agg(coalesce(o.number, q.number) ORDER BY i.slot), array_agg(k.number ORDER BY i.slot),
                   array_agg(coalesce(o.number, q.number, k.number) ORDER BY i.slot)
            INTO holders_by_id, holders_by_key, holders
            FROM unnest(ids, client_slots, keys, quote_ids) WITH ORDINALITY AS i (id, client_slot, key, quote_id, slot)
            LEFT JOIN orders o ON o.id = i.id
            LEFT JOIN orders q ON q.quote_id = i.quote_id AND q.quote_id IS NOT NULL
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
        IF any_daily THEN
            SELECT array_agg(CASE WHEN l.client IS NOT NULL THEN i.first END ORDER BY i.place),
                   array_agg(l.cents_max ORDER BY i.place), array_agg(l.day ORDER BY i.place),
                   array_agg(l.cents ORDER BY i.place)
            INTO day_slots, day_limits, days, bought
            FROM (
                SELECT u.place, client_slots[u.place] AS slot, currencies[u.place] AS currency,
                       min(u.place) OVER (PARTITION BY client_slots[u.place], currencies[u.place]) AS first
                FROM generate_series(1, count) AS u (place)
            ) i
            LEFT JOIN daily_limits l ON l.client = batch_clients[i.slot] AND l.currency = i.currency;
        ELSE
            day_slots := NULL;
        END IF;
        EXIT WHEN is_locked;
        PERFORM pg_advisory_xact_lock(31644362927074919);
        SELECT e.last_number + e.last_closing + e.settings_version, e.used_satoshi, e.last_number, e.last_closing,
               e.cap_satoshi, e.paused
        INTO STRICT version, used_before, last_before, closings, cap, is_paused FROM exposure e FOR UPDATE;
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
    IF day_slots IS NOT NULL THEN
        today := (moment AT TIME ZONE 'UTC')::date;
        FOR i IN 1..count LOOP
            -- A day ahead: the clock was set back. What was bought then counts until that day is over.
            bought[i] := CASE WHEN days[i] >= today THEN bought[i] ELSE 0 END;
        END LOOP;
        bought_now := bought;
    END IF;

    outcomes := array_fill('placed'::text, ARRAY[count]);
    numbers := nothing;
    client_numbers := nothing;
    used_then := nothing;
    limits_then := nothing;
    sold := array_fill(0::bigint, ARRAY[cardinality(names)]);
    FOR i IN 1..count LOOP
        holder := coalesce(holders_by_id[id_slots[i]], holders_by_key[key_slots[i]]);
        c := client_slots[i];
        d := day_slots[i];
        IF holder IS NULL AND is_in_time AND moment < deadlines[i] AND NOT is_paused AND price_slots[i] > 0
            AND moment < prices_expire_at[price_slots[i]] AND satoshis[i] <= cap - used
            AND satoshis[i] <= largest[c] AND satoshis[i] <= rooms[c] - sold[c]
            AND (d IS NULL OR amounts_cents[i] <= day_limits[i] - bought_now[d])
        THEN
            IF dry_runs[i] THEN
                outcomes[i] := 'placeable';
                CONTINUE;
            END IF;
            last := last + 1;
            used := used + satoshis[i];
            lasts[c] := lasts[c] + 1;
            sold[c] := sold[c] + satoshis[i];
            IF d IS NOT NULL THEN
                bought_now[d] := bought_now[d] + amounts_cents[i];
            END IF;
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
        ELSIF is_paused THEN
            outcomes[i] := 'paused';
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
        ELSIF amounts_cents[i] > day_limits[i] - bought_now[d] THEN
            outcomes[i] := 'over_day';
            limits_then[i] := day_limits[i];
            used_then[i] := bought_now[d];
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
            WHERE price_documents[p] IS NOT NULL AND EXISTS (
                SELECT FROM generate_series(1, count) AS i WHERE price_slots[i] = p AND outcomes[i] = 'placed'
            )
            ON CONFLICT (id) DO NOTHING;
        END IF;
        IF EXISTS (
            SELECT FROM unnest(price_ids, price_documents) AS given (id, document)
            JOIN price_records p ON p.id = given.id
            WHERE p.document <> given.document
        ) THEN
            RAISE integrity_constraint_violation USING MESSAGE = 'a price record is stored with another document';
        END IF;
        INSERT INTO orders (number, client_number, event_number, client_event_number, amount_cents, market_rate_e8,
                            rate_e8, satoshi, received_at, created_at, price_as_of, id, price_id, representation,
                            currency, client, client_order_id, reference, metadata, markup_bp, quote_id, quoted_at,
                            quote_expires_at)
        SELECT numbers[i], client_numbers[i], numbers[i] + closings,
               client_numbers[i] + client_closings[client_slots[i]], amounts_cents[i],
               coalesce(market_rates_e8[i], rates_e8[i]), rates_e8[i], satoshis[i], to_timestamp(received[i]), moment,
               prices_as_of[price_slots[i]], ids[i], price_ids[price_slots[i]], representations[i], currencies[i],
               names[client_slots[i]], keys[i], new_references[i], metadatas[i], coalesce(markups_bp[i], 0),
               quote_ids[i], quoted_ats[i], CASE WHEN quote_ids[i] IS NOT NULL THEN prices_expire_at[price_slots[i]] END
        FROM generate_series(1, count) AS i
        WHERE outcomes[i] = 'placed';
        GET DIAGNOSTICS rows_stored = ROW_COUNT;
        IF rows_stored <> last - last_before THEN
            RAISE integrity_constraint_violation USING MESSAGE = 'not every order that was placed is stored';
        END IF;
        UPDATE clients k SET last_number = lasts[s], placed_satoshi = k.placed_satoshi + sold[s]
        FROM generate_subscripts(names, 1) AS s
        WHERE k.name = names[s] AND sold[s] > 0;
        IF day_slots IS NOT NULL THEN
            UPDATE daily_limits l SET day = greatest(l.day, today), cents = bought_now[i]
            FROM generate_series(1, count) AS i
            WHERE day_slots[i] = i AND bought_now[i] > bought[i] AND l.client = names[client_slots[i]]
                AND l.currency = currencies[i];
        END IF;
        UPDATE exposure SET placed_satoshi = placed_satoshi + (used - used_before), last_number = last;
    END IF;
END
$function$;

-- For programs of the versions before, until they are gone. Replaced, not made anew: calls that are under way go on.
CREATE OR REPLACE FUNCTION place_orders(
    ids uuid[], client_slots int[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], received float8[], representations smallint[],
    new_references text[], metadatas text[], price_slots int[], id_slots int[], key_slots int[],
    batch_clients text[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    not_before timestamptz, not_after timestamptz,
    OUT outcomes text[], OUT numbers bigint[], OUT client_numbers bigint[], OUT used_then bigint[],
    OUT limits_then bigint[], OUT moment timestamptz, OUT cap bigint, OUT is_live boolean
)
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    SELECT * FROM place_items(
        ids, client_slots, keys, currencies, amounts_cents, rates_e8, satoshis, deadlines, received, representations,
        new_references, metadatas, price_slots, id_slots, key_slots, batch_clients, price_ids, prices_as_of,
        prices_expire_at, price_documents, not_before, not_after
    )
$function$;

-- Stores a price record, as it was signed, before the first quote at it is given; whether it was not there yet. As with
-- orders: the key that it names is known, and another document of a stored record is refused.
CREATE FUNCTION keep_price_record(price_id uuid, price_document text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
AS $function$
BEGIN
    INSERT INTO price_records (id, document) VALUES (price_id, price_document) ON CONFLICT (id) DO NOTHING;
    IF FOUND THEN
        RETURN true;
    END IF;
    IF EXISTS (SELECT FROM price_records p WHERE p.id = price_id AND p.document <> price_document) THEN
        RAISE integrity_constraint_violation USING MESSAGE = 'a price record is stored with another document';
    END IF;
    RETURN false;
END
$function$;

CREATE OR REPLACE FUNCTION client_state(of text) RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object(
        'cap_satoshi', cap_satoshi, 'order_satoshi_max', order_satoshi_max, 'cap_counts_open', cap_counts_open,
        'rate_per_minute', rate_per_minute, 'quote_seconds_max', quote_seconds_max, 'daily_cents_max', (
            SELECT coalesce(json_object_agg(l.currency, l.cents_max ORDER BY l.currency), '{}')
            FROM daily_limits l WHERE l.client = of
        ), 'markup_bp', (
            SELECT coalesce(json_object_agg(m.currency, m.markup_bp ORDER BY m.currency), '{}')
            FROM markups m WHERE m.client = of
        )
    )::text
    FROM clients WHERE name = of
$function$;

-- Sets those limits of a client that `limits` names, and its markups; null takes one away. Its caller has locked the exposure
-- row.
CREATE OR REPLACE FUNCTION set_limits(of text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    today date := (clock_timestamp() AT TIME ZONE 'UTC')::date;
    bought jsonb;
    a_day record;
BEGIN
    UPDATE clients SET
        cap_satoshi = CASE WHEN limits ? 'cap_satoshi' THEN (limits ->> 'cap_satoshi')::bigint ELSE cap_satoshi END,
        order_satoshi_max = CASE
            WHEN limits ? 'order_satoshi_max' THEN (limits ->> 'order_satoshi_max')::bigint ELSE order_satoshi_max
        END,
        rate_per_minute = CASE
            WHEN limits ? 'rate_per_minute' THEN (limits ->> 'rate_per_minute')::int ELSE rate_per_minute
        END,
        quote_seconds_max = CASE
            WHEN limits ? 'quote_seconds_max' THEN (limits ->> 'quote_seconds_max')::int ELSE quote_seconds_max
        END
    WHERE name = of;
    FOR a_day IN
        SELECT l.key AS currency, (l.value #>> '{}')::bigint AS cents_max
        FROM jsonb_each(coalesce(limits -> 'daily_cents_max', '{}')) AS l ORDER BY l.key
    LOOP
        IF a_day.cents_max IS NULL THEN
            DELETE FROM daily_limits l WHERE l.client = of AND l.currency = a_day.currency;
        ELSE
            UPDATE daily_limits l SET cents_max = a_day.cents_max WHERE l.client = of AND l.currency = a_day.currency;
            IF NOT FOUND THEN
                bought := coalesce(bought, bought_on(of, today));
                INSERT INTO daily_limits (client, currency, cents_max, day, cents)
                VALUES (of, a_day.currency, a_day.cents_max, today, coalesce((bought ->> a_day.currency)::bigint, 0));
            END IF;
        END IF;
    END LOOP;
    DELETE FROM markups m USING jsonb_each_text(limits -> 'markup_bp') AS l
    WHERE m.client = of AND m.currency = l.key AND l.value IS NULL;
    INSERT INTO markups (client, currency, markup_bp)
    SELECT of, l.key, l.value::int FROM jsonb_each_text(limits -> 'markup_bp') AS l WHERE l.value IS NOT NULL
    ON CONFLICT (client, currency) DO UPDATE SET markup_bp = excluded.markup_bp;
END
$function$;

DO $do$
DECLARE
    function regproc;
BEGIN
    FOREACH function IN ARRAY ARRAY[
        'place_items', 'place_orders', 'keep_price_record', 'client_state', 'set_limits'
    ]::regproc[] LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp', function, current_schema());
    END LOOP;
END
$do$;
