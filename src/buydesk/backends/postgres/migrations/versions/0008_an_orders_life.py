"""An order's life: clients with accounts, orders that are settled or cancelled, and events with numbers."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0008", "0007"
upgrade = upgrade_by(__file__)
