"""Request ids: what one request's answer, log lines, reports and calls of further services have in common.

An id comes with the request (`X-Request-Id`) or is made where the request arrives. It is kept in the context of the
task that works on the request, and so in that of every task which that one starts.
"""

import itertools
import secrets
import string
from collections.abc import Iterable
from contextvars import ContextVar

NAME = "X-Request-Id"
HEADER = NAME.lower().encode()

BYTES_MAX = 64
# An id as it is kept: one that was given as it came, one made here as its count. It is written out only where somebody
# reads it: almost no request is logged.
Kept = bytes | int | None

_ALLOWED = (string.ascii_letters + string.digits + "._-").encode()
# Ids made here: what no other process begins with, and a count. Random numbers for each would cost more than the rest.
_process = secrets.token_hex(6)
_fresh = f"{_process}-%d".encode()
_count = itertools.count(1)
_current: ContextVar[Kept] = ContextVar("request_id", default=None)


def begin(given: bytes | None = None) -> bytes:
    """The id under which this task works from now on, for a header: the one that is given, if it is fit to be one, or a
    fresh one."""
    if given is not None and _is_fit(given):
        _current.set(given)
        return given
    count = next(_count)
    _current.set(count)
    return _fresh % count


def choose(given: bytes | None) -> bytes:
    """The given id if it is 1 to 64 of A-Z, a-z, 0-9, ".", "_", "-"; otherwise a fresh one."""
    return given if given is not None and _is_fit(given) else _fresh % next(_count)


def _is_fit(given: bytes) -> bool:
    return 0 < len(given) <= BYTES_MAX and not given.translate(None, _ALLOWED)


def given_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The id that the headers name, fit or not; of several the last, which is the nearest proxy's."""
    given = None
    for name, value in headers:
        if name == HEADER:
            given = value
    return given


def kept() -> Kept:
    """What `text` makes the current id of, at any time later."""
    return _current.get()


def text(kept: Kept) -> str | None:
    """The id as people and logs read it; None if it is none."""
    if kept is None:
        return None
    return f"{_process}-{kept}" if isinstance(kept, int) else kept.decode()


def current() -> str | None:
    """The id of the request that this task works on, None if it works on none."""
    return text(_current.get())
