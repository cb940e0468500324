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
# Which the database as a whole is; and what became of an order, which is stored beside it.
_ELSEWHERE = {"livemode": "e.livemode", "status": "coalesce(x.status, 'accepted') AS status"}
_ELSEWHERE |= {name: f"x.{name}" for name in ("settlement_reference", "reason", "closed_at")}
# What stands for columns that orders from before migration 0008 do not have.
_BEFORE = {"client_number": "number", "market_rate_e8": "rate_e8", "received_at": "created_at"}
_SELECTED = {name: f"coalesce(o.{name}, o.{other}) AS {name}" for name, other in _BEFORE.items()} | _ELSEWHERE
_UNCHANGED = {
    "status": "'accepted'",
    "settlement_reference": "NULL",
    "reason": "NULL",
    "closed_at": "NULL::timestamptz",
}
_STORED = [name for name in _FIELDS if name not in _ELSEWHERE]
_COLUMNS = {
    "{order}": ", ".join(_SELECTED.get(name, f"o.{name}") for name in _FIELDS),
    "{placed}": ", ".join(
        f"{_UNCHANGED[name]} AS {name}" if name in _UNCHANGED else _SELECTED.get(name, f"o.{name}") for name in _FIELDS
    ),
    "{stored}": ", ".join(_STORED),
    # A seek for each order, whatever the planner thinks of the table: the limit keeps it from reading all of it once.
    "{closing}": "LEFT JOIN LATERAL (\n"
    "    SELECT status, settlement_reference, reason, closed_at FROM closings WHERE number = o.number LIMIT 1\n"
    ") x ON true",
    "{key}": "id, client, digest, scopes, allow_from::text[] AS allow_from, expires_at, revoked_at, last_used_on,\n"
    "       rate_per_minute,\n"
    "       (SELECT c.rate_per_minute FROM clients c WHERE c.name = k.client) AS client_rate_per_minute,\n"
    "       (SELECT c.quote_seconds_max FROM clients c WHERE c.name = k.client) AS client_quote_seconds_max,\n"
    "       (\n"
    "    SELECT coalesce(json_object_agg(m.currency, m.markup_bp ORDER BY m.currency), '{}')::text\n"
    "    FROM markups m WHERE m.client = k.client\n"
    ") AS client_markup_bp",
    "{webhook}": "id, client, url, events, description, created_at, secrets::text AS secrets, disabled, delivered,\n"
    "       failures, due_at",
    "{client}": "name, cap_satoshi, order_satoshi_max, cap_counts_open, rate_per_minute, quote_seconds_max,\n"
    "       used_satoshi, last_number AS orders, (\n"
    "    SELECT coalesce(json_object_agg(currency, cents_max ORDER BY currency), '{}')::text\n"
    "    FROM daily_limits WHERE client = c.name\n"
    ") AS daily_cents_max, (\n"
    "    SELECT coalesce(json_object_agg(currency, markup_bp ORDER BY currency), '{}')::text\n"
    "    FROM markups WHERE client = c.name\n"
    ") AS markup_bp, (\n"
    "    SELECT count(k.id) FROM keys k\n"
    "    WHERE k.client = c.name AND revoked_at IS NULL AND coalesce(expires_at > clock_timestamp(), true)\n"
    ") AS keys",
}


def _queries() -> dict[str, str]:
    text = (_FOLDER / "queries.sql").read_text(encoding="utf-8")
    for mark, columns in _COLUMNS.items():
        text = text.replace(mark, columns)
    return {name: query.strip() for name, query in _NAMED.findall(text)}


QUERIES = _queries()
