"""The record of what operators did: entries that are chained by their hashes."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from buydesk.times import EPOCH


@dataclass(frozen=True, slots=True)
class Act:
    """What an operator did, to what, from where and why; `before` and `after` are JSON texts of what it changed. `hash`
    is made of the entry before it, too."""

    number: int
    at: datetime
    operator: str
    address: str
    act: str
    subject: str
    why: str
    before: str | None
    after: str | None
    hash: bytes

    def expected_hash(self, previous: bytes) -> bytes:
        """The hash that it has after an entry with that hash, the first one after b"": SHA-256 of that hash and of the
        other fields in this order, each as its length in bytes, a colon and its UTF-8, or a minus sign for None. The
        time is in whole microseconds since 1970."""
        moment = (self.at - EPOCH) // timedelta(microseconds=1)
        fields = (str(self.number), str(moment), self.operator, self.address, self.act, self.subject, self.why)
        text = "".join(
            "-" if field is None else f"{len(field.encode())}:{field}" for field in (*fields, self.before, self.after)
        )
        return hashlib.sha256(previous + text.encode()).digest()


def broken_entries(acts: Iterable[Act]) -> Iterator[int]:
    """The numbers at which the chain, from its first entry on, does not hold: something was changed or left out."""
    previous = b""
    for number, act in enumerate(acts, 1):
        if act.number != number or act.expected_hash(previous) != act.hash:
            yield number
        previous = act.hash
