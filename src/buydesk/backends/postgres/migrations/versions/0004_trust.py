"""Trust: the keys that prices were signed with stay, and who places orders may do nothing else."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
