"""Limits a day, pauses, rates, refusals on record, and operators' acts by key."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0010", "0009"
upgrade = upgrade_by(__file__)
