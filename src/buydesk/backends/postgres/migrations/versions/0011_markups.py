"""Markups."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0011", "0010"
upgrade = upgrade_by(__file__)
