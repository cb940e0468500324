"""The ledger: exposure, price records, orders, and the function that places a batch."""

from alembic import op

from buydesk.sql import run_beside

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Runs the file beside this one."""
    run_beside(__file__, op.get_bind())
