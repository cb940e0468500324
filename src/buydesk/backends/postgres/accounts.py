"""The account of db_proxy in PostgreSQL: it may read, place and close orders, keep price records and the last prices,
note that keys were used and what was refused, keep clients' webhooks and, with an operator's key, do what that one
permits. It changes nothing that is stored in any other way."""

import hashlib
import hmac
import secrets
from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from buydesk.errors import CannotStart

TABLES = (
    "alembic_version",
    "audit",
    "clients",
    "closings",
    "daily_limits",
    "exposure",
    "keys",
    "markups",
    "orders",
    "price_anchors",
    "price_confirmations",
    "price_keys",
    "price_records",
    "refusals",
    "webhook_deliveries",
    "webhooks",
)
# All of its writing.
FUNCTIONS = (
    *("place_items", "close_orders", "place_orders", "place_batch", "keep_price_anchors", "keep_price_record"),
    *("note_keys_used", "note_refusals", "act_by_key"),
    *("change_webhook", "take_webhooks", "renew_webhooks", "note_deliveries", "report_turn"),
)
# As many iterations as PostgreSQL itself makes (scram_iterations).
_TURNS = 4096


@dataclass(frozen=True)
class Account:
    """A role and its password."""

    name: str
    password: str


def account_of(database_url: str) -> Account:
    """The account that an address names; raises CannotStart when its name or password cannot be of one."""
    parts = urlsplit(database_url)
    name, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not name or not password or not password.isascii() or not password.isprintable():
        raise CannotStart(
            "BUYDESK_DB_PROXY_DATABASE_URL: must have the name of an account and its password, in ASCII characters"
        )
    return Account(name, password)


def verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL keeps of a password (RFC 5803): it is sent in place of the password, which may be logged."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _TURNS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt_text, stored_text, server_text = (b64encode(each).decode() for each in (salt, stored, server))
    return f"SCRAM-SHA-256${_TURNS}:{salt_text}${stored_text}:{server_text}"


def statements(account: Account, schema: str, *, exists: bool) -> list[str]:
    """What makes the account, or gives one that exists this password, and lets it read and call our functions in the
    schema."""
    name, within = _identifier(account.name), _identifier(schema)
    # Only verbs of ours and names in quotes; a verifier has none of the characters that end a text.
    functions = ", ".join(FUNCTIONS)
    password = verifier(account.password, secrets.token_bytes(16))
    return [
        f"{'ALTER' if exists else 'CREATE'} ROLE {name} LOGIN PASSWORD '{password}'",
        # Databases from before PostgreSQL 15 let everybody make functions: ours could take one for the server's.
        f"REVOKE CREATE ON SCHEMA {within} FROM PUBLIC, {name}",
        f"GRANT USAGE ON SCHEMA {within} TO {name}",
        f"GRANT SELECT ON {', '.join(TABLES)} TO {name}",
        f"REVOKE EXECUTE ON FUNCTION {functions} FROM PUBLIC",  # again: a backup may be restored without its rights
        f"GRANT EXECUTE ON FUNCTION {functions} TO {name}",
    ]


# Why the account $1 could change what may be sold in the tables $2, "" when it cannot: by rights beyond those of
# `statements`. It may become no other role, whatever that one may do, and own nothing.
EXCESS = """
WITH account AS (SELECT * FROM pg_roles WHERE rolname = $1),
     held AS (SELECT oid, relname, relowner, relnamespace FROM pg_class WHERE oid = ANY ($2::text[]::regclass[])),
     kept_in AS (SELECT * FROM pg_namespace WHERE oid IN (SELECT relnamespace FROM held))
SELECT coalesce((
    SELECT 'is a superuser, or may make roles or replicas' FROM account
    WHERE rolsuper OR rolcreaterole OR rolreplication OR rolbypassrls
    UNION ALL
    SELECT 'owns the table ' || relname FROM held JOIN account ON relowner = account.oid
    UNION ALL
    SELECT 'owns the database or the schema of the tables' FROM account
    WHERE oid IN (SELECT nspowner FROM kept_in)
        OR oid = (SELECT datdba FROM pg_database WHERE datname = current_database())
    UNION ALL
    SELECT 'is a member of the role ' || roleid::regrole FROM pg_auth_members JOIN account ON member = account.oid
    UNION ALL
    SELECT 'may make things in the schema of the tables' FROM kept_in WHERE has_schema_privilege($1, oid, 'CREATE')
    UNION ALL
    SELECT 'could have another''s function run by our functions: ' || f.oid::regprocedure
    FROM pg_proc f JOIN kept_in ON pronamespace = kept_in.oid JOIN pg_roles r ON r.oid = proowner
    WHERE NOT rolsuper AND proowner NOT IN (SELECT relowner FROM held)
    UNION ALL
    SELECT 'may write into the table ' || relname FROM held
    WHERE has_any_column_privilege($1, oid, 'INSERT, UPDATE')
        OR has_table_privilege($1, oid, 'DELETE, TRUNCATE, TRIGGER')
    LIMIT 1
), '')
"""


def _identifier(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
