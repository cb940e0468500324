"""SQL: named queries (queries.sql), and the migrations that make the tables and functions they use (schema.sql is their
sum)."""

import re
from importlib.resources import files

from buydesk.orders.model import Order

_NAMED = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)

_FOLDER = files("buydesk.backends.postgres")

# The newest migration, by the number its file's name begins with.
REVISION = max(
    path.name.partition("_")[0] for path in (_FOLDER / "migrations" / "versions").iterdir() if path.name.endswith(".py")
)
_FIELDS = Order.__struct_fields__
_STORED = [name for name in _FIELDS if name != "livemode"]  # which the database as a whole is
_COLUMNS = {
    "{order}": ", ".join(f"{'e' if name == 'livemode' else 'o'}.{name}" for name in _FIELDS),
    "{stored}": ", ".join(_STORED),
}


def _queries() -> dict[str, str]:
    text = (_FOLDER / "queries.sql").read_text(encoding="utf-8")
    for mark, columns in _COLUMNS.items():
        text = text.replace(mark, columns)
    return {name: query.strip() for name, query in _NAMED.findall(text)}


QUERIES = _queries()
