"""Limits: how often something may be done."""

import math
from collections.abc import Callable
from datetime import datetime

from buydesk.errors import RateLimited
from buydesk.times import utc_now


class TokenBucket:
    """A token bucket: `at_once_max` may be taken at once, `per_second_max` in the long run, by all callers together."""

    def __init__(self, per_second_max: int, at_once_max: int, now: Callable[[], datetime] = utc_now) -> None:
        self._per_second_max = per_second_max
        self._at_once_max = at_once_max
        self._now = now
        self._left: float = at_once_max
        self._at = now()

    def take(self) -> None:
        """Takes one; raises RateLimited, with the seconds until there is one again."""
        before, self._at = self._at, self._now()
        # A clock that is set back fills nothing up.
        filled = max(0.0, (self._at - before).total_seconds()) * self._per_second_max
        self._left = min(self._left + filled, self._at_once_max)
        if self._left < 1:
            raise RateLimited(
                f"At the most {self._per_second_max} a second are taken here, of all callers together.",
                retry_after_seconds=math.ceil((1 - self._left) / self._per_second_max),
            )
        self._left -= 1
