-- The ledger's schema as it is now, to be read as one text. It is not run: databases get it by the migrations, and a test
-- holds the two together.

-- One row: what the desk may sell, what it has sold, and how many orders that were. Placing locks it first.
CREATE TABLE exposure (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    livemode boolean NOT NULL,
    cap_satoshi bigint NOT NULL CHECK (cap_satoshi BETWEEN 0 AND 2100000000000000),
    used_satoshi bigint NOT NULL DEFAULT 0,
    last_number bigint NOT NULL DEFAULT 0 CHECK (last_number >= 0),
    CONSTRAINT used_within_cap CHECK (used_satoshi BETWEEN 0 AND cap_satoshi)
) WITH (fillfactor = 10);  -- room for new versions of the row on its own page

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

-- The orders. They are inserted once and never changed; number is without gaps and in the order of commit. Keys are
-- compared as bytes, not by the locale's rules.
CREATE TABLE orders (
    number bigint PRIMARY KEY CHECK (number > 0),
    amount_cents bigint NOT NULL CHECK (amount_cents BETWEEN 1 AND 99999999999),
    rate_e8 bigint NOT NULL CHECK (rate_e8 > 0),
    satoshi bigint NOT NULL CHECK (satoshi > 0),
    created_at timestamptz NOT NULL,
    price_as_of timestamptz NOT NULL,
    id uuid NOT NULL CONSTRAINT orders_id_unique UNIQUE,
    price_id uuid NOT NULL,
    representation smallint NOT NULL,
    currency text NOT NULL CHECK (currency IN ('EUR', 'GBP', 'USD')),
    client text COLLATE "C" NOT NULL,
    client_order_id text COLLATE "C" CHECK (length(client_order_id) BETWEEN 1 AND 255)
);
CREATE UNIQUE INDEX orders_key_unique ON orders (client_order_id, client) WHERE client_order_id IS NOT NULL;

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
CREATE TRIGGER still_priced AFTER UPDATE ON orders
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
--   'expired'   its price record is      'over_cap'  does not fit; used_then[i] is what was used when it was tried
--   'placed'    stored as numbers[i]
-- Items with equal ids share a slot in id_slots, items with equal keys one in key_slots (0: no key). A slot is the
-- index of the first such item. price_slots index the prices_* arrays.
--
-- Repeats are looked up before the exposure row is locked. Why that is safe: the function is read committed, so every
-- statement has a snapshot of its own, and one statement reads last_number and looks for the orders. Whoever stores
-- orders raises last_number and commits both together. So if last_number is still the same once the row is locked,
-- nothing was stored in between, nothing can be until this transaction ends, and what was found still holds; otherwise
-- it looks again, under the lock. Orders never change or go away: a batch of nothing but repeats needs no lock, writes
-- nothing and waits for nobody.
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
-- them in any other way nor change the cap. It finds our tables only, whatever tables its caller makes.
--
-- A record is stored as it was signed, so every copy of it brings the same document, and another one is refused; when it
-- may be used until, each copy says for its own orders.
CREATE FUNCTION place_batch(
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
SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp
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
