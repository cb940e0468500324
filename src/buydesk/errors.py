"""The desk's errors: one tree, in which each error has a code, a status and its facts.

An error becomes an ``application/problem+json`` document (RFC 9457) in `problem` and, on the other side of an HTTP
call, the same error again in `rebuild`, so that one process and six behave alike.
"""

from collections.abc import Mapping
from typing import ClassVar

type_prefix = "urn:buydesk:problem:"
_STANDARD_MEMBERS = frozenset({"type", "title", "status", "detail", "instance", "code"})


class DeskError(Exception):
    """An expected refusal or fault, as a client sees it.

    `detail` is one sentence for a person; `facts` are further members of the problem document, for programs.
    `retry_after_seconds` becomes the Retry-After header.
    """

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    by_code: ClassVar[dict[str, type["DeskError"]]] = {}

    def __init__(self, detail: str, *, retry_after_seconds: int | None = None, **facts: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds
        self.facts = facts

    def __init_subclass__(cls) -> None:
        DeskError.by_code[cls.code] = cls


class InvalidRequest(DeskError):
    """Facts: `errors`, a list of {"member", "reason"}."""

    code, status, title = "invalid_request", 422, "The request is not valid"

    @classmethod
    def of(cls, member: str, reason: str) -> "InvalidRequest":
        return cls.of_all([(member, reason)])

    @classmethod
    def of_all(cls, reasons: list[tuple[str, str]]) -> "InvalidRequest":
        """One error for all members that are wrong, as (member, reason) pairs."""
        detail = "; ".join(f"{member}: {reason}" for member, reason in reasons)
        return cls(detail, errors=[{"member": member, "reason": reason} for member, reason in reasons])


class IdempotencyKeyReused(DeskError):
    code, status, title = "idempotency_key_reused", 422, "The key belongs to another request"


class PayloadTooLarge(DeskError):
    code, status, title = "payload_too_large", 413, "The body is too large"


class UnsupportedMediaType(DeskError):
    code, status, title = "unsupported_media_type", 415, "The body is not JSON"


class Unauthorized(DeskError):
    code, status, title = "unauthorized", 401, "The internal token is missing or wrong"


class NotFound(DeskError):
    code, status, title = "not_found", 404, "There is nothing at this path"


class OrderNotFound(DeskError):
    code, status, title = "order_not_found", 404, "There is no such order"


class PriceNotFound(DeskError):
    code, status, title = "price_not_found", 404, "There is no such price record"


class MethodNotAllowed(DeskError):
    code, status, title = "method_not_allowed", 405, "The path does not take this method"


class ExposureCapExceeded(DeskError):
    """Facts: `cap`, `used`, `available`, BTC as decimal text."""

    code, status, title = "exposure_cap_exceeded", 409, "The order would exceed the cap"


class PriceSuperseded(DeskError):
    code, status, title = "price_superseded", 409, "A newer price record is published already"


class PriceUnavailable(DeskError):
    code, status, title = "price_unavailable", 503, "There is no price"


class PriceStale(DeskError):
    code, status, title = "price_stale", 503, "The last price is older than allowed"


class PriceBoardUnavailable(DeskError):
    code, status, title = "price_board_unavailable", 503, "The price board cannot be reached"


class LedgerUnavailable(DeskError):
    """Nothing was stored, certainly."""

    code, status, title = "ledger_unavailable", 503, "The ledger cannot be reached"


class Overloaded(DeskError):
    """Nothing was stored, certainly."""

    code, status, title = "overloaded", 503, "Too much is waiting"


class OutcomeUnknown(DeskError):
    """The order may or may not be stored. Facts: `order_id`, `final_after`."""

    code, status, title = "outcome_unknown", 503, "It is not known yet whether the order was stored"


class HealthUnavailable(DeskError):
    code, status, title = "health_unavailable", 503, "The reports cannot be reached"


class NotReady(DeskError):
    """Facts: `missing`, a list of {"what", "why"}."""

    code, status, title = "not_ready", 503, "The service is not ready"


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
        "type": type_prefix + error.code,
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
    facts = {name: value for name, value in document.items() if name not in _STANDARD_MEMBERS}
    return kind(str(document.get("detail")), retry_after_seconds=retry_after_seconds, **facts)
