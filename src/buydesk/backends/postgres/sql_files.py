"""Migrations are SQL: each is the .sql file beside its module, which only says after which other one it comes."""

from collections.abc import Callable
from pathlib import Path

from alembic import op


def upgrade_by(module: str) -> Callable[[], None]:
    """What Alembic calls to upgrade, given the module's file."""

    def upgrade() -> None:
        op.get_context().impl.static_output(Path(module).with_suffix(".sql").read_text(encoding="utf-8"))

    return upgrade
