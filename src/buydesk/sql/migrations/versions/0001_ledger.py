"""The ledger: exposure, price records, orders, and the function that places a batch."""

from pathlib import Path
from typing import Any

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Runs the file beside this one in the migration's transaction."""
    statements = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
    # Several statements in one text: asyncpg takes them, SQLAlchemy's prepared statements do not.
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(statements))
