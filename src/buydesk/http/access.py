"""Access: who calls, whether it may, and how often."""

import hmac
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from cachetools import LRUCache

from buydesk.clients.cache import KEYS_MAX, KeyCache
from buydesk.clients.keys import Key, parse_key_text
from buydesk.clients.model import ANYBODY, Caller, StoredKey
from buydesk.clients.rates import RateKind, RateLimiter, refusal
from buydesk.clients.scopes import Scope
from buydesk.errors import InsufficientScope, Unauthorized
from buydesk.hosts import Address
from buydesk.http.requests import Request
from buydesk.observability.metrics import RefusedCallers
from buydesk.settings.model import Settings
from buydesk.times import CLOCK, Clock

# Whatever was wrong with what was shown: no hint which part.
_REFUSAL = "Show a key of this desk that is valid: Authorization: Bearer bd_..."
Why = Literal[
    "nothing_shown", "not_a_key", "other_mode", "unknown", "wrong_secret", "ended", "foreign_address", "scope"
]


class _Seen(NamedTuple):
    """A key that was found valid, and need not be read again before this monotonic time."""

    key: StoredKey
    until: float


class Access:
    """Who calls a service: by a key, by one of the desk's own `tokens`, or without any where the desk is open or a
    proxy in front has checked. `refused` counts who may not; `rates` says how often one may."""

    def __init__(
        self,
        settings: Settings,
        refused: RefusedCallers,
        keys: KeyCache | None = None,
        tokens: Mapping[str, Caller] | None = None,
        *,
        rates: RateLimiter | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        self._is_open = settings.access != "keys"
        self._livemode = settings.price_feed == "live"
        self._refused = refused
        self._keys = keys
        self._tokens = tokens or {}
        self._rates = rates
        self._clock = clock
        # By what was shown: to read and check a key takes ten times as long as to find it here.
        self._seen: LRUCache[str, _Seen] = LRUCache(KEYS_MAX)

    async def caller(self, request: Request, needs: Scope) -> Caller:
        """Who calls, for something that needs the scope. Raises Unauthorized, InsufficientScope, RateLimited when too
        many keys from its address were none and, when a key cannot be looked up, LedgerUnavailable and Overloaded."""
        shown = request.headers.getall("authorization", ())
        if not shown:
            if not self._is_open or needs not in ANYBODY.scopes:
                raise self._refusal("nothing_shown")
            return ANYBODY
        seen = self._seen.get(shown[0]) if len(shown) == 1 else None
        if seen is None or self._clock.monotonic() >= seen.until or not seen.key.is_taken_from(request.address):
            caller = await self._known(request, shown)
        else:
            caller = seen.key.caller
        if needs not in caller.scopes:
            self._refused.count("scope")
            raise InsufficientScope.of(needs)
        return caller

    def count(self, request: Request, kind: RateKind) -> None:
        """Counts the request of its caller, which then has its `rate`, if that is limited; raises RateLimited."""
        if self._rates is None:
            return
        rate = self._rates.take(kind, request.caller, request.address)
        if rate is not None and rate.is_over:
            raise refusal(rate)
        request.rate = rate

    async def _known(self, request: Request, shown: Sequence[str]) -> Caller:
        scheme, _, text = shown[0].partition(" ")
        if len(shown) > 1 or scheme.lower() != "bearer":
            raise self._refusal("not_a_key")
        given = text.encode()
        own = [caller for token, caller in self._tokens.items() if hmac.compare_digest(given, token.encode())]
        if own:
            return own[0]
        if self._keys is None:
            raise self._refusal("unknown")
        key = await self._key(self._keys, text, request.address)
        now, since = self._clock.now(), self._clock.monotonic()
        if not key.is_valid(now):
            raise self._refusal("ended")
        if not key.is_taken_from(request.address):
            raise self._refusal("foreign_address")
        self._keys.note_used(key, now)
        left = math.inf if key.expires_at is None else (key.expires_at - now).total_seconds()
        self._seen[shown[0]] = _Seen(key, min(self._keys.fresh_until(key.id), since + left))
        return key.caller

    async def _key(self, keys: KeyCache, text: str, address: Address | None) -> StoredKey:
        """The stored key that the text is; what cannot be one of this desk's is not looked up."""
        try:
            shown = parse_key_text(text)
        except ValueError as error:
            raise self._refusal("not_a_key") from error
        if shown.livemode != self._livemode:
            raise self._refusal("other_mode")
        stored = await self._stored(keys, shown, address)
        if stored is not None and hmac.compare_digest(stored.digest, shown.digest):
            return stored
        if self._rates is not None and address is not None:
            self._rates.note_wrong_guess(address)
        raise self._refusal("unknown" if stored is None else "wrong_secret")

    async def _stored(self, keys: KeyCache, shown: Key, address: Address | None) -> StoredKey | None:
        """The stored key with this id. Whose key is known here is not kept out by strangers behind the same address."""
        if self._rates is None or address is None or keys.knows(shown.id):
            return await keys.find(shown.id)
        async with self._rates.guess(address):
            return await keys.find(shown.id)

    def _refusal(self, why: Why) -> Unauthorized:
        self._refused.count(why)
        return Unauthorized(_REFUSAL)
