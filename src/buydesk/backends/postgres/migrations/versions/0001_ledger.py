"""The ledger: exposure, price records, orders, and the function that places a batch."""

from alembic import op

from buydesk.backends.postgres.sql import beside

revision = "0001"
down_revision = None


def upgrade() -> None:
    """The file beside this one."""
    op.get_context().impl.static_output(beside(__file__))
