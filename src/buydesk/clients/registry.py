"""What operators read and change: clients, keys, the desk's cap, pauses and confirmed prices. The port Registry."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv6Address, ip_network
from typing import Protocol, TypeVar

import msgspec

from buydesk.clients.audit import Act
from buydesk.clients.keys import Key, new_key
from buydesk.clients.model import NewKey, StoredKey
from buydesk.clients.scopes import SCOPES, Scope
from buydesk.errors import OutcomeUnknown
from buydesk.money import Currency
from buydesk.prices.anchors import Confirmation, NewConfirmation, require_confirmable

CLIENT_PATTERN = "^[a-z0-9][a-z0-9-]{0,31}$"
CLIENTS_MAX = 1000  # in one list, as of keys
_CLIENT = re.compile(CLIENT_PATTERN)


def parse_client(text: str) -> str:
    """The name of a client; raises ValueError."""
    if not _CLIENT.fullmatch(text):
        raise ValueError("must have 1 to 32 characters: a to z, 0 to 9 and, but for the first, -")
    return text


def parse_scope(text: str) -> Scope:
    """A scope; raises ValueError."""
    for scope in SCOPES:
        if scope == text:
            return scope
    raise ValueError(f"has no scope {text[:50]}; there are {', '.join(sorted(SCOPES))}")


def parse_network(text: str) -> str:
    """A network as it is stored; raises ValueError. IPv4 has to be written as such: so callers' addresses are."""
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ValueError("must be an address or a network, such as 192.0.2.0/24") from error
    address = network.network_address
    if isinstance(address, IPv6Address) and (address.ipv4_mapped or address.scope_id):
        raise ValueError("must be an address or a network, IPv4 written as such and IPv6 without a zone")
    return str(network)


@dataclass(frozen=True, slots=True)
class Operator:
    """Who acts, as whoever owns the database, and from where."""

    name: str
    address: str


class ShownKey(msgspec.Struct, frozen=True):
    """The text of an operator's key, and from where it was shown."""

    text: str
    address: str


class Client(msgspec.Struct, frozen=True):
    """A client: its cap and largest order in satoshi, its requests of each kind a minute, None without such a limit of
    its own; what it may buy a day by currency, in cents; whether its cap counts open orders only; what it has bought;
    what is added to the market's rate for it by currency, in basis points, where that is not what the desk adds, and
    for how many seconds its quotes may be valid, None as long as the desk's: of both an older db_proxy says nothing.
    """

    name: str
    cap_satoshi: int | None
    order_satoshi_max: int | None
    cap_counts_open: bool
    rate_per_minute: int | None
    daily_cents_max: Mapping[str, int]
    used_satoshi: int
    orders: int
    keys: int
    markup_bp: Mapping[str, int] = msgspec.field(default_factory=dict)
    quote_seconds_max: int | None = None


class ClientState(msgspec.Struct, frozen=True):
    """What is set of a client, as in Client."""

    cap_satoshi: int | None
    order_satoshi_max: int | None
    cap_counts_open: bool
    rate_per_minute: int | None
    daily_cents_max: Mapping[str, int]
    markup_bp: Mapping[str, int] = msgspec.field(default_factory=dict)
    quote_seconds_max: int | None = None


class DeskState(msgspec.Struct, frozen=True):
    """What is set of the desk, as in Desk."""

    cap_satoshi: int
    cap_counts_open: bool
    paused: bool


class Desk(msgspec.Struct, frozen=True):
    """What the desk may sell and has sold, in satoshi, whether only open orders count, and whether it is paused."""

    livemode: bool
    cap_satoshi: int
    used_satoshi: int
    cap_counts_open: bool
    paused: bool
    orders: int


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Change(msgspec.Struct, frozen=True, tag_field="change", tag=_snake_case):
    """What an operator may change."""


class Limits(msgspec.Struct, frozen=True):
    """Limits of a client, as its fields; None takes one away, also that of one currency, and what is unset stays."""

    cap_satoshi: int | msgspec.UnsetType | None = msgspec.UNSET
    order_satoshi_max: int | msgspec.UnsetType | None = msgspec.UNSET
    rate_per_minute: int | msgspec.UnsetType | None = msgspec.UNSET
    daily_cents_max: Mapping[Currency, int | None] | msgspec.UnsetType = msgspec.UNSET
    markup_bp: Mapping[Currency, int | None] | msgspec.UnsetType = msgspec.UNSET
    quote_seconds_max: int | msgspec.UnsetType | None = msgspec.UNSET


class CreateClient(Change, frozen=True):
    """Makes a client with these limits."""

    client: str
    limits: Limits


class LimitClient(Change, frozen=True):
    """Changes limits of a client."""

    client: str
    limits: Limits


class CreateKey(Change, frozen=True):
    """Stores a key, by the SHA-256 of its text, in hexadecimal."""

    id: str
    digest: str
    client: str
    scopes: Sequence[str]
    allow_from: Sequence[str]
    expires_at: datetime | None
    rate_per_minute: int | None


class RotateKey(Change, frozen=True):
    """Stores a key that permits the same as the one with `id`, for as long from now on as that one did, which ends
    after the overlap."""

    id: str
    new_id: str
    digest: str
    overlap_seconds: float


class RevokeKey(Change, frozen=True):
    """Ends a key now."""

    id: str


class SetCap(Change, frozen=True):
    """Sets the desk's cap, never below what is used of it."""

    cap_satoshi: int


class SetCapCounts(Change, frozen=True):
    """Sets what the cap of a client, or of the desk for None, counts: open orders only, or all that were ever stored;
    never so that more is used than the cap."""

    client: str | None
    open_only: bool


class Pause(Change, frozen=True):
    """Places nothing new from now on."""


class Resume(Change, frozen=True):
    """Places orders again."""


class ConfirmPrice(Change, frozen=True):
    """Lets the desk sell at prices in this range (`rate_e8` units, both ends included) for so many minutes."""

    currency: Currency
    low_e8: int
    high_e8: int
    minutes: int

    def confirmation(self, why: str) -> NewConfirmation:
        """What is confirmed for this reason."""
        return NewConfirmation(self.currency, self.low_e8, self.high_e8, why, self.minutes)


AnyChange = (
    CreateClient
    | LimitClient
    | CreateKey
    | RotateKey
    | RevokeKey
    | SetCap
    | SetCapCounts
    | Pause
    | Resume
    | ConfirmPrice
)


By_contra = TypeVar("By_contra", contravariant=True)


class Registry(Protocol[By_contra]):
    """What operators change is noted in the same transaction. Who they are is known by a ShownKey, or else by what an
    implementation takes. Everything raises LedgerUnavailable, Overloaded."""

    async def change(self, change: AnyChange, why: str, by: By_contra) -> object:
        """Makes the change if whoever makes it may. Returns what is set then of the client or the desk that it is
        about, as the members of ClientState or DeskState, and of a confirmed price until when it holds.

        Raises KeyRefused, InsufficientScope, ClientNotFound, ClientExists, KeyNotFound, KeyEnded, CapBelowUsed,
        InvalidRequest, and OutcomeUnknown when its answer was lost: the record of acts shows whether it was done.
        """
        ...

    async def desk(self) -> Desk:
        """The desk as it is."""
        ...

    async def clients(self, after: str, limit: int) -> Sequence[Client]:
        """Clients by name, those after this one."""
        ...

    async def client(self, name: str) -> Client:
        """The client of this name; raises ClientNotFound."""
        ...

    async def keys(self, client: str | None, limit: int) -> Sequence[StoredKey]:
        """The keys of a client, or all, that were made last, the newest last."""
        ...

    async def acts(self, after: int, limit: int) -> Sequence[Act]:
        """What was done after the `after`-th act, the first one first."""
        ...

    async def close(self) -> None: ...


async def create_key(registry: Registry[By_contra], new: NewKey, why: str, by: By_contra) -> Key:
    """Makes a key; its text is known to nobody else and never shown again. Raises what `Registry.change` does."""
    key = new_key(livemode=(await registry.desk()).livemode)
    permitted = new.scopes, new.allow_from, new.expires_at, new.rate_per_minute
    with _named_if_unknown(key.id):
        await registry.change(CreateKey(key.id, key.digest.hex(), new.client, *permitted), why, by)
    return key


async def rotate_key(registry: Registry[By_contra], key_id: str, overlap: timedelta, why: str, by: By_contra) -> Key:
    """The same for a key that takes another's place, which ends after the overlap."""
    key = new_key(livemode=(await registry.desk()).livemode)
    with _named_if_unknown(key.id):
        await registry.change(RotateKey(key_id, key.id, key.digest.hex(), overlap.total_seconds()), why, by)
    return key


@contextlib.contextmanager
def _named_if_unknown(key_id: str) -> Iterator[None]:
    """A key may be there whose text nobody was told: by its id it can be revoked."""
    try:
        yield
    except OutcomeUnknown as error:
        error.facts["key_id"] = key_id
        raise


async def confirm_price(registry: Registry[By_contra], new: NewConfirmation, by: By_contra) -> Confirmation:
    """Lets the desk sell at these prices from now on; raises what `Registry.change` and `require_confirmable` do."""
    require_confirmable(new)
    change = ConfirmPrice(new.currency, new.low_e8, new.high_e8, new.minutes)
    ends_at = datetime.fromisoformat(str(await registry.change(change, new.why, by)))
    return Confirmation(new.currency, new.low_e8, new.high_e8, new.why, ends_at)
