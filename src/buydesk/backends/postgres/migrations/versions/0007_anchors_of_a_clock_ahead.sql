-- What a bitcoin cost in dollars when the price was published, where that is known: exchange rates are compared through it,
-- those of prices of different times too.
ALTER TABLE price_anchors ADD COLUMN dollar_e8 bigint CHECK (dollar_e8 > 0);
UPDATE price_anchors AS kept SET dollar_e8 = dollar.rate_e8
FROM price_anchors AS dollar WHERE dollar.currency = 'USD' AND dollar.as_of = kept.as_of;

DROP FUNCTION keep_price_anchors;
-- Keeps anchors, but replaces none by an earlier one, unless the one that is kept lies in the future: this server's clock
-- was ahead then, and later anchors would have to wait until that time. For the same reason none is kept that lies in the
-- future now. In the order of the currencies, so that two calls never wait for each other. With the rights of its owner,
-- as place_batch, and for the same reason.
CREATE FUNCTION keep_price_anchors(
    currencies text[], rates_e8 bigint[], decided timestamptz[], dollars_e8 bigint[]
) RETURNS void
LANGUAGE sql VOLATILE
SECURITY DEFINER
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

DO $do$
BEGIN
    EXECUTE format('ALTER FUNCTION keep_price_anchors SET search_path = pg_catalog, %I, pg_temp', current_schema());
END
$do$;
