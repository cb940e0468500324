"""Request ids: what one request's answer, log lines, reports and calls of further services have in common.

An id comes with the request (`X-Request-Id`) or is made where the request arrives. It is kept in the context of the
task that works on the request, and so in that of every task which that one starts.
"""

import itertools
import re
import secrets
from contextvars import ContextVar

NAME = "X-Request-Id"
HEADER = NAME.lower()

_FIT = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
# Ids made here: what no other process begins with, and a count. Random numbers for each would cost more than the rest.
_process = secrets.token_hex(6)
_count = itertools.count(1)
_current: ContextVar[str | None] = ContextVar("request_id", default=None)


def begin(given: str | None = None) -> str:
    """The id under which this task works from now on: the one that is given, if it is 1 to 64 of A-Z, a-z, 0-9, ".",
    "_", "-"; otherwise a fresh one."""
    request_id = given if given is not None and _FIT.fullmatch(given) else f"{_process}-{next(_count)}"
    _current.set(request_id)
    return request_id


def current() -> str | None:
    """The id of the request that this task works on, None if it works on none."""
    return _current.get()
