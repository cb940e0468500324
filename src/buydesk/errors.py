"""The desk's errors: one tree, in which each error has a code, a status and its facts.

An error becomes an ``application/problem+json`` document (RFC 9457) in `problem` and, on the other side of an HTTP
call, the same error again in `rebuild`, so that one process and eight behave alike.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from buydesk.times import format_time

TYPE_PREFIX = "urn:buydesk:problem:"
REASONS_MAX = 20
# Members of a problem document that are no facts. `retry_after_seconds` has a header; `server_said` is never in one.
_STANDARD_MEMBERS = frozenset(
    {"type", "title", "status", "detail", "instance", "code", "retry_after_seconds", "server_said"}
)


class DeskError(Exception):
    """An expected refusal or fault, as a client sees it.

    `detail` is one sentence for a person; `facts` are further members of the problem document, for programs.
    `retry_after_seconds` becomes the Retry-After header. `server_said` is what a server behind this service gave as its
    reason: for the log and for reports, never for clients, because it may name addresses.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    by_code: ClassVar[dict[str, type["DeskError"]]] = {}
    example_facts: ClassVar[Mapping[str, Any]] = {}  # for the documentation

    def __init__(
        self, detail: str, /, *, retry_after_seconds: int | None = None, server_said: str = "", **facts: object
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.server_said = server_said
        self.facts = facts

    @property
    def for_operators(self) -> str:
        """The detail, and in what words a server said so: for logs and reports."""
        return f"{self.detail} The server said: {self.server_said}" if self.server_said else self.detail

    def __init_subclass__(cls) -> None:
        DeskError.by_code[cls.code] = cls


class InvalidRequest(DeskError):
    """Facts: `errors`, a list of {"member", "reason"}."""

    code, status, title = "invalid_request", 422, "The request is not valid"
    example_facts: ClassVar = {"errors": [{"member": "amount", "reason": "is missing"}]}

    @classmethod
    def of(cls, member: str, reason: str) -> "InvalidRequest":
        return cls.of_all([(member, reason)])

    @classmethod
    def of_all(cls, reasons: list[tuple[str, str]]) -> "InvalidRequest":
        """One error for the members that are wrong, as (member, reason) pairs: the first REASONS_MAX of them."""
        # A member's name is the client's, which a reason may quote: it may be long, or no valid Unicode.
        named = [(_written(member[:100]), _written(reason)) for member, reason in reasons[:REASONS_MAX]]
        detail = "; ".join(f"{member}: {reason}" for member, reason in named)
        return cls(detail, errors=[{"member": member, "reason": reason} for member, reason in named])


def _written(text: str) -> str:
    return text.encode(errors="replace").decode()


class IdempotencyKeyReused(DeskError):
    code, status, title = "idempotency_key_reused", 422, "The key belongs to another request"


class QuoteInvalid(DeskError):
    code, status, title = "quote_invalid", 422, "This is no quote of this desk"


class QuoteNotFound(DeskError):
    """It is another client's."""

    code, status, title = "quote_not_found", 404, "There is no such quote"


class QuoteExpired(DeskError):
    """Facts: `expires_at`."""

    code, status, title = "quote_expired", 409, "The quote has expired"
    example_facts: ClassVar = {"expires_at": "2026-01-31T09:05:32.000000Z"}


class PayloadTooLarge(DeskError):
    """Facts: `bytes_max`."""

    code, status, title = "payload_too_large", 413, "The body is too large"
    example_facts: ClassVar = {"bytes_max": 16_384}


class HeadersTooLarge(DeskError):
    code, status, title = "headers_too_large", 431, "The headers are too large"


class InvalidHttp(DeskError):
    code, status, title = "invalid_http", 400, "This is no HTTP request"


class RequestTimeout(DeskError):
    """Nothing was done: only a complete request is."""

    code, status, title = "request_timeout", 408, "The request did not come in time"


class UnsupportedMediaType(DeskError):
    code, status, title = "unsupported_media_type", 415, "The body is not JSON"


class Unauthorized(DeskError):
    code, status, title = "unauthorized", 401, "The token is missing or wrong"


class InsufficientScope(DeskError):
    """Facts: `scope`, what the caller lacks (RFC 6750, section 3.1)."""

    code, status, title = "insufficient_scope", 403, "The key does not permit this"
    example_facts: ClassVar = {"scope": "orders:read_all"}

    @classmethod
    def of(cls, scope: str) -> "InsufficientScope":
        return cls(f"This needs the scope {scope}.", scope=scope)


class ForeignOrigin(DeskError):
    code, status, title = "foreign_origin", 403, "An open desk takes this from its own pages and from programs only"


class RateLimited(DeskError):
    """Facts, where it is for what the caller did: `policy`, the kind of that, and `per_minute`."""

    code, status, title = "rate_limited", 429, "Too many requests"
    example_facts: ClassVar = {"policy": "orders", "per_minute": 60}


class NotFound(DeskError):
    code, status, title = "not_found", 404, "There is nothing at this path"


class OrderNotFound(DeskError):
    code, status, title = "order_not_found", 404, "There is no such order"


class PriceNotFound(DeskError):
    code, status, title = "price_not_found", 404, "There is no such price record"


class ClientNotFound(DeskError):
    code, status, title = "client_not_found", 404, "There is no such client"


class KeyNotFound(DeskError):
    code, status, title = "key_not_found", 404, "There is no such key"


class WebhookNotFound(DeskError):
    code, status, title = "webhook_not_found", 404, "There is no such webhook"


class EventNotFound(DeskError):
    code, status, title = "event_not_found", 404, "There is no such event"


class MethodNotAllowed(DeskError):
    """Facts: `allow`, the methods as in the header."""

    code, status, title = "method_not_allowed", 405, "The path does not take this method"
    example_facts: ClassVar = {"allow": "GET, HEAD"}


class ExposureCapExceeded(DeskError):
    """Facts: `cap`, `used`, `available`, BTC as decimal text."""

    code, status, title = "exposure_cap_exceeded", 409, "The order would exceed the cap"
    example_facts: ClassVar = {"cap": "100.00000000", "used": "99.99900000", "available": "0.00100000"}


class ClientCapExceeded(DeskError):
    """Facts: `cap`, `used`, `available`, the client's own, BTC as decimal text."""

    code, status, title = "client_cap_exceeded", 409, "The order would exceed the client's cap"
    example_facts: ClassVar = {"cap": "10.00000000", "used": "9.99900000", "available": "0.00100000"}


class OrderTooLarge(DeskError):
    """Facts: `bitcoin_amount_max`, BTC as decimal text."""

    code, status, title = "order_too_large", 409, "The order is larger than the client's may be"
    example_facts: ClassVar = {"bitcoin_amount_max": "1.00000000"}


class DailyLimitExceeded(DeskError):
    """Facts: `currency`, and of the client's own purchases in it on this day of UTC `limit`, `used`, `available`, as
    decimal text; `resets_at`, when the next day begins."""

    code, status, title = "daily_limit_exceeded", 409, "The order would exceed what the client may buy on a day"
    example_facts: ClassVar = {
        "currency": "EUR",
        "limit": "1000.00",
        "used": "980.00",
        "available": "20.00",
        "resets_at": "2026-03-10T00:00:00.000000Z",
    }


class PriceMoved(DeskError):
    """Facts: `exchange_rate` and `bitcoin_amount` as they are now, decimal text."""

    code, status, title = "price_moved", 409, "The price is worse than the order allows"
    example_facts: ClassVar = {"exchange_rate": "20675.6439", "bitcoin_amount": "0.00333728"}


class ClientExists(DeskError):
    code, status, title = "client_exists", 409, "There is a client of this name"


class TooManyWebhooks(DeskError):
    code, status, title = "too_many_webhooks", 409, "There are as many webhooks as a client may have"


class WebhookKeyLost(DeskError):
    code, status, title = "webhook_key_lost", 409, "The secret of the webhook cannot be made any more"


class WebhookBusy(DeskError):
    code, status, title = "webhook_busy", 409, "A message that was asked for is on its way to the webhook"


class KeyEnded(DeskError):
    code, status, title = "key_ended", 409, "The key has ended"


class KeyRefused(DeskError):
    """The key that an act was to be done with is none, or none any more: db_proxy tells operate_desk."""

    code, status, title = "key_refused", 409, "The key permits nothing"


class CapBelowUsed(DeskError):
    code, status, title = "cap_below_used", 409, "More is used than the cap would be"


class OrderStateConflict(DeskError):
    """Facts: `order_status` (`status` is a problem's own, RFC 9457), and the text that the order was settled or
    cancelled with, `settlement_reference` or `reason`."""

    code, status, title = "order_state_conflict", 409, "The order was settled or cancelled otherwise"
    example_facts: ClassVar = {"order_status": "cancelled", "reason": "the client asked for it"}


class PriceSuperseded(DeskError):
    code, status, title = "price_superseded", 409, "A newer price record is published already"


class PriceUnavailable(DeskError):
    code, status, title = "price_unavailable", 503, "There is no price"


class PriceStale(DeskError):
    """Facts: `as_of`, `expires_at`."""

    code, status, title = "price_stale", 503, "The last price is older than allowed"
    example_facts: ClassVar = {"as_of": "2026-03-09T17:00:00.000000Z", "expires_at": "2026-03-09T17:01:00.000000Z"}

    def is_of(self, as_of: datetime) -> bool:
        """Whether the price that is too old was observed then, or later."""
        # A text that sorts as time does; it may come from another process.
        return str(self.facts.get("as_of")) >= format_time(as_of)


class PriceUnsettled(DeskError):
    """Facts: `as_of`, and `currencies`: by currency why its price is not sold at yet."""

    code, status, title = "price_unsettled", 503, "The price is in doubt and not sold at yet"
    example_facts: ClassVar[Mapping[str, Any]] = {
        "as_of": "2026-03-09T17:00:00.000000Z",
        "currencies": {"EUR": "is more than 5 % from the last price, and was not seen twice yet"},
    }


class Paused(DeskError):
    code, status, title = "paused", 503, "Sales are paused"


class PriceStoreUnavailable(DeskError):
    code, status, title = "price_board_unavailable", 503, "The prices cannot be reached"


class LedgerUnavailable(DeskError):
    """Nothing was stored, certainly."""

    code, status, title = "ledger_unavailable", 503, "The ledger cannot be reached"


class WrongMode(DeskError):
    """Sandbox orders and live orders never share a database."""

    code, status, title = "wrong_mode", 503, "The database belongs to the other mode"


class ClockSkewed(DeskError):
    """Clocks of the desk differ by more than is allowed; `detail` names the one that is off, where that is known.
    Nothing was stored, certainly."""

    code, status, title = "clock_skewed", 503, "A clock of the desk is off"


class Overloaded(DeskError):
    """Nothing was stored, certainly."""

    code, status, title = "overloaded", 503, "Too much is waiting"


class OutcomeUnknown(DeskError):
    """It may or may not be stored. Facts, of an order: `order_id`, `final_after`; of a key that was made: `key_id`."""

    code, status, title = "outcome_unknown", 503, "It is not known yet whether it was stored"
    example_facts: ClassVar = {
        "order_id": "01938f6e-5f3a-7c1b-9d2e-4a6b8c0d1e2f",
        "final_after": "2026-03-09T17:00:18.000000Z",
    }


class ReportsUnavailable(DeskError):
    code, status, title = "health_unavailable", 503, "The reports cannot be reached"


class RatesUnavailable(DeskError):
    code, status, title = "rates_unavailable", 503, "The counts of requests cannot be reached"


class NotReady(DeskError):
    """Facts: `missing`, a list of {"what", "why"}."""

    code, status, title = "not_ready", 503, "The service is not ready"
    example_facts: ClassVar = {"missing": [{"what": "ledger", "why": "PostgreSQL cannot be used (OSError)."}]}


class InternalError(DeskError):
    code, status, title = "internal_error", 500, "Something went wrong here"


class SourceFailed(DeskError):
    """A price source gave no usable quotes; `detail` says why."""

    code, status, title = "source_failed", 502, "A price source gave no usable answer"


class CannotStart(Exception):
    """The desk cannot start: one line that says what is wrong and how to mend it (exit code 2)."""


def problem(error: DeskError, instance: str) -> dict[str, object]:
    """The problem document of an error; `instance` is the path of the request."""
    return {
        "type": TYPE_PREFIX + error.code,
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "code": error.code,
        **error.facts,
    }


def rebuild(document: Mapping[str, object], retry_after_seconds: int | None = None) -> DeskError:
    """The error that a problem document of this desk was made of; of an unknown code an InternalError."""
    kind = DeskError.by_code.get(str(document.get("code")), InternalError)
    facts: dict[str, Any] = {name: value for name, value in document.items() if name not in _STANDARD_MEMBERS}
    return kind(str(document.get("detail")), retry_after_seconds=retry_after_seconds, **facts)
