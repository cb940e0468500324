"""Trust: the keys that prices were signed with stay, and who places orders may do nothing else."""

from buydesk.backends.postgres.sql_files import upgrade_by

revision, down_revision = "0004", "0003"
upgrade = upgrade_by(__file__)
