"""Clients with keys, and a record of what operators do."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0009", "0008"
upgrade = upgrade_by(__file__)
