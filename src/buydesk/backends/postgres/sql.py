"""SQL: named queries (queries.sql) and the migrations that make the tables and functions they use."""

import re
from importlib.resources import files
from pathlib import Path

_NAMED = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)

_FOLDER = files("buydesk.backends.postgres")

# The newest migration, by the number its file's name begins with.
REVISION = max(
    path.name.partition("_")[0] for path in (_FOLDER / "migrations" / "versions").iterdir() if path.name.endswith(".py")
)
QUERIES: dict[str, str] = {
    name: text.strip() for name, text in _NAMED.findall((_FOLDER / "queries.sql").read_text(encoding="utf-8"))
}


def beside(migration: str) -> str:
    """The text of the .sql file beside a migration, given its file."""
    return Path(migration).with_suffix(".sql").read_text(encoding="utf-8")
