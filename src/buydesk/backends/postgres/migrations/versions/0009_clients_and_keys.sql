ALTER TABLE clients ADD COLUMN created_at timestamptz;
ALTER TABLE clients ALTER COLUMN created_at SET DEFAULT clock_timestamp();

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
LANGUAGE sql IMMUTABLE
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
LANGUAGE plpgsql VOLATILE
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
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'order_satoshi_max', order_satoshi_max,
                             'cap_counts_open', cap_counts_open)::text
    FROM clients WHERE name = of
$function$;
CREATE FUNCTION key_state(of text) RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object('client', client, 'scopes', scopes, 'allow_from', allow_from, 'expires_at', expires_at,
                             'revoked_at', revoked_at)::text
    FROM keys WHERE id = of
$function$;

-- The acts. Each is noted in the same transaction.
CREATE FUNCTION create_client(
    who text, from_where text, reason text, new_name text, cap bigint, largest bigint
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    INSERT INTO clients (name, cap_satoshi, order_satoshi_max) VALUES (new_name, cap, largest);
    PERFORM note_act(who, from_where, 'client created', new_name, reason, NULL, client_state(new_name));
END
$function$;

-- Changes those limits that `changes` names; null takes one away. What was before is read once nobody else can change it.
CREATE FUNCTION limit_client(who text, from_where text, reason text, of text, changes jsonb) RETURNS void
LANGUAGE plpgsql VOLATILE
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
LANGUAGE plpgsql VOLATILE
AS $function$
BEGIN
    INSERT INTO keys (id, client, digest, scopes, allow_from, expires_at)
    VALUES (new_id, of, new_digest, new_scopes, networks, ends_at);
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
LANGUAGE sql STABLE
AS $function$
    SELECT json_build_object('cap_satoshi', cap_satoshi, 'cap_counts_open', cap_counts_open)::text FROM exposure
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
SECURITY DEFINER
AS $function$
    UPDATE keys k SET last_used_on = due.today
    FROM (
        SELECT id, (statement_timestamp() AT TIME ZONE 'UTC')::date AS today FROM keys
        WHERE id = ANY (ids) AND last_used_on IS DISTINCT FROM (statement_timestamp() AT TIME ZONE 'UTC')::date
        ORDER BY id FOR NO KEY UPDATE
    ) due
    WHERE k.id = due.id
$function$;

DO $do$
DECLARE
    function regproc;
BEGIN
    FOREACH function IN ARRAY ARRAY['audit_hash', 'note_act', 'client_state', 'key_state', 'create_client', 'limit_client',
                                    'create_key', 'end_key', 'desk_state', 'set_cap', 'set_cap_counts',
                                    'note_keys_used']::regproc[] LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp', function, current_schema());
    END LOOP;
END
$do$;
