-- An order as one transaction: the cap update, which gives the order its number, and the insert.
BEGIN;
UPDATE exposure SET used_satoshi = used_satoshi + 244, last_number = last_number + 1
WHERE used_satoshi + 244 <= cap_satoshi RETURNING last_number \gset
INSERT INTO orders (number, amount_cents, rate_e8, satoshi, created_at, price_as_of, id, price_id, representation,
                    currency, client, client_order_id)
VALUES (:last_number, 5, 2057278000000, 244, now(), now(), uuidv7(), '46bfc611-b5e2-45ec-b628-a420ecb5d5e1', 1,
        'EUR', 'anonymous', gen_random_uuid()::text);
COMMIT;
