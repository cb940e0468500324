-- Public keys that price records are signed with, for ever: as long as there are orders, the prices they were placed at
-- can be proven. Only `buydesk migrate` adds any.
CREATE TABLE price_keys (
    key text PRIMARY KEY,
    added_at timestamptz NOT NULL DEFAULT now()
);

-- The key that a record names; NULL for those from before they were signed.
ALTER TABLE price_records ADD COLUMN key text
    GENERATED ALWAYS AS (document::jsonb -> 'signature' ->> 'key') STORED
    CONSTRAINT price_records_key_known REFERENCES price_keys (key);

-- Placing is this one function, with the rights of its owner: whoever may call it can place orders, and can neither write
-- them in any other way nor change the cap. It finds our tables and nobody else's, whatever its caller calls a table.
DO $do$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION place_batch SECURITY DEFINER SET search_path = pg_catalog, %I, pg_temp', current_schema()
    );
END
$do$;
REVOKE EXECUTE ON FUNCTION place_batch FROM PUBLIC;
