"""Placing costs half: repeats are looked up before the lock, keys compared as bytes, prices checked once a batch."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
