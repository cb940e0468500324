"""Final answers: look-ups wait for what is being stored, and clocks that differ store nothing."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0003", "0002"
upgrade = upgrade_by(__file__)
