"""Webhooks: endpoints, what was delivered to them, and whose turn it is."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0013", "0012"
upgrade = upgrade_by(__file__)
