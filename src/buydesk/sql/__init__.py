"""SQL: named queries (queries.sql) and the migrations that make the tables and functions they use."""

import re
from importlib.resources import files

_NAMED = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)

QUERIES: dict[str, str] = {
    name: text.strip()
    for name, text in _NAMED.findall((files("buydesk.sql") / "queries.sql").read_text(encoding="utf-8"))
}
