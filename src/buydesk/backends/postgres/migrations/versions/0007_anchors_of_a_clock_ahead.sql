-- Keeps anchors, but replaces none by an earlier one, unless the one that is kept lies in the future: this server's clock
-- was ahead then, and later anchors would have to wait until that time. For the same reason none is kept that lies in the
-- future now. In the order of the currencies, so that two calls never wait for each other. With the rights of its owner,
-- as place_batch, and for the same reason.
CREATE OR REPLACE FUNCTION keep_price_anchors(currencies text[], rates_e8 bigint[], observed timestamptz[]) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
AS $function$
    INSERT INTO price_anchors AS kept (currency, rate_e8, as_of)
    SELECT new.currency, new.rate_e8, least(new.as_of, statement_timestamp())
    FROM unnest(currencies, rates_e8, observed) AS new (currency, rate_e8, as_of)
    ORDER BY new.currency
    ON CONFLICT (currency) DO UPDATE SET rate_e8 = excluded.rate_e8, as_of = excluded.as_of
    WHERE kept.as_of < excluded.as_of OR kept.as_of > statement_timestamp()
$function$;

DO $do$
BEGIN
    EXECUTE format('ALTER FUNCTION keep_price_anchors SET search_path = pg_catalog, %I, pg_temp', current_schema());
END
$do$;
