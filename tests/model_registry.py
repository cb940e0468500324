"""The model of what operators read and change, and of refusals on record: plainly right, and nothing more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import msgspec
from msgspec.structs import asdict, replace

from buydesk.clients.audit import Act
from buydesk.clients.model import StoredKey
from buydesk.clients.registry import (
    AnyChange,
    Client,
    ClientState,
    ConfirmPrice,
    CreateClient,
    CreateKey,
    Desk,
    DeskState,
    LimitClient,
    Limits,
    Pause,
    Resume,
    RevokeKey,
    RotateKey,
    SetCap,
    SetCapCounts,
    ShownKey,
)
from buydesk.errors import CapBelowUsed, ClientExists, ClientNotFound, DeskError, KeyEnded, KeyNotFound
from buydesk.orders.refusals import Refusal
from buydesk.times import format_time, utc_now
from tests.databases import CAP_SATOSHI


@dataclass(repr=False)
class ModelRegistry:
    """Registry as one would explain it. `done` are the changes with their reasons; `fault` is raised instead."""

    now: Desk = field(default_factory=lambda: Desk(False, CAP_SATOSHI, 0, False, False, 0))
    by_name: dict[str, Client] = field(default_factory=dict)
    stored: dict[str, StoredKey] = field(default_factory=dict)
    done: list[tuple[AnyChange, str, ShownKey]] = field(default_factory=list)
    fault: DeskError | None = None

    def __post_init__(self) -> None:
        self.by_name["anonymous"] = _client("anonymous", Limits())

    async def change(self, change: AnyChange, why: str, by: ShownKey) -> object:
        if self.fault is not None:
            raise self.fault
        said = self._change(change)
        self.done.append((change, why, by))
        return said

    def _state(self, client: str | None) -> object:
        found = self.now if client is None else self.by_name[client]
        kind = DeskState if client is None else ClientState
        return {name: getattr(found, name) for name in kind.__struct_fields__}

    def _change(self, change: AnyChange) -> object:  # noqa: PLR0912  # one case a change
        match change:
            case CreateClient(name, limits):
                if name in self.by_name:
                    raise ClientExists("there")
                self.by_name[name] = _client(name, limits)
                return self._state(name)
            case LimitClient(name, limits):
                self.by_name[name] = _limited(self._client(name), limits)
                return self._state(name)
            case CreateKey(key_id, digest, name, scopes, networks, ends, rate):
                self._client(name)
                self.stored[key_id] = StoredKey(
                    key_id, name, bytes.fromhex(digest), scopes, networks, ends, None, None, rate
                )
            case RotateKey(key_id, new_id, digest, seconds):
                old = self._key(key_id)
                if not old.is_valid(utc_now()):
                    raise KeyEnded("ended")
                self.stored[new_id] = replace(old, id=new_id, digest=bytes.fromhex(digest))
                self.stored[key_id] = replace(old, expires_at=utc_now() + timedelta(seconds=seconds))
            case RevokeKey(key_id):
                self.stored[key_id] = replace(self._key(key_id), revoked_at=utc_now())
            case SetCap(cap):
                if cap < self.now.used_satoshi:
                    raise CapBelowUsed("below")
                self.now = replace(self.now, cap_satoshi=cap)
                return self._state(None)
            case SetCapCounts(None, open_only):
                self.now = replace(self.now, cap_counts_open=open_only)
                return self._state(None)
            case SetCapCounts(str(name), open_only):
                self.by_name[name] = replace(self._client(name), cap_counts_open=open_only)
                return self._state(name)
            case Pause() | Resume():
                self.now = replace(self.now, paused=isinstance(change, Pause))
                return self._state(None)
            case ConfirmPrice(minutes=minutes):
                return format_time(utc_now() + timedelta(minutes=minutes))
        return None

    def _client(self, name: str) -> Client:
        if name not in self.by_name:
            raise ClientNotFound("none")
        return self.by_name[name]

    def _key(self, key_id: str) -> StoredKey:
        if key_id not in self.stored:
            raise KeyNotFound("none")
        return self.stored[key_id]

    async def desk(self) -> Desk:
        return self.now

    async def clients(self, after: str, limit: int) -> Sequence[Client]:
        return [self.by_name[name] for name in sorted(self.by_name) if name > after][:limit]

    async def client(self, name: str) -> Client:
        return self._client(name)

    async def keys(self, client: str | None, limit: int) -> Sequence[StoredKey]:
        return [key for key in self.stored.values() if client in (None, key.client)][-limit:]

    async def acts(self, after: int, limit: int) -> Sequence[Act]:
        acts = [
            Act(number, utc_now(), "operator", by.address, type(change).__name__, "desk", why, None, None, bytes(32))
            for number, (change, why, by) in enumerate(self.done, 1)
        ]
        return acts[after : after + limit]

    async def close(self) -> None:
        pass


def _client(name: str, limits: Limits) -> Client:
    return _limited(Client(name, None, None, False, None, {}, 0, 0, 0), limits)


def _limited(client: Client, limits: Limits) -> Client:
    given = {name: value for name, value in asdict(limits).items() if value is not msgspec.UNSET}
    for name in ("daily_cents_max", "markup_bp"):
        if name in given:
            both = dict(getattr(client, name)) | given[name]
            given[name] = {currency: value for currency, value in both.items() if value is not None}
    return replace(client, **given)


@dataclass(repr=False)
class ModelRefusals:
    """RefusalStore as one would explain it; `fault` is raised instead."""

    kept: list[Refusal] = field(default_factory=list)
    fault: DeskError | None = None

    async def note_refusals(self, refusals: Sequence[Refusal]) -> None:
        if self.fault is not None:
            raise self.fault
        self.kept += refusals

    async def refusals(self, client: str | None, limit: int) -> Sequence[Refusal]:
        return [each for each in self.kept[::-1] if client in (None, each.client)][:limit]

    async def close(self) -> None:
        pass
