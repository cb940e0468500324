-- Public keys that price records are signed with, for ever: as long as there are orders, the prices they were placed at
-- can be proven. Only `buydesk migrate` adds any.
CREATE TABLE price_keys (
    key text PRIMARY KEY,
    added_at timestamptz NOT NULL DEFAULT now()
);

-- The key that a record names; NULL for those from before they were signed. The document is not read as JSON here, because
-- PostgreSQL refuses some that are (with \u0000 in a text, say of an exchange's error), and the orders with them. As it is
-- written, no text in it can hold what is looked for: there a quotation mark has a backslash before it.
ALTER TABLE price_records ADD COLUMN key text
    GENERATED ALWAYS AS (substring(document FROM '"signature":\{"key":"([A-Za-z0-9_-]+)"')) STORED
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
