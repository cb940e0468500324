"""Sentry, where `SENTRY_DSN` says so: what is logged as an error goes there, with its exception.

An event says which service, version and feed it is from and which request it is about. It holds no client's data: no
bodies, no values of variables, and of an exception's text neither quoted text nor numbers, which may be a client's key
or an amount. Nothing about it stands in an order's way: events are limited by the minute, wait in a bounded queue for a
thread of sentry_sdk's own, and are given up when it is time to stop.
"""

import asyncio
import contextlib
import importlib.util
import logging
import re
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, cast

from pydantic import SecretStr

from buydesk import __version__
from buydesk.errors import CannotStart
from buydesk.observability.logs import redacted, request_id_of, service_of
from buydesk.settings.model import Settings, variable
from buydesk.settings.types import tokens
from buydesk.times import CLOCK, Clock

if TYPE_CHECKING:
    import sentry_sdk
    from sentry_sdk.types import Event

# Making an event takes about two milliseconds of the loop's time: a storm of errors must not become one of events.
EVENTS_PER_MINUTE_MAX = 60
EVENTS_WAITING_MAX = 30
STOP_SECONDS_MAX = 2.0
VALUE_CHARS_MAX = 1000
# A shorter one is no secret, and to hide it would hide parts of words.
SECRET_CHARS_MIN = 6
# Those by which events are sent: what they say would become an event that cannot be sent either.
_SENDERS = ("sentry_sdk", "urllib3")
_HIDDEN = "[…]"
# PostgreSQL's and asyncpg's further lines tell the row and the key.
_FURTHER_LINES = re.compile(r"\n\s*(DETAIL|HINT|CONTEXT):.*", re.DOTALL)
_QUOTED = re.compile(r"""(["'])(?:\\.|(?!\1)[^\\])*\1|["'].*""", re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,_]*(?:[eE][+-]?\d+)?")


def require_sentry(settings: Settings) -> None:
    """Raises CannotStart when Sentry is asked for and its package is not there."""
    if settings.sentry_dsn is not None and importlib.util.find_spec("sentry_sdk") is None:
        name = variable("sentry_dsn")
        raise CannotStart(f"{name} is set, but sentry-sdk is not installed: install buydesk[sentry], or unset {name}")


@contextlib.asynccontextmanager
async def error_reporting(settings: Settings, services: Collection[str]) -> AsyncIterator[None]:
    """While entered, Sentry gets the errors of these services, which run in this process, if a setting says where it
    is. Leaving takes at most STOP_SECONDS_MAX; raises CannotStart without the package."""
    if settings.sentry_dsn is None:
        yield
        return
    require_sentry(settings)
    client = _client(settings, settings.sentry_dsn)
    handler = SentryHandler(client, services)
    for name in _SENDERS:
        # A Sentry that cannot be reached is no report of ours, again and again; nor after the end, when a thread may
        # still be trying.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    try:
        yield
    except CannotStart:
        raise
    except Exception:
        logging.getLogger("buydesk").critical("the process fails", exc_info=True)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        await asyncio.to_thread(client.close, STOP_SECONDS_MAX)


class SentryHandler(logging.Handler):
    """Makes events of errors and worse. `left_out` counts those that were too many, until the next event tells it."""

    def __init__(self, client: "sentry_sdk.Client", services: Collection[str], clock: Clock = CLOCK) -> None:
        super().__init__(logging.ERROR)
        self.left_out = 0
        self._client = client
        # Of a logger that is no service's: the only service of this process, or all of it.
        self._default = next(iter(services)) if len(services) == 1 else "buydesk"
        self._clock = clock
        self._minute_ends_at = float("-inf")
        self._events = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queues the event of a log record; never raises."""
        if record.name.partition(".")[0] in _SENDERS:
            return
        if not self._has_room():
            self.left_out += 1
            return
        try:
            self._client.capture_event(self._event(record))
        except Exception:  # as every handler of logging: a bad format string fails nobody's request
            self.handleError(record)

    def _has_room(self) -> bool:
        now = self._clock.monotonic()
        if now >= self._minute_ends_at:
            self._minute_ends_at, self._events = now + 60, 0
        self._events += 1
        return self._events <= EVENTS_PER_MINUTE_MAX

    def _event(self, record: logging.LogRecord) -> "Event":
        from sentry_sdk.utils import event_from_exception  # noqa: PLC0415  # an extra

        event: Event = {}
        if record.exc_info and record.exc_info[1] is not None:
            event, _ = event_from_exception(record.exc_info[1], self._client.options)
        event["level"] = "fatal" if record.levelno >= logging.CRITICAL else "error"
        event["logger"] = record.name
        message = record.getMessage()
        # Of other libraries' lines nobody here knows what they quote.
        event["logentry"] = {"message": message if record.name.startswith("buydesk") else scrubbed(message)}
        event["tags"] = {"service": service_of(record.name) or self._default}
        if request_id := request_id_of(record):
            event["tags"]["request_id"] = request_id
        if self.left_out:
            event["extra"] = {"events_left_out_before": self.left_out}
            self.left_out = 0
        return event


def _client(settings: Settings, dsn: SecretStr) -> "sentry_sdk.Client":
    """A client of our own, not the process's: nothing is patched, and nothing but what the handler makes is sent."""
    import sentry_sdk  # noqa: PLC0415  # an extra, and a tenth of a second

    found = (getattr(settings, name) for name in Settings.model_fields)
    whole = [each for each in found if isinstance(each, SecretStr)]
    every = {each.get_secret_value() for each in whole}.union(*map(tokens, whole))  # of two tokens each one too
    secrets = [each for each in every if len(each) >= SECRET_CHARS_MIN]
    return sentry_sdk.Client(
        dsn.get_secret_value(),
        release=f"buydesk@{__version__}",
        environment=settings.price_feed,
        default_integrations=False,
        auto_enabling_integrations=False,
        auto_session_tracking=False,
        send_client_reports=False,
        enable_backpressure_handling=False,
        propagate_traces=False,
        spotlight=False,
        debug=False,
        # send_default_pii is left at its default, which is off: to name it is deprecated.
        max_request_body_size="never",
        max_breadcrumbs=0,
        include_local_variables=False,
        in_app_include=["buydesk"],
        transport_queue_size=EVENTS_WAITING_MAX,
        shutdown_timeout=STOP_SECONDS_MAX,
        before_send=lambda event, _: scrub_event(event, secrets),
    )


def scrub_event(event: "Event", secrets: Collection[str]) -> "Event":
    """The event without secrets, and its exceptions' texts without what they quote."""
    event = cast("Event", _without(secrets, event))  # first, while they are whole
    for exception in event.get("exception", {}).get("values", ()):
        exception["value"] = scrubbed(str(exception.get("value") or ""))
    return event


def scrubbed(text: str) -> str:
    """An exception's text without quoted text, numbers and PostgreSQL's details: they may be a client's."""
    text = _FURTHER_LINES.sub("", text[:VALUE_CHARS_MAX])
    return _NUMBER.sub(_HIDDEN, _QUOTED.sub(_HIDDEN, text))


def _without(secrets: Collection[str], value: object) -> object:
    """The value with the passwords in its texts masked, and the desk's own secrets wherever they stand."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: _without(secrets, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without(secrets, each) for each in value]
    return value
