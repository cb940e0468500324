"""Placing costs half: repeats are looked up before the lock, keys compared as bytes, prices checked once a batch."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0002", "0001"
upgrade = upgrade_by(__file__)
