"""Scopes: what a key permits. They never change what a call means."""

from typing import Literal, get_args

Scope = Literal[
    "orders:create",
    "orders:read",
    "orders:read_all",
    "orders:process",
    "quotes:create",
    "events:read",
    "webhooks:manage",
    "clients:manage",
    "desk:pause",
    "desk:cap",
    "prices:confirm",
]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
# What concerns a client's own orders only; whoever calls an open desk without a key has these.
CLIENT_SCOPES: frozenset[Scope] = frozenset(
    {"orders:create", "orders:read", "quotes:create", "events:read", "webhooks:manage"}
)
