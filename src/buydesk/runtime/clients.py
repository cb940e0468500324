"""What the commands `clients`, `cap`, `pause`, `keys` and `audit` print."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from buydesk.clients import registry
from buydesk.clients.audit import broken_entries
from buydesk.clients.keys import Key
from buydesk.clients.model import NewKey, StoredKey
from buydesk.clients.registry import (
    CLIENTS_MAX,
    Client,
    CreateClient,
    Desk,
    LimitClient,
    Limits,
    Pause,
    Resume,
    RevokeKey,
    SetCap,
    SetCapCounts,
)
from buydesk.errors import CannotStart
from buydesk.money import format_btc, format_cents
from buydesk.runtime.registry import desk_of
from buydesk.settings.model import Settings
from buydesk.times import format_time, utc_now

_ALL = 2**31 - 1


async def create_client(settings: Settings, name: str, limits: Limits, why: str) -> str:
    """Makes a client."""
    async with desk_of(settings) as desk:
        await desk.change(CreateClient(name, limits), why)
    return f"The client {name} is there: buydesk keys create {name} --scopes orders:create,orders:read"


async def limit_client(settings: Settings, name: str, limits: Limits, why: str) -> str:
    """Changes limits of a client."""
    async with desk_of(settings) as desk:
        await desk.change(LimitClient(name, limits), why)
        found = await desk.registry.client(name)
    return _table(_CLIENT_HEAD, [_client_row(found)])


async def clients(settings: Settings) -> str:
    """A line for each client."""
    async with desk_of(settings) as desk:
        found: list[Client] = []
        while more := await desk.registry.clients(found[-1].name if found else "", CLIENTS_MAX):
            found += more
    return _table(_CLIENT_HEAD, list(map(_client_row, found)))


_CLIENT_HEAD = (
    *("NAME", "ORDERS", "USED", "CAP", "COUNTS", "LARGEST ORDER", "A DAY", "MARKUP", "A MINUTE", "QUOTES", "KEYS"),
)


def _client_row(client: Client) -> tuple[str, ...]:
    daily = client.daily_cents_max.items()
    return (
        client.name,
        str(client.orders),
        format_btc(client.used_satoshi),
        _btc(client.cap_satoshi),
        _counted(open_only=client.cap_counts_open),
        _btc(client.order_satoshi_max),
        ",".join(f"{currency}:{format_cents(cents)}" for currency, cents in daily) or "none",
        ",".join(f"{currency}:{markup_bp}" for currency, markup_bp in client.markup_bp.items()) or "default",
        "default" if client.rate_per_minute is None else str(client.rate_per_minute),
        "default" if client.quote_seconds_max is None else f"{client.quote_seconds_max} s",
        str(client.keys),
    )


async def desk_cap(settings: Settings) -> str:
    """The desk's cap, and what is used of it."""
    async with desk_of(settings) as desk:
        return _told(await desk.registry.desk())


async def set_cap(settings: Settings, cap_satoshi: int, why: str) -> str:
    """Sets the desk's cap."""
    async with desk_of(settings) as desk:
        await desk.change(SetCap(cap_satoshi), why)
        return _told(await desk.registry.desk())


async def set_cap_counts(settings: Settings, client: str | None, why: str, *, open_only: bool) -> str:
    """Sets what a cap counts."""
    async with desk_of(settings) as desk:
        await desk.change(SetCapCounts(client, open_only), why)
        if client is None:
            return _told(await desk.registry.desk())
    return f"The cap of the client {client} counts {_counted(open_only=open_only)} orders."


async def pause(settings: Settings, why: str) -> str:
    """Stops all placing."""
    async with desk_of(settings) as desk:
        await desk.change(Pause(), why)
    return "The desk is paused: it places nothing new and answers repeats. `buydesk resume` ends that."


async def resume(settings: Settings, why: str) -> str:
    """Takes placing up again."""
    async with desk_of(settings) as desk:
        await desk.change(Resume(), why)
    return "The desk places orders."


def _told(desk: Desk) -> str:
    used, cap = format_btc(desk.used_satoshi), format_btc(desk.cap_satoshi)
    paused = " The desk is paused." if desk.paused else ""
    return f"{used} of {cap} BTC are sold, counting {_counted(open_only=desk.cap_counts_open)} orders.{paused}"


def _counted(*, open_only: bool) -> str:
    return "open" if open_only else "stored"


async def create_key(settings: Settings, new: NewKey, why: str) -> Key:
    """Makes a key."""
    async with desk_of(settings) as desk:
        return await registry.create_key(desk.registry, new, why, desk.by)


async def rotate_key(settings: Settings, key_id: str, overlap: timedelta, why: str) -> Key:
    """Makes a key that takes another's place."""
    async with desk_of(settings) as desk:
        return await registry.rotate_key(desk.registry, key_id, overlap, why, desk.by)


async def revoke_key(settings: Settings, key_id: str, why: str) -> str:
    """Ends a key."""
    async with desk_of(settings) as desk:
        await desk.change(RevokeKey(key_id), why)
    return f"The key {key_id} is revoked: no service takes it after {settings.key_cache_seconds:g} s."


async def keys(settings: Settings, client: str | None) -> str:
    """A line for each key."""
    async with desk_of(settings) as desk:
        found = await desk.registry.keys(client, _ALL)
    rows = [(each.id, each.client, _state(each), _last_use(each), ",".join(each.scopes)) for each in found]
    return _table(("ID", "CLIENT", "STATE", "LAST USED", "SCOPES"), rows)


async def audit(settings: Settings, limit: int) -> str:
    """The last acts, a line each, once it is sure that none was changed; raises CannotStart otherwise."""
    async with desk_of(settings) as desk:
        acts = await desk.registry.acts(0, _ALL)
    if broken := list(broken_entries(acts)):
        raise CannotStart(f"the record of acts was changed: entry {broken[0]} does not fit those before it")
    lines = [
        f"{act.number} {format_time(act.at)} {act.operator}@{act.address} {act.act} {act.subject}"
        + (f" ({act.why})" if act.why else "")
        for act in acts[-limit:]
    ]
    last = f", the last hash is {acts[-1].hash.hex()}" if acts else ""
    return "\n".join([*lines, f"{len(acts)} acts; none was changed or left out{last}."])


def _state(key: StoredKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "valid"
    return f"{'valid until' if key.is_valid(utc_now()) else 'ended'} {_minute(key.expires_at)}"


def _minute(moment: datetime) -> str:
    return f"{format_time(moment)[:16]}Z"


def _last_use(key: StoredKey) -> str:
    return "never" if key.last_used_on is None else key.last_used_on.isoformat()


def _btc(satoshi: int | None) -> str:
    return "none" if satoshi is None else format_btc(satoshi)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows below the head, each column as wide as its widest value."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    line: Callable[[Sequence[str]], str] = lambda row: "  ".join(map(str.ljust, row, widths)).rstrip()  # noqa: E731
    return "\n".join(map(line, (head, *rows)))
