"""Callers, and the keys by which they are known: the port KeyStore."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property, lru_cache
from ipaddress import ip_network
from typing import Protocol

import msgspec

from buydesk.clients.scopes import CLIENT_SCOPES, SCOPES, Scope
from buydesk.hosts import Address
from buydesk.money import Currency
from buydesk.orders.model import ANONYMOUS
from buydesk.reading import Moment

# The settings whose tokens let a service ask for keys: those of the services that are called with keys.
KEY_READERS = ("reading_tokens", "placing_tokens", "processing_tokens", "operating_tokens")

NOTED_AT_ONCE_MAX = 1000
# The client whose key `up` keeps for whoever runs the desk.
OPERATOR = "operator"
_network = lru_cache(maxsize=4096)(ip_network)  # reading one takes ten times as long as to look an address up in it


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. One of the desk's own services is no client: its name is empty. The rates are of its client, where
    that has one of its own, and of the key alone, where it is limited further; the markups, by currency and in basis
    points, and how long quotes may be valid, are its client's own."""

    client: str
    scopes: Collection[Scope]
    key_id: str | None = None
    client_rate_per_minute: int | None = None
    rate_per_minute: int | None = None
    client_markup_bp: Mapping[str, int] = field(default_factory=dict)
    client_quote_seconds_max: int | None = None

    def markup_bp(self, currency: Currency, of_desk_bp: int) -> int:
        """What is added to the market's rate for it, in basis points: its client's own, or else the desk's."""
        return self.client_markup_bp.get(currency, of_desk_bp)

    @property
    def is_anybody(self) -> bool:
        """Whether it is whoever reaches an open desk, to whom the desk's exposure is its own."""
        return self.client == ANONYMOUS and self.key_id is None


ANYBODY = Caller(ANONYMOUS, CLIENT_SCOPES)


class StoredKey(msgspec.Struct, frozen=True, dict=True):
    """A key as it is stored: `digest` is the SHA-256 of its text. `allow_from` are the networks that it is taken from,
    all if there are none. `last_used_on` is a day of UTC, known roughly. The others are as in `Caller`."""

    id: str
    client: str
    digest: bytes
    scopes: Sequence[str]
    allow_from: Sequence[str]
    expires_at: Moment | None
    revoked_at: Moment | None
    last_used_on: date | None
    rate_per_minute: int | None = None
    client_rate_per_minute: int | None = None
    client_markup_bp: Mapping[str, int] = msgspec.field(default_factory=dict)
    client_quote_seconds_max: int | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def is_taken_from(self, address: Address | None) -> bool:
        """Whether it may be used from the address; where that is not known, only when it may be from everywhere."""
        if not self.allow_from:
            return True
        return address is not None and any(address in _network(each) for each in self.allow_from)

    @cached_property
    def caller(self) -> Caller:
        """Who calls with it. Scopes that this version does not know permit nothing."""
        scopes = SCOPES.intersection(self.scopes)
        rates = self.client_rate_per_minute, self.rate_per_minute
        return Caller(self.client, scopes, self.id, *rates, self.client_markup_bp, self.client_quote_seconds_max)


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is to permit, whose it is to be, from where it may be used, when it ends, and how often it may be
    used: requests of each kind a minute, None for no limit beside its client's."""

    client: str
    scopes: Sequence[str]
    allow_from: Sequence[str] = ()
    expires_at: datetime | None = None
    rate_per_minute: int | None = None


class KeyStore(Protocol):
    """Where keys are stored."""

    async def key(self, key_id: str) -> StoredKey | None:
        """The key with this id, if there is one; raises LedgerUnavailable, Overloaded."""
        ...

    async def note_used(self, key_ids: Sequence[str]) -> None:
        """Notes that these keys, at most NOTED_AT_ONCE_MAX, were used today; raises LedgerUnavailable, Overloaded."""
        ...

    async def close(self) -> None: ...
