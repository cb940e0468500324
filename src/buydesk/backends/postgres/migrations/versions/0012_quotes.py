"""Orders by quote."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0012", "0011"
upgrade = upgrade_by(__file__)
