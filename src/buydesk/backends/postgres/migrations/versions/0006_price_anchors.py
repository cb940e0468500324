"""Anchors: the last published prices, and what operators confirmed of one, which no restart forgets."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
