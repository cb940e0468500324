"""Placing costs half: repeats are looked up before the lock, keys compared as bytes, prices checked once a batch."""

from alembic import op

from buydesk.sql import run_beside

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Runs the file beside this one."""
    run_beside(__file__, op.get_bind())
