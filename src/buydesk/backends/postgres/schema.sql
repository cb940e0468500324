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
    paused boolean NOT NULL DEFAULT false,  -- while it is, nothing new is placed
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
    rate_per_minute int CHECK (rate_per_minute BETWEEN 1 AND 1000000),  -- of each kind of requests; NULL: as the services' setting
    quote_seconds_max int CHECK (quote_seconds_max BETWEEN 5 AND 900),  -- how long its quotes may be valid; NULL: likewise
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

-- What is added to the market's rate for a client, in basis points, where that is not what the desk adds. It reaches whoever
-- prices the client's orders with its keys.
CREATE TABLE markups (
    client text COLLATE "C" NOT NULL REFERENCES clients,
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    markup_bp int NOT NULL CHECK (markup_bp BETWEEN 0 AND 5000),
    PRIMARY KEY (client, currency)
);

-- Public keys that price records are signed with, for ever: as long as there are orders, the prices they were placed at
-- can be proven. Only `buydesk migrate` adds any.
CREATE TABLE price_keys (
    key text PRIMARY KEY,
    added_at timestamptz NOT NULL DEFAULT now()
);

-- The price records that orders were priced with, as they were signed, each stored with the first order or quote at it; and
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
    quote_id uuid,
    quoted_at timestamptz,
    quote_expires_at timestamptz,
    CONSTRAINT orders_quote_whole CHECK (num_nulls(quote_id, quoted_at, quote_expires_at) IN (0, 3))
);
ALTER TABLE orders ADD CONSTRAINT orders_whole CHECK (
    num_nulls(client_number, event_number, client_event_number, market_rate_e8, received_at) = 0
) NOT VALID;  -- from now on
-- rate = ceil(market rate * (10000 + markup_bp) / 10000), as money.py has it, in steps that a bigint holds.
ALTER TABLE orders ADD CONSTRAINT orders_marked_up CHECK (
    markup_bp <= 5000 AND rate_e8 = market_rate_e8 + market_rate_e8 / 10000 * markup_bp
        + (market_rate_e8 % 10000 * markup_bp + 9999) / 10000
) NOT VALID;  -- from now on
ALTER TABLE orders ADD CONSTRAINT orders_quote_in_time CHECK (
    quote_id IS NULL OR created_at < quote_expires_at AND quote_expires_at - quoted_at <= interval '15 minutes'
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
--   'repeat'    stored already under this id, quote or key, in this batch or before: numbers[i] says as which order
--   'clock'     it is before not_before or after not_after here: this server's clock or the sender's is off
--   'late'      past its deadline        'paused'    nothing is sold now
--   'unpriced'  price_slots[i] is 0
--   'expired'   its price record is, or its quote
--   'too_large'        more than limits_then[i], the largest order of its client
--   'over_client_cap'  does not fit below limits_then[i], its client's cap, of which used_then[i] was used when it was tried
--   'over_day'         the same of what its client may buy for the currency on that day, in cents
--   'over_cap'         the same of the desk's cap
--   'placeable' nothing of these, and dry_runs[i]: it would be placed
--   'placed'    stored as numbers[i], which is its client's client_numbers[i]
-- Items with equal ids, or by one quote, share a slot in id_slots, items with equal keys of one client one in key_slots (0: no
-- key). A slot is the index of the first such item. price_slots index the prices_* arrays, client_slots batch_clients: the
-- names of the clients that have items, in the order of their bytes, each once. received are Unix times. Without
-- market_rates_e8 and markups_bp all rates are the market's; without dry_runs all items are to be placed. An item by quote
-- has the quote's id in quote_ids, when it was given in quoted_ats, and a price that ends when the quote does and whose
-- document is NULL: that record is stored already.
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

-- For programs of the versions before, until they are gone.
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
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
REVOKE EXECUTE ON FUNCTION place_items, place_orders, keep_price_record FROM PUBLIC;

-- Settles and cancels orders, as if one by one in this order, and returns one outcome for each:
--   'closed'    now, with texts[i] as its settlement_reference or reason
--   'repeat'    was before, in this very way    'conflict'  was before, otherwise    'unknown'  there is no such order
-- numbers[i] is the order's. What is closed raises the counters of its client and of the desk, by what is stored of it,
-- whatever the caller says; what their caps count decides whether that makes room. Its rights are as place_items'.
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

-- Notes an act in the transaction that does it: both are there, or neither. The lock is one that only the owner can take,
-- and hinders no reader.
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

-- Clients' keys. Of a key only the hash is stored; whoever reads this table can use none.
CREATE TABLE keys (
    id text COLLATE "C" PRIMARY KEY CHECK (id ~ '^[0-9A-Za-z]{10}$'),
    client text COLLATE "C" NOT NULL REFERENCES clients,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    scopes text[] NOT NULL CHECK (cardinality(scopes) > 0),
    allow_from cidr[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz CHECK (expires_at < '9999-01-01 00:00:00+00'),  -- programs know no year 10000
    revoked_at timestamptz,
    last_used_on date,
    lasts interval,  -- for how long it was made; NULL: for ever
    rate_per_minute int CHECK (rate_per_minute BETWEEN 1 AND 1000000)  -- beside its client's; NULL: no further limit
);
CREATE INDEX keys_of_client ON keys (client);
CREATE TRIGGER kept BEFORE UPDATE OF id, client, digest, scopes, allow_from, created_at, lasts, rate_per_minute
    OR DELETE OR TRUNCATE ON keys
FOR EACH STATEMENT EXECUTE FUNCTION never_changed();

-- What an operator reads of a client, of a key and of the desk.
CREATE FUNCTION client_state(of text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
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
CREATE FUNCTION key_state(of text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT json_build_object('client', client, 'scopes', scopes, 'allow_from', allow_from, 'expires_at', expires_at,
                             'revoked_at', revoked_at, 'rate_per_minute', rate_per_minute)::text
    FROM keys WHERE id = of
$function$;
CREATE FUNCTION desk_state() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, public, pg_temp
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'cap_counts_open', cap_counts_open, 'paused', paused)::text
    FROM exposure
$function$;

-- What a client bought on a day of UTC, in cents by currency: from its newest order back to the first of an earlier day. It
-- takes about a second for a million orders of that day.
CREATE FUNCTION bought_on(of text, that_day date) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, public, pg_temp
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

-- Sets those limits of a client that `limits` names, and its markups; null takes one away. Its caller has locked the exposure
-- row.
CREATE FUNCTION set_limits(of text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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

-- The acts. Each is noted in the same transaction, and what was before is read once nobody else can change it.
CREATE FUNCTION create_client(who text, from_where text, reason text, new_name text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
AS $function$
BEGIN
    INSERT INTO clients (name) VALUES (new_name);
    PERFORM set_limits(new_name, limits);
    PERFORM note_act(who, from_where, 'client created', new_name, reason, NULL, client_state(new_name));
END
$function$;

CREATE FUNCTION limit_client(who text, from_where text, reason text, of text, limits jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, public, pg_temp
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
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
REVOKE EXECUTE ON FUNCTION audit_hash, note_act, note_keys_used, client_state, key_state, desk_state, bought_on,
    set_limits, create_client, limit_client, create_key, end_key, rotate_key, set_cap, set_cap_counts, set_paused,
    confirm_price, act, act_by_key, note_refusals
FROM PUBLIC;

-- The endpoints that clients have their events sent to. Nothing is queued for them: events follow from orders and
-- closings, and each endpoint has got those of its client up to `delivered`. So placing does nothing for webhooks.
--
-- No secret is stored: `secrets` are a JSON list, the newest first, of versions, each with the fingerprint of the desk's key
-- that it is derived from and, but for the first, when it ends. An endpoint is disabled for a reason: its client's wish
-- (`client`), because it said that it is gone, or because all retries failed.
--
-- A replica of process_buy_orders that delivers to an endpoint holds a lease, by this server's clock. Each time that it
-- takes endpoints is a `lease` of its own, so what a turn reports counts only as long as that lease is the endpoint's.
CREATE TABLE webhooks (
    id uuid PRIMARY KEY,
    client text COLLATE "C" NOT NULL REFERENCES clients,
    url text NOT NULL CHECK (length(url) BETWEEN 1 AND 2048),
    events text[] NOT NULL CHECK (cardinality(events) BETWEEN 1 AND 10),
    description text NOT NULL CHECK (length(description) <= 256),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    secrets jsonb NOT NULL,
    disabled text CHECK (disabled IN ('client', 'gone', 'failing')),
    delivered bigint NOT NULL CHECK (delivered >= 0),
    failures int NOT NULL DEFAULT 0 CHECK (failures >= 0),  -- of the event after `delivered`, one after the other
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    taken_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease uuid,
    leased_until timestamptz,
    attempts bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
CREATE INDEX webhooks_of_client ON webhooks (client, created_at);
CREATE INDEX webhooks_in_turn ON webhooks (taken_at) WHERE disabled IS NULL;

-- The last attempts of each endpoint: see note_deliveries.
CREATE TABLE webhook_deliveries (
    webhook uuid NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    number bigint NOT NULL,
    event text NOT NULL,
    type text NOT NULL,
    sequence bigint,
    at timestamptz NOT NULL,
    attempt int NOT NULL,
    outcome text NOT NULL,
    status int,
    milliseconds int NOT NULL,
    PRIMARY KEY (webhook, number)
);

-- Makes an endpoint, once for each id, or changes, deletes or rewinds one of the client's, or gives it a new secret. Returns it as it is
-- then, or was; nothing if the client has none such. A change of where events go, which, or by what secret, ends the turn that may be
-- under way: what that one reports does not count any more, and until its lease has ended nobody else takes it up.
CREATE FUNCTION change_webhook(called text, given jsonb) RETURNS SETOF webhooks
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    who text := given ->> 'client';
    hook webhooks;
    again boolean := called = 'rewind' OR given ->> 'enabled' = 'true' OR given ?| ARRAY['url', 'events'];
    now timestamptz;
BEGIN
    IF called = 'create' THEN
        -- One at a time for each client, or two at once could be one too many.
        PERFORM pg_advisory_xact_lock(hashtextextended('webhooks of ' || who, 0));
        SELECT * INTO hook FROM webhooks w WHERE w.id = (given ->> 'id')::uuid AND w.client = who;
        IF FOUND THEN
            RETURN NEXT hook;
            RETURN;
        END IF;
        IF (SELECT count(w.id) FROM webhooks w WHERE w.client = who) >= (given ->> 'most')::int THEN
            RAISE SQLSTATE 'BD409' USING MESSAGE = 'the client has as many webhooks as it may have';
        END IF;
        -- It begins with what happens from now on.
        INSERT INTO webhooks (id, client, url, events, description, secrets, delivered)
        SELECT (given ->> 'id')::uuid, c.name, given ->> 'url', ARRAY(SELECT jsonb_array_elements_text(given -> 'events')),
               given ->> 'description',
               jsonb_build_array(jsonb_build_object('version', 1, 'key', given ->> 'key', 'ends_at', NULL)),
               c.last_number + c.last_closing
        FROM clients c WHERE c.name = who
        RETURNING * INTO STRICT hook;
        RETURN NEXT hook;
        RETURN;
    END IF;
    SELECT * INTO hook FROM webhooks w WHERE w.id = (given ->> 'id')::uuid AND w.client = who FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    now := clock_timestamp();
    CASE called
    WHEN 'change' THEN
        hook.url := coalesce(given ->> 'url', hook.url);
        hook.description := coalesce(given ->> 'description', hook.description);
        IF given ? 'events' THEN
            hook.events := ARRAY(SELECT jsonb_array_elements_text(given -> 'events'));
        END IF;
        IF given ? 'enabled' THEN
            hook.disabled := CASE WHEN given ->> 'enabled' = 'true' THEN NULL ELSE 'client' END;
        END IF;
        IF given ?| ARRAY['url', 'events', 'enabled'] THEN
            hook.lease := NULL;
        END IF;
    WHEN 'rewind' THEN
        hook.delivered := least(hook.delivered, (given ->> 'after')::bigint);
        hook.lease := NULL;
    WHEN 'rotate' THEN
        hook.lease := NULL;
        hook.secrets := jsonb_build_array(jsonb_build_object(
            'version', (hook.secrets -> 0 ->> 'version')::int + 1, 'key', given ->> 'key', 'ends_at', NULL
        )) || coalesce((
            SELECT jsonb_agg(s.secret || jsonb_build_object('ends_at', coalesce(
                (s.secret ->> 'ends_at')::timestamptz,
                now + make_interval(secs => (given ->> 'overlap_seconds')::float8)
            )) ORDER BY s.place)
            FROM jsonb_array_elements(hook.secrets) WITH ORDINALITY AS s (secret, place)
            WHERE s.place < (given ->> 'most')::int AND coalesce((s.secret ->> 'ends_at')::timestamptz > now, true)
        ), '[]');
    WHEN 'delete' THEN
        DELETE FROM webhooks w WHERE w.id = hook.id;
        RETURN NEXT hook;
        RETURN;
    END CASE;
    IF again THEN
        hook.failures := 0;
        hook.due_at := now;
    END IF;
    UPDATE webhooks w SET url = hook.url, events = hook.events, description = hook.description, secrets = hook.secrets,
        disabled = hook.disabled, delivered = hook.delivered, failures = hook.failures, due_at = hook.due_at,
        lease = hook.lease
    WHERE w.id = hook.id;
    RETURN NEXT hook;
END
$function$;

-- Leases the endpoints that have waited longest for their turn, `most` of them: those with events that they
-- have not got, which are due, and whose secret it can derive, having one of these keys. Another replica that asks at the
-- same moment passes over them.
CREATE FUNCTION take_webhooks(new_lease uuid, keys text[], most int, lease_seconds float8) RETURNS SETOF webhooks
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    WITH due AS MATERIALIZED (
        SELECT w.id FROM webhooks w JOIN clients c ON c.name = w.client
        WHERE w.disabled IS NULL AND w.due_at <= clock_timestamp()
            AND coalesce(w.leased_until <= clock_timestamp(), true)
            AND c.last_number + c.last_closing > w.delivered AND w.secrets -> 0 ->> 'key' = ANY (keys)
        ORDER BY w.taken_at LIMIT most
        FOR UPDATE OF w SKIP LOCKED
    )
    UPDATE webhooks w
    SET lease = new_lease, leased_until = clock_timestamp() + make_interval(secs => lease_seconds),
        taken_at = clock_timestamp()
    FROM due WHERE w.id = due.id
    RETURNING w.*
$function$;

-- Makes these leases, each with its endpoint, last as long as new ones; returns of which endpoints. No others of the same
-- replica: one that no turn goes on with, because the answer to its taking was lost or its turn broke off, has to end.
CREATE FUNCTION renew_webhooks(hooks uuid[], leases uuid[], lease_seconds float8) RETURNS SETOF uuid
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    UPDATE webhooks w SET leased_until = clock_timestamp() + make_interval(secs => lease_seconds)
    FROM unnest(hooks, leases) AS held (hook, lease)
    WHERE w.id = held.hook AND w.lease = held.lease AND w.leased_until > clock_timestamp()
    RETURNING w.id
$function$;

-- Notes attempts to deliver to an endpoint, a JSON list, and lets go of those that are more than 200 behind the newest.
CREATE FUNCTION note_deliveries(hook uuid, noted jsonb) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
    WITH counted AS (
        UPDATE webhooks w SET attempts = w.attempts + jsonb_array_length(noted) WHERE w.id = hook
        RETURNING w.id, w.attempts
    ), cleared AS (
        DELETE FROM webhook_deliveries d USING counted c WHERE d.webhook = c.id AND d.number <= c.attempts - 200
    )
    INSERT INTO webhook_deliveries (webhook, number, event, type, sequence, at, attempt, outcome, status, milliseconds)
    SELECT c.id, c.attempts - jsonb_array_length(noted) + n.place, n.given ->> 'event', n.given ->> 'type',
           (n.given ->> 'sequence')::bigint, (n.given ->> 'at')::timestamptz, (n.given ->> 'attempt')::int,
           n.given ->> 'outcome', (n.given ->> 'status')::int, (n.given ->> 'milliseconds')::int
    FROM counted c, jsonb_array_elements(noted) WITH ORDINALITY AS n (given, place)
$function$;

-- What a replica tells of an endpoint's turn: how far it has delivered, how often the next event failed and in how many
-- seconds it is due again, and why the endpoint is not to be asked any more, if so. It may keep the lease. Returns whether
-- it had it: otherwise somebody else has taken the endpoint, or it was changed, and nothing of this counts.
CREATE FUNCTION report_turn(
    held uuid, hook uuid, delivered_to bigint, failed int, due_seconds float8, why_disabled text, lease_seconds float8,
    noted jsonb
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
AS $function$
DECLARE
    now timestamptz := clock_timestamp();
BEGIN
    UPDATE webhooks w SET delivered = delivered_to, failures = failed, due_at = now + make_interval(secs => due_seconds),
        disabled = why_disabled, lease = CASE WHEN lease_seconds IS NOT NULL THEN held END,
        leased_until = now + make_interval(secs => lease_seconds)
    WHERE w.id = hook AND w.lease = held;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM note_deliveries(hook, noted);
    RETURN true;
END
$function$;
REVOKE EXECUTE ON FUNCTION change_webhook, take_webhooks, renew_webhooks, note_deliveries, report_turn FROM PUBLIC;
