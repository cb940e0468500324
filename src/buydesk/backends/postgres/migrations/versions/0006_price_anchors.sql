-- The last price of each currency that the desk published, by which the next one is judged: no restart forgets it.
CREATE TABLE price_anchors (
    currency text PRIMARY KEY CHECK (currency ~ '^[A-Z]{3}$'),
    rate_e8 bigint NOT NULL CHECK (rate_e8 > 0),
    as_of timestamptz NOT NULL
);
-- A desk that has sold has a history: what it sold at last.
INSERT INTO price_anchors (currency, rate_e8, as_of)
SELECT code, newest.rate_e8, newest.price_as_of
FROM unnest(ARRAY['EUR', 'GBP', 'USD']) AS code
CROSS JOIN LATERAL (
    SELECT o.rate_e8, o.price_as_of FROM orders o WHERE o.currency = code ORDER BY o.number DESC LIMIT 1
) AS newest;

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

-- Keeps anchors, but replaces none by an earlier one. No anchor lies in the future: one from a clock that was ahead would
-- stay until then. In the order of the currencies, so that two calls never wait for each other. With the rights of its
-- owner, as place_batch, and for the same reason.
CREATE FUNCTION keep_price_anchors(currencies text[], rates_e8 bigint[], observed timestamptz[]) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    INSERT INTO price_anchors AS kept (currency, rate_e8, as_of)
    SELECT new.currency, new.rate_e8, least(new.as_of, statement_timestamp())
    FROM unnest(currencies, rates_e8, observed) AS new (currency, rate_e8, as_of)
    ORDER BY new.currency
    ON CONFLICT (currency) DO UPDATE SET rate_e8 = excluded.rate_e8, as_of = excluded.as_of
    WHERE kept.as_of < excluded.as_of
$function$;
REVOKE EXECUTE ON FUNCTION keep_price_anchors FROM PUBLIC;

-- Keeps a confirmation that holds from now on, by this server's clock, for so many minutes.
CREATE FUNCTION confirm_price(
    new_currency text, new_low_e8 bigint, new_high_e8 bigint, new_why text, minutes int, OUT ends_at timestamptz
)
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    INSERT INTO price_confirmations (currency, low_e8, high_e8, why, confirmed_at, expires_at)
    VALUES (new_currency, new_low_e8, new_high_e8, new_why, statement_timestamp(),
            statement_timestamp() + make_interval(mins => minutes))
    RETURNING expires_at
$function$;
REVOKE EXECUTE ON FUNCTION confirm_price FROM PUBLIC;

DO $do$
BEGIN
    EXECUTE format('ALTER FUNCTION keep_price_anchors SET search_path = pg_catalog, %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION confirm_price SET search_path = pg_catalog, %I, pg_temp', current_schema());
END
$do$;
