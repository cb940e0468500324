"""The ledger: exposure, price records, orders, and the function that places a batch."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0001", None
upgrade = upgrade_by(__file__)
