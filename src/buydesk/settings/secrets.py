"""Secrets of services: who knows which, and which belong together."""

import secrets
from collections.abc import Mapping

from buydesk.topology import PORTS

# Longer than every secret that somebody else made up: those of deploy/secrets, and any server's default.
SECRET_CHARS_MIN = 16

# Who knows which secret; nobody else has business with it.
OWNERS: Mapping[str, tuple[str, ...]] = {
    "database_url": ("db_proxy",),
    "db_proxy_database_url": (),  # only `migrate`
    "redis_url": ("api_cache_proxy", "health_check"),
    "price_signing_key": ("api_updater",),
    "quote_signing_key": ("create_buy_order",),
    "publishing_tokens": ("api_cache_proxy", "api_updater", "db_proxy"),
    "placing_tokens": ("create_buy_order", "db_proxy"),
    "reading_tokens": ("db_proxy", "fetch_buy_orders"),
    "processing_tokens": ("db_proxy", "process_buy_orders"),
    "operating_tokens": ("db_proxy", "operate_desk"),
    "counting_tokens": (
        "api_cache_proxy",
        "create_buy_order",
        "db_proxy",
        "fetch_buy_orders",
        "operate_desk",
        "process_buy_orders",
    ),
    "reporting_tokens": tuple(PORTS),
    "webhook_keys": ("process_buy_orders",),
}
TOKENS = tuple(name for name in OWNERS if name.endswith("_tokens"))
# Who takes what another process has signed and proves it, by which public keys.
PROVERS: Mapping[str, tuple[str, ...]] = {
    "price_keys": ("api_cache_proxy", "create_buy_order", "db_proxy"),
    "quote_keys": ("create_buy_order", "db_proxy"),
}
# The public keys that go with a signing key.
KEY_PAIRS: Mapping[str, str] = {"price_signing_key": "price_keys", "quote_signing_key": "quote_keys"}
# The secrets that are made as signing keys are.
SECRET_KEYS = (*KEY_PAIRS, "webhook_keys")


def new_token() -> str:
    """A token that nobody knows yet."""
    return secrets.token_urlsafe(32)
