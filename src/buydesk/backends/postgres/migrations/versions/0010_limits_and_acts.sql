-- Limits a day, pauses, rates, what was refused, and operators' acts by key.

ALTER TABLE exposure ADD COLUMN paused boolean NOT NULL DEFAULT false;
ALTER TABLE clients ADD COLUMN rate_per_minute int CHECK (rate_per_minute BETWEEN 1 AND 1000000);
ALTER TABLE keys ADD CHECK (expires_at < '9999-01-01 00:00:00+00');
ALTER TABLE keys ADD COLUMN lasts interval;
UPDATE keys SET lasts = expires_at - created_at;
ALTER TABLE keys ADD COLUMN rate_per_minute int CHECK (rate_per_minute BETWEEN 1 AND 1000000);
DROP TRIGGER kept ON keys;
CREATE TRIGGER kept BEFORE UPDATE OF id, client, digest, scopes, allow_from, created_at, lasts, rate_per_minute
    OR DELETE OR TRUNCATE ON keys
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();

-- What a client may buy for a currency on one day of UTC, if that is limited, and what it has bought on `day`, the last on
-- which it did: cancelled orders included.
CREATE TABLE daily_limits (
    client text COLLATE "C" NOT NULL REFERENCES clients,
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    cents_max bigint NOT NULL CHECK (cents_max BETWEEN 0 AND 100000000000000),
    day date NOT NULL,
    cents bigint NOT NULL CHECK (cents >= 0),
    PRIMARY KEY (client, currency)
) WITH (fillfactor = 50);
CREATE TRIGGER noted BEFORE INSERT OR UPDATE OF client, currency, cents_max OR DELETE ON daily_limits
FOR EACH STATEMENT EXECUTE FUNCTION note_settings();

-- Placing as before, but not while the desk is paused, and within what a client may buy on a day.
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
                   OR EXISTS (SELECT FROM orders o WHERE o.client_order_id = ANY (keys)),
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

-- Notes an act in the transaction that does it: both are there, or neither. The lock is one that only the owner can take,
-- and hinders no reader.
CREATE OR REPLACE FUNCTION note_act(
    who text, from_where text, what text, which text, reason text, state_before text, state_after text
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    last_number bigint;
    last_hash bytea;
    moment timestamptz;
BEGIN
    LOCK TABLE audit IN SHARE ROW EXCLUSIVE MODE;
    moment := clock_timestamp();
    SELECT a.number, a.hash INTO last_number, last_hash FROM audit a ORDER BY a.number DESC LIMIT 1;
    INSERT INTO audit
    SELECT n.number, moment, who, from_where, what, which, reason, state_before, state_after,
           audit_hash(coalesce(last_hash, ''), ARRAY[
               n.number::text, round(extract(epoch FROM moment) * 1000000)::bigint::text,
               who, from_where, what, which, reason, state_before, state_after
           ])
    FROM (SELECT coalesce(last_number, 0) + 1 AS number) n;
END
$function$;

-- Acts as they were are gone: a price is confirmed by operators now, not with the token of whoever publishes prices.
DROP FUNCTION confirm_price(text, bigint, bigint, text, int);
DROP FUNCTION create_client(text, text, text, text, bigint, bigint);
DROP FUNCTION limit_client(text, text, text, text, jsonb);
DROP FUNCTION create_key(text, text, text, text, text, bytea, text[], cidr[], timestamptz);
DROP FUNCTION end_key(text, text, text, text, timestamptz);
DROP FUNCTION set_cap(text, text, text, bigint);
DROP FUNCTION set_cap_counts(text, text, text, text, boolean);
DROP FUNCTION client_state(text);
DROP FUNCTION key_state(text);
DROP FUNCTION desk_state();

-- What an operator reads of a client, of a key and of the desk.
CREATE FUNCTION client_state(of text) RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object(
        'cap_satoshi', cap_satoshi, 'order_satoshi_max', order_satoshi_max, 'cap_counts_open', cap_counts_open,
        'rate_per_minute', rate_per_minute, 'daily_cents_max', (
            SELECT coalesce(json_object_agg(l.currency, l.cents_max ORDER BY l.currency), '{}')
            FROM daily_limits l WHERE l.client = of
        )
    )::text
    FROM clients WHERE name = of
$function$;
CREATE FUNCTION key_state(of text) RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object('client', client, 'scopes', scopes, 'allow_from', allow_from, 'expires_at', expires_at,
                             'revoked_at', revoked_at, 'rate_per_minute', rate_per_minute)::text
    FROM keys WHERE id = of
$function$;
CREATE FUNCTION desk_state() RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'cap_counts_open', cap_counts_open, 'paused', paused)::text
    FROM exposure
$function$;

-- What a client bought on a day of UTC, in cents by currency: from its newest order back to the first of an earlier day. It
-- takes about a second for a million orders of that day.
CREATE FUNCTION bought_on(of text, that_day date) RETURNS jsonb
LANGUAGE plpgsql STABLE
AS $function$
DECLARE
    first_before bigint;
BEGIN
    SELECT coalesce(o.client_number, o.number) INTO first_before FROM orders o
    WHERE o.client = of AND (o.created_at AT TIME ZONE 'UTC')::date < that_day
    ORDER BY coalesce(o.client_number, o.number) DESC LIMIT 1;
    RETURN (
        SELECT coalesce(jsonb_object_agg(s.currency, s.cents), '{}') FROM (
            SELECT o.currency, sum(o.amount_cents) AS cents FROM orders o
            WHERE o.client = of AND coalesce(o.client_number, o.number) > coalesce(first_before, 0)
                AND (o.created_at AT TIME ZONE 'UTC')::date = that_day
            GROUP BY o.currency
        ) s
    );
END
$function$;

-- Sets those limits of a client that `limits` names; null takes one away. Its caller has locked the exposure row.
CREATE FUNCTION set_limits(of text, limits jsonb) RETURNS void
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
END
$function$;

-- The acts. Each is noted in the same transaction, and what was before is read once nobody else can change it.
CREATE FUNCTION create_client(who text, from_where text, reason text, new_name text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    INSERT INTO clients (name) VALUES (new_name);
    PERFORM set_limits(new_name, limits);
    PERFORM note_act(who, from_where, 'client created', new_name, reason, NULL, client_state(new_name));
END
$function$;

CREATE FUNCTION limit_client(who text, from_where text, reason text, of text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := client_state(of);
    IF state_before IS NULL THEN
        RAISE no_data_found USING MESSAGE = 'there is no client of this name';
    END IF;
    PERFORM set_limits(of, limits);
    PERFORM note_act(who, from_where, 'client limited', of, reason, state_before, client_state(of));
END
$function$;

CREATE FUNCTION create_key(
    who text, from_where text, reason text, new_id text, of text, new_digest bytea, new_scopes text[], networks cidr[],
    ends_at timestamptz, rate int
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    IF NOT EXISTS (SELECT FROM clients WHERE name = of) THEN
        RAISE no_data_found USING MESSAGE = 'there is no client of this name';
    END IF;
    INSERT INTO keys (id, client, digest, scopes, allow_from, expires_at, lasts, rate_per_minute)
    VALUES (new_id, of, new_digest, new_scopes, networks, ends_at, ends_at - clock_timestamp(), rate);
    PERFORM note_act(who, from_where, 'key created', new_id, reason, NULL, key_state(new_id));
END
$function$;

-- Ends a key at the time, unless it ends earlier; NULL revokes it now.
CREATE FUNCTION end_key(who text, from_where text, reason text, of text, ends_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM keys WHERE id = of FOR UPDATE;
    state_before := key_state(of);
    IF state_before IS NULL THEN
        RAISE no_data_found USING MESSAGE = 'there is no key of this id';
    END IF;
    IF ends_at IS NULL THEN
        UPDATE keys SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE id = of;
    ELSE
        UPDATE keys SET expires_at = least(expires_at, ends_at) WHERE id = of;
    END IF;
    PERFORM note_act(who, from_where, CASE WHEN ends_at IS NULL THEN 'key revoked' ELSE 'key replaced' END, of, reason,
                     state_before, key_state(of));
END
$function$;

-- Makes a key that permits the same as another one and lasts as long as that was made for; that ends after the overlap.
CREATE FUNCTION rotate_key(
    who text, from_where text, reason text, of text, new_id text, new_digest bytea, overlap interval
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    old keys;
BEGIN
    SELECT * INTO old FROM keys WHERE id = of FOR UPDATE;
    IF old.id IS NULL THEN
        RAISE no_data_found USING MESSAGE = 'there is no key of this id';
    ELSIF old.revoked_at IS NOT NULL OR old.expires_at <= clock_timestamp() THEN
        RAISE object_not_in_prerequisite_state USING MESSAGE = 'the key has ended';
    END IF;
    PERFORM create_key(who, from_where, reason, new_id, old.client, new_digest, old.scopes, old.allow_from,
                       CASE WHEN old.lasts IS NOT NULL THEN least(clock_timestamp() + old.lasts, '9998-12-31Z') END,
                       old.rate_per_minute);
    PERFORM end_key(who, from_where, reason, of, clock_timestamp() + overlap);
END
$function$;

-- Neither a cap nor what it counts can be set so that more is used than it allows: the tables' constraints see to that.
CREATE FUNCTION set_cap(who text, from_where text, reason text, cap bigint) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := desk_state();
    UPDATE exposure SET cap_satoshi = cap;
    PERFORM note_act(who, from_where, 'cap set', 'desk', reason, state_before, desk_state());
END
$function$;

-- Whether the cap of the client, or of the desk for NULL, counts open orders only, or all that were ever stored.
CREATE FUNCTION set_cap_counts(who text, from_where text, reason text, of text, counts_open boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := CASE WHEN of IS NULL THEN desk_state() ELSE client_state(of) END;
    IF state_before IS NULL THEN
        RAISE no_data_found USING MESSAGE = 'there is no client of this name';
    ELSIF of IS NULL THEN
        UPDATE exposure SET cap_counts_open = counts_open;
    ELSE
        UPDATE clients SET cap_counts_open = counts_open WHERE name = of;
    END IF;
    PERFORM note_act(who, from_where, 'cap counts set', coalesce(of, 'desk'), reason, state_before,
                     CASE WHEN of IS NULL THEN desk_state() ELSE client_state(of) END);
END
$function$;

-- Stops all placing, or takes it up again: for whoever locks the exposure row next.
CREATE FUNCTION set_paused(who text, from_where text, reason text, is_paused boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := desk_state();
    UPDATE exposure SET paused = is_paused;
    PERFORM note_act(who, from_where, CASE WHEN is_paused THEN 'desk paused' ELSE 'desk resumed' END, 'desk', reason,
                     state_before, desk_state());
END
$function$;

-- Keeps a confirmation that holds from now on, by this server's clock, for so many minutes; until when that is.
CREATE FUNCTION confirm_price(
    who text, from_where text, reason text, new_currency text, new_low_e8 bigint, new_high_e8 bigint, minutes int
) RETURNS timestamptz
LANGUAGE plpgsql VOLATILE
AS $function$
DECLARE
    kept price_confirmations;
BEGIN
    INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at)
    VALUES (new_currency, new_low_e8, new_high_e8, reason, statement_timestamp(),
            statement_timestamp() + make_interval(mins => minutes))
    RETURNING * INTO kept;
    PERFORM note_act(who, from_where, 'price confirmed', new_currency, reason, NULL, json_build_object(
        'low_e8', kept.low_e8, 'high_e8', kept.high_e8, 'expires_at', kept.expires_at)::text);
    RETURN kept.expires_at;
END
$function$;

-- Does the act that is called so, with the members of `given` as its arguments. Returns what it changed as it is then, the
-- desk or a client, and of a confirmed price until when it holds.
CREATE FUNCTION act(who text, from_where text, reason text, called text, given jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    -- First, so that nothing that orders need is held while it waits for another act. (See note_act.)
    LOCK TABLE audit IN SHARE ROW EXCLUSIVE MODE;
    CASE called
    WHEN 'create_client' THEN
        PERFORM create_client(who, from_where, reason, given ->> 'client', given -> 'limits');
        RETURN client_state(given ->> 'client')::jsonb;
    WHEN 'limit_client' THEN
        PERFORM limit_client(who, from_where, reason, given ->> 'client', given -> 'limits');
        RETURN client_state(given ->> 'client')::jsonb;
    WHEN 'create_key' THEN
        PERFORM create_key(
            who, from_where, reason, given ->> 'id', given ->> 'client', decode(given ->> 'digest', 'hex'),
            ARRAY(SELECT jsonb_array_elements_text(given -> 'scopes')),
            ARRAY(SELECT jsonb_array_elements_text(given -> 'allow_from'))::cidr[],
            (given ->> 'expires_at')::timestamptz, (given ->> 'rate_per_minute')::int
        );
    WHEN 'rotate_key' THEN
        PERFORM rotate_key(who, from_where, reason, given ->> 'id', given ->> 'new_id',
                           decode(given ->> 'digest', 'hex'), make_interval(secs => (given ->> 'overlap_seconds')::float8));
    WHEN 'revoke_key' THEN
        PERFORM end_key(who, from_where, reason, given ->> 'id', NULL);
    WHEN 'set_cap' THEN
        PERFORM set_cap(who, from_where, reason, (given ->> 'cap_satoshi')::bigint);
        RETURN desk_state()::jsonb;
    WHEN 'set_cap_counts' THEN
        PERFORM set_cap_counts(who, from_where, reason, given ->> 'client', (given ->> 'open_only')::boolean);
        RETURN coalesce(client_state(given ->> 'client'), desk_state())::jsonb;
    WHEN 'pause' THEN
        PERFORM set_paused(who, from_where, reason, true);
        RETURN desk_state()::jsonb;
    WHEN 'resume' THEN
        PERFORM set_paused(who, from_where, reason, false);
        RETURN desk_state()::jsonb;
    WHEN 'confirm_price' THEN
        RETURN to_jsonb(confirm_price(who, from_where, reason, given ->> 'currency', (given ->> 'low_e8')::bigint,
                                      (given ->> 'high_e8')::bigint, (given ->> 'minutes')::int));
    END CASE;
    RETURN NULL;
END
$function$;

-- The same for whoever shows a key that permits it. The key is looked up here: an account that may call this and read all
-- tables, as db_proxy's, can do nothing of it without an operator's key, of which the table has the hash only.
CREATE FUNCTION act_by_key(shown text, from_where text, reason text, called text, given jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER
AS $function$
DECLARE
    key keys;
    needed text := CASE
        WHEN called IN ('create_client', 'limit_client', 'create_key', 'rotate_key', 'revoke_key') THEN 'clients:manage'
        WHEN called IN ('set_cap', 'set_cap_counts') THEN 'desk:cap'
        WHEN called IN ('pause', 'resume') THEN 'desk:pause'
        WHEN called = 'confirm_price' THEN 'prices:confirm'
    END;
    granted text[];
    lacking text;
BEGIN
    LOCK TABLE audit IN SHARE ROW EXCLUSIVE MODE;
    -- Locked until the act is done: nobody acts with a key after it was ended.
    SELECT * INTO key FROM keys k
    WHERE k.id = substr(shown, 9, 10) AND k.digest = sha256(convert_to(shown, 'UTF8')) FOR NO KEY UPDATE;
    IF key.id IS NULL OR key.revoked_at IS NOT NULL OR key.expires_at <= clock_timestamp() THEN
        RAISE SQLSTATE 'BD401' USING MESSAGE = 'the key is not valid';
    END IF;
    granted := CASE called
        WHEN 'create_key' THEN ARRAY(SELECT jsonb_array_elements_text(given -> 'scopes'))
        WHEN 'rotate_key' THEN (SELECT k.scopes FROM keys k WHERE k.id = given ->> 'id')
    END;
    SELECT s INTO lacking FROM unnest(ARRAY[coalesce(needed, called)] || granted) AS s WHERE s <> ALL (key.scopes) LIMIT 1;
    IF lacking IS NOT NULL THEN
        RAISE SQLSTATE 'BD403' USING MESSAGE = lacking;
    END IF;
    RETURN act(key.client || '/' || key.id, from_where, reason, called, given);
END
$function$;

-- What the ledger refused, for those who were refused and for operators; the oldest go. One entry a request: a batch may
-- come again, or an order that is priced anew, and be placed then.
CREATE TABLE refusals (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    client text COLLATE "C" NOT NULL,
    order_id uuid NOT NULL UNIQUE,
    client_order_id text,
    code text NOT NULL,
    currency text NOT NULL,
    amount_cents bigint NOT NULL
);
CREATE INDEX refusals_of_client ON refusals (client, number);

-- Notes refusals, and lets go of twice as many at most of the oldest: of those that are older than 30 days, or more than
-- 100,000 behind the newest.
CREATE FUNCTION note_refusals(
    moments timestamptz[], clients text[], ids uuid[], keys text[], codes text[], currencies text[], amounts_cents bigint[]
) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    DELETE FROM refusals WHERE number IN (
        SELECT r.number FROM refusals r
        WHERE r.number <= (SELECT max(o.number) FROM (SELECT number FROM refusals ORDER BY number LIMIT 2 * cardinality(ids)) o)
            AND (r.number <= (SELECT max(n.number) - 100000 FROM refusals n)
                OR r.at < statement_timestamp() - interval '30 days')
        ORDER BY r.number FOR UPDATE SKIP LOCKED
    );
    INSERT INTO refusals (at, client, order_id, client_order_id, code, currency, amount_cents)
    SELECT * FROM unnest(moments, clients, ids, keys, codes, currencies, amounts_cents)
    ON CONFLICT (order_id) DO NOTHING;
$function$;

DO $do$
DECLARE
    function regproc;
BEGIN
    EXECUTE format('ALTER FUNCTION place_orders SET search_path = pg_catalog, %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION note_act SET search_path = pg_catalog, %I, pg_temp', current_schema());
    FOREACH function IN ARRAY ARRAY['client_state', 'key_state', 'desk_state', 'bought_on', 'set_limits',
                                    'create_client', 'limit_client', 'create_key', 'end_key', 'rotate_key', 'set_cap',
                                    'set_cap_counts', 'set_paused', 'confirm_price', 'act', 'act_by_key',
                                    'note_refusals']::regproc[] LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp', function, current_schema());
    END LOOP;
END
$do$;
