"""The ledger in PostgreSQL: queries, the function that places a batch, migrations, accounts."""
