"""Anchors: the last published prices, and what operators confirmed of one, which no restart forgets."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0006", "0005"
upgrade = upgrade_by(__file__)
