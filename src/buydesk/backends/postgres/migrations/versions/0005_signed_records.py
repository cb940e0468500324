"""Signed records: one document a price record, whoever brings it first, and nothing is placed that is not stored."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0005", "0004"
upgrade = upgrade_by(__file__)
