"""Final answers: look-ups wait for what is being stored, and clocks that differ store nothing."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
