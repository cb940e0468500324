"""Placing costs half: repeats are looked up before the lock, keys compared as bytes, prices checked once a batch."""

from pathlib import Path
from typing import Any

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Runs the file beside this one in the migration's transaction."""
    statements = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # Several statements in one text: asyncpg takes them, SQLAlchemy's prepared statements do not.
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(statements))
