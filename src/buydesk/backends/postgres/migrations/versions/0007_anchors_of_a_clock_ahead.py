"""Anchors: one that was kept while the server's clock was ahead stands in no later one's way, and each has the dollar's
price of its time."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0007", "0006"
upgrade = upgrade_by(__file__)
