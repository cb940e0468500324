-- Webhooks: schema.sql, which has the same, explains them.

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
SECURITY DEFINER
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
SECURITY DEFINER
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
SECURITY DEFINER
AS $function$
    UPDATE webhooks w SET leased_until = clock_timestamp() + make_interval(secs => lease_seconds)
    FROM unnest(hooks, leases) AS held (hook, lease)
    WHERE w.id = held.hook AND w.lease = held.lease AND w.leased_until > clock_timestamp()
    RETURNING w.id
$function$;

-- Notes attempts to deliver to an endpoint, a JSON list, and lets go of those that are more than 200 behind the newest.
CREATE FUNCTION note_deliveries(hook uuid, noted jsonb) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
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
SECURITY DEFINER
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

DO $do$
DECLARE
    function regproc;
BEGIN
    FOREACH function IN ARRAY ARRAY['change_webhook', 'take_webhooks', 'renew_webhooks', 'note_deliveries',
                                    'report_turn']::regproc[] LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, %I, pg_temp', function, current_schema());
    END LOOP;
END
$do$;
