"""Keys at a service, kept for a short time: revoking one acts within that everywhere."""

import asyncio
import math
from dataclasses import dataclass
from datetime import date, datetime
from functools import partial
from itertools import islice

from cachetools import LRUCache

from buydesk.clients.model import NOTED_AT_ONCE_MAX, KeyStore, StoredKey
from buydesk.errors import DeskError
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

# Ids that were asked for, with a key and without: strangers make up as many of the latter as they like.
KEYS_MAX = 10_000
# A store that failed is asked no more often, for each key.
RETRY_SECONDS = 1.0
# The longest wait for a key that is known, before it is honoured for lack of an answer.
KNOWN_WAIT_SECONDS = 0.5
# Uses are noted together, this long after the first of them: at midnight UTC all keys are due at once.
NOTE_PAUSE_SECONDS = 1.0


@dataclass(slots=True)
class _Kept:
    key: StoredKey | None
    asked_at: float
    ask_again_at: float


class KeyCache:
    """The keys of a store. One is kept for `key_cache_seconds` from when it was asked for, and while the store does not
    answer, for `key_grace_seconds`. That there is no such key is kept for the former time."""

    def __init__(self, store: KeyStore, settings: Settings, clock: Clock = CLOCK) -> None:
        self._store = store
        self._clock = clock
        self._fresh_seconds = settings.key_cache_seconds
        self._grace_seconds = settings.key_grace_seconds
        self._known: LRUCache[str, _Kept] = LRUCache(KEYS_MAX)
        self._unknown: LRUCache[str, _Kept] = LRUCache(KEYS_MAX)
        self._asking: dict[str, asyncio.Task[StoredKey | None]] = {}
        self._used: LRUCache[str, date] = LRUCache(KEYS_MAX)  # when each was last noted, or is to be
        self._to_note: set[str] = set()
        self._noting: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> StoredKey | None:
        """The key with this id, if there is one; raises LedgerUnavailable, Overloaded."""
        kept = self._known.get(key_id) or self._unknown.get(key_id)
        if kept is not None and self._clock.monotonic() < kept.ask_again_at:
            return kept.key
        if kept is None or kept.key is None or self._clock.monotonic() - kept.asked_at > self._grace_seconds:
            return await self._ask(key_id)
        try:
            async with asyncio.timeout(KNOWN_WAIT_SECONDS):
                return await self._ask(key_id)
        except (DeskError, TimeoutError):
            kept.ask_again_at = self._clock.monotonic() + RETRY_SECONDS
            return kept.key

    def fresh_until(self, key_id: str) -> float:
        """The monotonic time from which a key that was found is asked for again."""
        kept = self._known.get(key_id)
        return -math.inf if kept is None else kept.ask_again_at

    def knows(self, key_id: str) -> bool:
        """Whether there was a key with this id when it was asked for last."""
        return key_id in self._known

    async def _ask(self, key_id: str) -> StoredKey | None:
        """Asks the store, once for all who want to know."""
        asking = self._asking.get(key_id)
        if asking is None:
            asking = self._asking[key_id] = asyncio.create_task(self._store.key(key_id))
            asking.add_done_callback(partial(self._note_found, key_id, self._clock.monotonic()))
        return await asyncio.shield(asking)  # who gives up waiting must not end it for the others

    def _note_found(self, key_id: str, asked_at: float, asked: asyncio.Task[StoredKey | None]) -> None:
        del self._asking[key_id]
        if asked.cancelled() or asked.exception() is not None:
            return
        key = asked.result()
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        kept = self._unknown if key is None else self._known
        kept[key_id] = _Kept(key, asked_at, asked_at + self._fresh_seconds)

    def note_used(self, key: StoredKey, now: datetime) -> None:
        """Has it noted that the key was used today, unless it is already; nobody waits for that."""
        today = now.date()
        if key.last_used_on == today or self._used.get(key.id) == today:
            return
        self._used[key.id] = today
        self._to_note.add(key.id)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._note_all())

    async def _note_all(self) -> None:
        while self._to_note:
            await asyncio.sleep(NOTE_PAUSE_SECONDS)
            some = list(islice(self._to_note, NOTED_AT_ONCE_MAX))
            self._to_note.difference_update(some)
            try:
                await self._store.note_used(some)
            except DeskError:
                for key_id in some:
                    self._used.pop(key_id, None)  # the next request that shows it tries again
