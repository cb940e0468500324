-- Markups. What places and sets them follows with 0012.

-- Before what locks clients: whoever places locks orders first.
-- rate = ceil(market rate * (10000 + markup_bp) / 10000), as money.py has it, in steps that a bigint holds.
ALTER TABLE orders ADD CONSTRAINT orders_marked_up CHECK (
    markup_bp <= 5000 AND rate_e8 = market_rate_e8 + market_rate_e8 / 10000 * markup_bp
        + (market_rate_e8 % 10000 * markup_bp + 9999) / 10000
) NOT VALID;  -- from now on

-- What is added to the market's rate for a client, in basis points, where that is not what the desk adds. It reaches whoever
-- prices the client's orders with its keys.
CREATE TABLE markups (
    client text COLLATE "C" NOT NULL REFERENCES clients,
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    markup_bp int NOT NULL CHECK (markup_bp BETWEEN 0 AND 5000),
    PRIMARY KEY (client, currency)
);
