"""Anchors: one that was kept while the server's clock was ahead stands in no later one's way, and each has the dollar's
price of its time."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
