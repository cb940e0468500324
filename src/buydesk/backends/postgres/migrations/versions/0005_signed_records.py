"""Signed records: one document a price record, whoever brings it first, and nothing is placed that is not stored."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
