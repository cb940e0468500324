-- The ledger's schema as it is now, to be read as one text. It is not run: databases get it by the migrations, and a test
-- holds the two together.

-- One row: what the desk may sell, what it has sold, and how many orders and closings that were. Whoever stores either
-- locks it first.
--
-- Orders and closings are the events of the desk, and share one sequence: the next one's number is
-- last_number + last_closing + 1. What is used follows from what was placed and closed, both of which only grow, and from
-- what the cap counts: every order ever stored, or open ones only. So that can be changed without counting again, and
-- not to less than is used.
CREATE TABLE exposure (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    livemode boolean NOT NULL,
    cap_satoshi bigint NOT NULL CHECK (cap_satoshi BETWEEN 0 AND 2100000000000000),
    cap_counts_open boolean NOT NULL DEFAULT false,
    placed_satoshi bigint NOT NULL DEFAULT 0,
    closed_satoshi bigint NOT NULL DEFAULT 0,
    last_number bigint NOT NULL DEFAULT 0 CHECK (last_number >= 0),
    last_closing bigint NOT NULL DEFAULT 0 CHECK (last_closing >= 0),
    settings_version bigint NOT NULL DEFAULT 0,  -- how often settings of clients were changed
    used_satoshi bigint GENERATED ALWAYS AS
        (placed_satoshi - CASE WHEN cap_counts_open THEN closed_satoshi ELSE 0 END) STORED,
    CONSTRAINT closed_were_placed CHECK (closed_satoshi BETWEEN 0 AND placed_satoshi),
    CONSTRAINT used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 10);  -- room for new versions of the row on its own page

-- An account like the desk's for each client, with a cap and a largest order of its own if it has them. Only who has locked
-- the exposure row writes here.
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
    created_at timestamptz DEFAULT clock_timestamp(),  -- none of anonymous, who was always there
    CONSTRAINT client_closed_were_placed CHECK (closed_satoshi BETWEEN 0 AND placed_satoshi),
    CONSTRAINT client_used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 50);
INSERT INTO clients (name) VALUES ('anonymous');

-- What placing reads of clients before it locks the exposure row must not change unseen: whoever makes a client, or changes
-- what is set of one, locks that row too, before, and leaves a trace there. Placing changes none of these columns.
CREATE FUNCTION note_settings() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    UPDATE exposure SET settings_version = settings_version + 1;
    RETURN NULL;
END
$function$;
CREATE TRIGGER noted BEFORE INSERT OR UPDATE OF name, cap_satoshi, order_satoshi_max, cap_counts_open ON clients
FOR EACH STATEMENT EXECUTE FUNCTION note_settings();

-- Public keys that price records are signed with, for ever: as long as there are orders, the prices they were placed at
-- can be proven. Only `buydesk migrate` adds any.
CREATE TABLE price_keys (
    key text PRIMARY KEY,
    added_at timestamptz NOT NULL DEFAULT now()
);

-- The price records that orders were priced with, as they were signed, each stored with the first order that used it; and
-- the key each of them names, NULL for those from before they were signed. The document is not read as JSON here: PostgreSQL refuses some JSON
-- (with \u0000 in a text, say of an exchange's error), and would refuse the orders with it. As it is written, no text in
-- it can hold what is looked for: there a quotation mark has a backslash before it.
CREATE TABLE price_records (
    id uuid PRIMARY KEY,
    document text NOT NULL,
    key text
        GENERATED ALWAYS AS (substring(document FROM '"signature":\{"key":"([A-Za-z0-9_-]+)"')) STORED
        CONSTRAINT price_records_key_known REFERENCES price_keys (key)
);
ALTER TABLE price_records ADD CONSTRAINT price_records_signed CHECK (key IS NOT NULL) NOT VALID;  -- from now on

-- The orders, as they were placed. They are inserted once and never changed; number is without gaps and in the order of
-- commit, and so is client_number among the orders of its client. That an order was placed is an event: its number is the
-- order's plus the closings before it. Orders from before there were clients, all of anonymous, have neither numbers of
-- their client's nor of events, which are their number, and no rate of the market, which is theirs, nor a time of their
-- request, for which stands that of their placing. Keys are compared as bytes, not by the locale's rules. metadata is the JSON text
-- that was answered: as jsonb its members would come back in another order.
CREATE TABLE orders (
    number bigint PRIMARY KEY CHECK (number > 0),
    client_number bigint,
    event_number bigint,
    client_event_number bigint,
    amount_cents bigint NOT NULL CHECK (amount_cents BETWEEN 1 AND 99999999999),
    market_rate_e8 bigint CHECK (market_rate_e8 > 0),
    rate_e8 bigint NOT NULL CHECK (rate_e8 > 0),
    satoshi bigint NOT NULL CHECK (satoshi > 0),
    received_at timestamptz,
    created_at timestamptz NOT NULL,
    price_as_of timestamptz NOT NULL,
    id uuid NOT NULL CONSTRAINT orders_id_unique UNIQUE,
    price_id uuid NOT NULL,
    markup_bp int NOT NULL DEFAULT 0 CHECK (markup_bp >= 0),
    representation smallint NOT NULL,
    currency text NOT NULL CHECK (currency IN ('EUR', 'GBP', 'USD')),
    client text COLLATE "C" NOT NULL,
    client_order_id text COLLATE "C" CHECK (length(client_order_id) BETWEEN 1 AND 255),
    reference text COLLATE "C" CHECK (length(reference) BETWEEN 1 AND 128),
    metadata text CHECK (octet_length(metadata) BETWEEN 2 AND 2048),
    quote_id uuid,  -- no order has a quote yet
    quoted_at timestamptz,
    quote_expires_at timestamptz,
    CONSTRAINT orders_quote_whole CHECK (num_nulls(quote_id, quoted_at, quote_expires_at) IN (0, 3))
);
ALTER TABLE orders ADD CONSTRAINT orders_whole CHECK (
    num_nulls(client_number, event_number, client_event_number, market_rate_e8, received_at) = 0
) NOT VALID;  -- from now on
CREATE UNIQUE INDEX orders_key_unique ON orders (client_order_id, client) WHERE client_order_id IS NOT NULL;
CREATE UNIQUE INDEX orders_of_client ON orders (client, coalesce(client_number, number));
CREATE UNIQUE INDEX orders_quote_unique ON orders (quote_id) WHERE quote_id IS NOT NULL;

-- The orders that were settled or cancelled, each once: an order that has no row here is open. That is an event too, the
-- closing-th of the desk and the client_closing-th of its client that is no order. Of the first N events as many were
-- closings as the last one up to N says, so the order that comes next is known: the events after any N are two seeks.
-- No foreign key: it would lock, and so write, every order that is closed. close_orders takes its rows from there.
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

-- Facts stay as they are, whoever writes. Triggers of a statement cost an insert nothing.
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

-- A foreign key would look for the price record of every single order: a fifth of what an order costs. These triggers look
-- once a statement, and keep the records that orders name.
CREATE FUNCTION require_price_records() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
AS $function$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT price_id FROM written) w
        WHERE NOT EXISTS (SELECT FROM price_records p WHERE p.id = w.price_id)
    ) THEN
        RAISE foreign_key_violation USING MESSAGE = 'an order names a price record that is not there';
    END IF;
    RETURN NULL;
END
$function$;
CREATE TRIGGER priced AFTER INSERT ON orders
REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION require_price_records();
CREATE FUNCTION keep_price_records() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    IF EXISTS (SELECT FROM orders) THEN
        RAISE restrict_violation USING MESSAGE = 'price records stay as they are: orders name them';
    END IF;
    RETURN NULL;
END
$function$;
CREATE TRIGGER kept AFTER UPDATE OR DELETE OR TRUNCATE ON price_records
FOR EACH STATEMENT EXECUTE FUNCTION keep_price_records();

-- Places a batch, as if its items came one by one, and returns one outcome for each:
--   'repeat'    stored already under this id or key, in this batch or before: numbers[i] says as which order
--   'clock'     it is before not_before or after not_after here: this server's clock or the sender's is off
--   'late'      past its deadline        'unpriced'  price_slots[i] is 0
--   'expired'   its price record is
--   'too_large'        more than limits_then[i], the largest order of its client
--   'over_client_cap'  does not fit below limits_then[i], its client's cap, of which used_then[i] was used when it was tried
--   'over_cap'         the same of the desk's
--   'placed'    stored as numbers[i], which is its client's client_numbers[i]
-- Items with equal ids share a slot in id_slots, items with equal keys of one client one in key_slots (0: no key). A slot
-- is the index of the first such item. price_slots index the prices_* arrays, client_slots batch_clients: the names of the
-- clients that have items, in the order of their bytes, each once. received are Unix times.
--
-- Repeats, and what the clients may buy, are looked up before the exposure row is locked. Why that is safe: the function
-- is read committed, so every statement has a snapshot of its own, and one statement reads the row's counters and all the
-- rest. Whoever stores orders or closings, or changes a client's settings, raises one of the counters and commits both
-- together. So if their sum, which only grows, is still the same once the row is locked, nothing was changed in between,
-- nothing can be until this transaction ends, and what was found still holds; otherwise it looks again, under the lock.
-- Orders never change or go away: a batch of nothing but repeats needs no lock, writes nothing and waits for nobody.
-- Whether any item is stored at all is cheap to ask (two index scans for the whole batch), and nearly always none is;
-- only otherwise is it asked which. The cheap question takes any client's key for a hit, the second tells them apart.
-- Plans are generic and go by index whatever the statistics say: a plan made while the tables were empty must not hurt
-- later.
--
-- Whoever may write holds an advisory lock until its commit is done, a wait for standbys included. A look-up that finds
-- nothing takes it too, shared, and looks again: what it does not find then is stored only if it is placed later still,
-- and past its deadline nothing is. The number is the letters of "placing".
--
-- A batch of nothing does all that another one does, with no rows: whether orders can be stored is asked by it.
--
-- Placing is this one function, with the rights of its owner: whoever may call it can place orders, but can neither write
-- them in any other way nor change a cap. It finds our tables only, whatever tables its caller makes.
--
-- A record is stored as it was signed, so every copy of it brings the same document, and another one is refused; when it
-- may be used until, each copy says for its own orders.
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
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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

-- Settles and cancels orders, as if one by one in this order, and returns one outcome for each:
--   'closed'    now, with texts[i] as its settlement_reference or reason
--   'repeat'    was before, in this very way    'conflict'  was before, otherwise    'unknown'  there is no such order
-- numbers[i] is the order's. What is closed raises the counters of its client and of the desk, by what is stored of it,
-- whatever the caller says; what their caps count decides whether that makes room. Its rights are as place_orders'.
CREATE FUNCTION close_orders(
    order_ids uuid[], new_statuses text[], texts text[], OUT outcomes text[], OUT numbers bigint[]
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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

-- Placing for programs of the version before, until they are gone: received now, by no more than what they bring.
CREATE FUNCTION place_batch(
    ids uuid[], clients text[], keys text[], currencies text[], amounts_cents bigint[], rates_e8 bigint[],
    satoshis bigint[], deadlines timestamptz[], price_slots int[], id_slots int[], key_slots int[],
    price_ids uuid[], prices_as_of timestamptz[], prices_expire_at timestamptz[], price_documents text[],
    new_representation smallint, not_before timestamptz, not_after timestamptz,
    OUT outcomes text[], OUT numbers bigint[], OUT used_then bigint[], OUT moment timestamptz, OUT cap bigint,
    OUT is_live boolean
)
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
REVOKE EXECUTE ON FUNCTION place_batch FROM PUBLIC;

-- The last price of each currency that the desk published, by which the next one is judged: no restart forgets it. With
-- what a bitcoin cost in dollars then, where that is known: exchange rates are compared through it.
CREATE TABLE price_anchors (
    currency text PRIMARY KEY CHECK (currency ~ '^[A-Z]{3}$'),
    rate_e8 bigint NOT NULL CHECK (rate_e8 > 0),
    as_of timestamptz NOT NULL,
    dollar_e8 bigint CHECK (dollar_e8 > 0)
);

-- What operators said that a bitcoin may cost, until when, and why. For the audit all of it stays as it was said.
CREATE TABLE price_confirmations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    low_e8 bigint NOT NULL CHECK (low_e8 > 0),
    high_e8 bigint NOT NULL,
    why text NOT NULL CHECK (length(why) BETWEEN 1 AND 500),
    confirmed_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    CONSTRAINT price_confirmations_range CHECK (low_e8 <= high_e8),
    CONSTRAINT price_confirmations_end CHECK (
        expires_at > confirmed_at AND expires_at <= confirmed_at + interval '15 minutes'
    )
);
CREATE INDEX price_confirmations_by_end ON price_confirmations (expires_at);
CREATE FUNCTION keep_price_confirmations() RETURNS trigger LANGUAGE plpgsql AS $function$
BEGIN
    RAISE restrict_violation USING MESSAGE = 'price confirmations stay as they are: they say what was sold, and why';
END
$function$;
CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON price_confirmations
FOR EACH STATEMENT EXECUTE FUNCTION keep_price_confirmations();

-- Keeps anchors, but replaces none by an earlier one, unless the one that is kept lies in the future: this server's clock
-- was ahead then, and later anchors would have to wait until that time. For the same reason none is kept that lies in the
-- future now. In the order of the currencies, so that two calls never wait for each other. With the rights of its owner,
-- as place_batch, and for the same reason.
CREATE FUNCTION keep_price_anchors(
    currencies text[], rates_e8 bigint[], decided timestamptz[], dollars_e8 bigint[]
) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    INSERT INTO price_anchors AS kept (currency, rate_e8, as_of, dollar_e8)
    SELECT new.currency, new.rate_e8, least(new.as_of, statement_timestamp()), new.dollar_e8
    FROM unnest(currencies, rates_e8, decided, dollars_e8) AS new (currency, rate_e8, as_of, dollar_e8)
    ORDER BY new.currency
    ON CONFLICT (currency) DO UPDATE
    SET rate_e8 = excluded.rate_e8, as_of = excluded.as_of, dollar_e8 = excluded.dollar_e8
    WHERE kept.as_of < excluded.as_of OR kept.as_of > statement_timestamp()
$function$;
REVOKE EXECUTE ON FUNCTION keep_price_anchors FROM PUBLIC;

-- Keeps a confirmation that holds from now on, by this server's clock, for so many minutes.
CREATE FUNCTION confirm_price(
    new_currency text, new_low_e8 bigint, new_high_e8 bigint, new_why text, minutes int, OUT ends_at timestamptz
)
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at)
    VALUES (new_currency, new_low_e8, new_high_e8, new_why, statement_timestamp(),
            statement_timestamp() + make_interval(mins => minutes))
    RETURNING expires_at
$function$;
REVOKE EXECUTE ON FUNCTION confirm_price FROM PUBLIC;

-- What operators did. Each entry's hash is made of the one before it too: whoever keeps one hash can tell whether anything
-- before it was changed or left out.
CREATE TABLE audit (
    number bigint PRIMARY KEY,
    at timestamptz NOT NULL,
    operator text NOT NULL CHECK (operator <> ''),
    address text NOT NULL,
    act text NOT NULL,
    subject text NOT NULL,
    why text NOT NULL,
    before text,
    after text,
    hash bytea NOT NULL
);
CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();

-- The hash of an entry after one with the hash `previous`: SHA-256 of that hash and of the fields, each as its length in
-- bytes, a colon and its UTF-8, or a minus sign for NULL. The time is in microseconds since 1970.
CREATE FUNCTION audit_hash(previous bytea, fields text[]) RETURNS bytea
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT sha256(previous || convert_to(string_agg(
        CASE WHEN field IS NULL THEN '-' ELSE octet_length(convert_to(field, 'UTF8')) || ':' || field END, '' ORDER BY place
    ), 'UTF8'))
    FROM unnest(fields) WITH ORDINALITY AS f (field, place)
$function$;

-- Notes an act in the transaction that does it: both are there, or neither.
CREATE FUNCTION note_act(
    who text, from_where text, what text, which text, reason text, state_before text, state_after text
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    last_number bigint;
    last_hash bytea;
    moment timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(31644362927074920);
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

-- Clients' keys. Of a key only the hash is stored; whoever reads this table can use none.
CREATE TABLE keys (
    id text COLLATE "C" PRIMARY KEY CHECK (id ~ '^[0-9A-Za-z]{10}$'),
    client text COLLATE "C" NOT NULL REFERENCES clients,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    scopes text[] NOT NULL CHECK (cardinality(scopes) > 0),
    allow_from cidr[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_on date
);
CREATE INDEX keys_of_client ON keys (client);
CREATE TRIGGER kept BEFORE UPDATE OF id, client, digest, scopes, allow_from, created_at OR DELETE OR TRUNCATE ON keys
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();

-- What an operator reads of a client and of a key.
CREATE FUNCTION client_state(of text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'order_satoshi_max', order_satoshi_max,
                             'cap_counts_open', cap_counts_open)::text
    FROM clients WHERE name = of
$function$;
CREATE FUNCTION key_state(of text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT json_build_object('client', client, 'scopes', scopes, 'allow_from', allow_from, 'expires_at', expires_at,
                             'revoked_at', revoked_at)::text
    FROM keys WHERE id = of
$function$;

-- The acts. Each is noted in the same transaction.
CREATE FUNCTION create_client(
    who text, from_where text, reason text, new_name text, cap bigint, largest bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
BEGIN
    INSERT INTO clients (name, cap_satoshi, order_satoshi_max) VALUES (new_name, cap, largest);
    PERFORM note_act(who, from_where, 'client created', new_name, reason, NULL, client_state(new_name));
END
$function$;

-- Changes those limits that `changes` names; null takes one away. What was before is read once nobody else can change it.
CREATE FUNCTION limit_client(who text, from_where text, reason text, of text, changes jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := client_state(of);
    UPDATE clients SET
        cap_satoshi = CASE WHEN changes ? 'cap_satoshi' THEN (changes ->> 'cap_satoshi')::bigint ELSE cap_satoshi END,
        order_satoshi_max = CASE
            WHEN changes ? 'order_satoshi_max' THEN (changes ->> 'order_satoshi_max')::bigint ELSE order_satoshi_max
        END
    WHERE name = of;
    PERFORM note_act(who, from_where, 'client limited', of, reason, state_before, client_state(of));
END
$function$;

CREATE FUNCTION create_key(
    who text, from_where text, reason text, new_id text, of text, new_digest bytea, new_scopes text[], networks cidr[],
    ends_at timestamptz
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
BEGIN
    INSERT INTO keys (id, client, digest, scopes, allow_from, expires_at)
    VALUES (new_id, of, new_digest, new_scopes, networks, ends_at);
    PERFORM note_act(who, from_where, 'key created', new_id, reason, NULL, key_state(new_id));
END
$function$;

-- Ends a key at the time, unless it ends earlier; NULL revokes it now.
CREATE FUNCTION end_key(who text, from_where text, reason text, of text, ends_at timestamptz) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM keys WHERE id = of FOR UPDATE;
    state_before := key_state(of);
    IF ends_at IS NULL THEN
        UPDATE keys SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE id = of;
    ELSE
        UPDATE keys SET expires_at = least(expires_at, ends_at) WHERE id = of;
    END IF;
    PERFORM note_act(who, from_where, CASE WHEN ends_at IS NULL THEN 'key revoked' ELSE 'key replaced' END, of, reason,
                     state_before, key_state(of));
END
$function$;

-- What an operator reads of the desk's cap.
CREATE FUNCTION desk_state() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'cap_counts_open', cap_counts_open)::text FROM exposure
$function$;

-- Neither a cap nor what it counts can be set so that more is used than it allows: the tables' constraints see to that.
CREATE FUNCTION set_cap(who text, from_where text, reason text, cap bigint) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    state_before text;
BEGIN
    PERFORM FROM exposure FOR UPDATE;
    state_before := CASE WHEN of IS NULL THEN desk_state() ELSE client_state(of) END;
    IF of IS NULL THEN
        UPDATE exposure SET cap_counts_open = counts_open;
    ELSE
        UPDATE clients SET cap_counts_open = counts_open WHERE name = of;
    END IF;
    PERFORM note_act(who, from_where, 'cap counts set', coalesce(of, 'desk'), reason, state_before,
                     CASE WHEN of IS NULL THEN desk_state() ELSE client_state(of) END);
END
$function$;

-- Notes that keys were used today: once a day and key. In the order of their ids, so that no two calls wait for each other.
CREATE FUNCTION note_keys_used(ids text[]) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    UPDATE keys k SET last_used_on = due.today
    FROM (
        SELECT id, (statement_timestamp() AT TIME ZONE 'UTC')::date AS today FROM keys
        WHERE id = ANY (ids) AND last_used_on IS DISTINCT FROM (statement_timestamp() AT TIME ZONE 'UTC')::date
        ORDER BY id FOR NO KEY UPDATE
    ) due
    WHERE k.id = due.id
$function$;
REVOKE EXECUTE ON FUNCTION audit_hash, note_act, client_state, key_state, create_client, limit_client, create_key, end_key, desk_state,
    set_cap, set_cap_counts, note_keys_used
FROM PUBLIC;
