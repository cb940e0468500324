"""Keys at an edge: how long one is kept, what a store that is away means, and that no lookup is made twice at once."""

import asyncio
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from buydesk.clients import cache as caching
from buydesk.clients.cache import KeyCache
from buydesk.clients.model import StoredKey
from buydesk.errors import LedgerUnavailable
from tests.builders import settings
from tests.clock import FakeClock
from tests.model_keys import ModelKeys

AWAY = LedgerUnavailable("away")


class Slow(ModelKeys):
    """Answers once the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def key(self, key_id: str) -> StoredKey | None:
        found = await super().key(key_id)
        await self.gate.wait()
        return found


def cache_of(store: ModelKeys) -> tuple[KeyCache, FakeClock]:
    clock = FakeClock()
    return KeyCache(store, settings(key_cache_seconds=2, key_grace_seconds=300), clock), clock


async def test_a_key_is_asked_for_again_after_two_seconds_and_a_revoked_one_found_out_then() -> None:
    store = ModelKeys()
    key = store.add("shop", "orders:read")
    cache, clock = cache_of(store)
    for _ in range(9):
        assert (await cache.find(key.id)) == store.stored[key.id]
    store.revoke(key)
    clock.seconds += 1.9
    assert (await cache.find(key.id)).revoked_at is None  # type: ignore[union-attr]
    assert store.asked == [key.id]
    clock.seconds += 0.2
    assert (await cache.find(key.id)).revoked_at is not None  # type: ignore[union-attr]
    assert store.asked == [key.id] * 2


async def test_that_there_is_no_such_key_is_kept_as_long() -> None:
    store = ModelKeys()
    cache, clock = cache_of(store)
    for _ in range(9):
        assert await cache.find("nobody") is None
    assert store.asked == ["nobody"]
    clock.seconds += 2.1
    key = store.add("shop", "orders:read")
    store.stored["nobody"] = store.stored[key.id]
    assert await cache.find("nobody") == store.stored[key.id]


async def test_while_the_store_is_away_a_known_key_is_honoured_for_its_time_and_no_other() -> None:
    store = ModelKeys()
    key = store.add("shop", "orders:read")
    cache, clock = cache_of(store)
    await cache.find(key.id)
    await cache.find("nobody")
    store.fault = AWAY
    clock.seconds += 100
    assert await cache.find(key.id) == store.stored[key.id]
    for unknown in ("nobody", "stranger"):
        with pytest.raises(LedgerUnavailable):
            await cache.find(unknown)
    asked = len(store.asked)
    assert await cache.find(key.id) == store.stored[key.id]
    assert len(store.asked) == asked  # a store that is away is not asked for each request
    clock.seconds += 1.1
    await cache.find(key.id)
    assert len(store.asked) == asked + 1
    clock.seconds += 200
    with pytest.raises(LedgerUnavailable):
        await cache.find(key.id)


async def test_a_store_that_hangs_holds_a_known_key_up_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "KNOWN_WAIT_SECONDS", 0.01)
    store = Slow()
    store.gate.set()
    key = store.add("shop", "orders:read")
    cache, clock = cache_of(store)
    await cache.find(key.id)
    store.gate.clear()
    clock.seconds += 3
    assert await cache.find(key.id) == store.stored[key.id]
    # Beyond the time of grace the store is waited for, as long as it takes.
    clock.seconds += 300
    finding = asyncio.create_task(cache.find(key.id))
    await asyncio.sleep(0.05)
    assert not finding.done()
    store.gate.set()
    assert await finding == store.stored[key.id]


async def test_all_who_want_to_know_at_once_ask_once_and_who_gives_up_ends_it_for_nobody() -> None:
    store = Slow()
    key = store.add("shop", "orders:read")
    cache, _ = cache_of(store)
    finding = [asyncio.create_task(cache.find(key.id)) for _ in range(9)]
    await asyncio.sleep(0)
    finding[0].cancel()
    await asyncio.sleep(0)
    store.gate.set()
    assert await asyncio.gather(*finding[1:]) == [store.stored[key.id]] * 8
    assert store.asked == [key.id]


async def test_a_service_that_ends_while_it_asks_keeps_nothing() -> None:
    store = Slow()
    cache, _ = cache_of(store)
    finding = asyncio.create_task(cache.find("a"))
    await asyncio.sleep(0.01)
    for task in asyncio.all_tasks() - {asyncio.current_task(), finding}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finding
    store.gate.set()
    assert await cache.find("a") is None


async def test_strangers_ids_take_a_bounded_room_and_drive_no_key_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "KEYS_MAX", 10)
    store = ModelKeys()
    key = store.add("shop", "orders:read")
    cache, _ = cache_of(store)
    await cache.find(key.id)
    for number in range(100):
        await cache.find(f"stranger{number}")
    assert await cache.find(key.id) == store.stored[key.id]
    assert store.asked.count(key.id) == 1
    await cache.find("stranger0")
    assert store.asked.count("stranger0") == 2


class Noting(ModelKeys):
    """Knows of which keys it was told at once."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[list[str]] = []

    async def note_used(self, key_ids: Sequence[str]) -> None:
        await super().note_used(key_ids)
        self.noted.append(sorted(key_ids))


async def test_use_is_noted_once_a_day_of_many_keys_together_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caching, "NOTE_PAUSE_SECONDS", 0.01)
    store = Noting()
    keys = [store.stored[store.add("shop", "orders:read").id] for _ in range(3)]
    ids = sorted(key.id for key in keys)
    cache, clock = cache_of(store)
    store.fault = AWAY
    cache.note_used(keys[0], clock.now())
    await asyncio.sleep(0.03)
    assert store.noted == []
    store.fault = None
    for key in keys * 9:
        cache.note_used(key, clock.now())
    await asyncio.sleep(0.03)
    assert store.noted == [ids]
    cache.note_used(replace(keys[0], last_used_on=clock.now().date()), clock.now())  # as another edge has noted
    clock.seconds += 24 * 3600
    for key in keys * 9:
        cache.note_used(key, clock.now())
    await asyncio.sleep(0.03)
    assert store.noted == [ids] * 2


async def test_no_more_uses_are_noted_at_once_than_a_store_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "NOTE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(caching, "NOTED_AT_ONCE_MAX", 2)
    store = Noting()
    cache, clock = cache_of(store)
    for _ in range(5):
        cache.note_used(store.stored[store.add("shop", "orders:read").id], clock.now())
    await asyncio.sleep(0.1)
    assert [len(each) for each in store.noted] == [2, 2, 1]


async def test_a_key_is_kept_from_when_it_was_asked_for_however_slow_the_answer() -> None:
    store = Slow()
    key = store.add("shop", "orders:read")
    cache, clock = cache_of(store)
    finding = asyncio.create_task(cache.find(key.id))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    clock.seconds += 1.5
    store.gate.set()
    await finding
    store.revoke(key)  # it may have been the moment after the store looked
    clock.seconds += 0.6
    found = await cache.find(key.id)
    assert found is not None
    assert found.revoked_at is not None
