"""What the commands `clients`, `cap`, `keys` and `audit` print."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from buydesk.backends.postgres.registry import DeskCap
from buydesk.clients.audit import broken_entries
from buydesk.clients.keys import Key
from buydesk.clients.model import NewKey, StoredKey
from buydesk.errors import CannotStart
from buydesk.money import format_btc
from buydesk.runtime.registry import registry_of
from buydesk.settings.model import Settings
from buydesk.times import format_time, utc_now


async def create_client(settings: Settings, name: str, cap: int | None, largest: int | None, why: str) -> str:
    """Makes a client."""
    async with registry_of(settings) as registry:
        await registry.create_client(name, cap, largest, why)
    return f"The client {name} is there: buydesk keys create {name} --scopes orders:create,orders:read"


async def limit_client(settings: Settings, name: str, changes: Mapping[str, int | None], why: str) -> str:
    """Changes limits of a client."""
    async with registry_of(settings) as registry:
        found = await registry.limit_client(name, changes, why)
    cap, largest = _btc(found.cap_satoshi), _btc(found.order_satoshi_max)
    return f"The client {name} has a cap of {cap} and a largest order of {largest}."


async def clients(settings: Settings) -> str:
    """A line for each client."""
    async with registry_of(settings) as registry:
        found = await registry.clients()
    rows = [
        (
            each.name,
            str(each.orders),
            format_btc(each.used_satoshi),
            _btc(each.cap_satoshi),
            _counted(open_only=each.cap_counts_open),
            _btc(each.order_satoshi_max),
            str(each.keys),
        )
        for each in found
    ]
    return _table(("NAME", "ORDERS", "USED", "CAP", "COUNTS", "LARGEST ORDER", "KEYS"), rows)


async def desk_cap(settings: Settings) -> str:
    """The desk's cap, and what is used of it."""
    async with registry_of(settings) as registry:
        return _told(await registry.desk_cap())


async def set_cap(settings: Settings, cap_satoshi: int, why: str) -> str:
    """Sets the desk's cap."""
    async with registry_of(settings) as registry:
        return _told(await registry.set_cap(cap_satoshi, why))


async def set_cap_counts(settings: Settings, client: str | None, why: str, *, open_only: bool) -> str:
    """Sets what a cap counts."""
    async with registry_of(settings) as registry:
        await registry.set_cap_counts(client, why, open_only=open_only)
        if client is None:
            return _told(await registry.desk_cap())
    return f"The cap of the client {client} counts {_counted(open_only=open_only)} orders."


def _told(found: DeskCap) -> str:
    used, cap = format_btc(found.used_satoshi), format_btc(found.cap_satoshi)
    return f"{used} of {cap} BTC are sold, counting {_counted(open_only=found.cap_counts_open)} orders."


def _counted(*, open_only: bool) -> str:
    return "open" if open_only else "stored"


async def create_key(settings: Settings, new: NewKey, why: str) -> Key:
    """Makes a key."""
    async with registry_of(settings) as registry:
        return await registry.create_key(new, why)


async def rotate_key(settings: Settings, key_id: str, overlap: timedelta, why: str) -> Key:
    """Makes a key that takes another's place."""
    async with registry_of(settings) as registry:
        return await registry.rotate_key(key_id, overlap, why)


async def revoke_key(settings: Settings, key_id: str, why: str) -> str:
    """Ends a key."""
    async with registry_of(settings) as registry:
        await registry.revoke_key(key_id, why)
    return f"The key {key_id} is revoked: no service takes it after {settings.key_cache_seconds:g} s."


async def keys(settings: Settings, client: str | None) -> str:
    """A line for each key."""
    async with registry_of(settings) as registry:
        found = await registry.keys(client)
    rows = [(each.id, each.client, _state(each), _last_use(each), ",".join(each.scopes)) for each in found]
    return _table(("ID", "CLIENT", "STATE", "LAST USED", "SCOPES"), rows)


async def audit(settings: Settings, limit: int) -> str:
    """The last acts, a line each, once it is sure that none was changed; raises CannotStart otherwise."""
    async with registry_of(settings) as registry:
        acts = await registry.acts()
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
