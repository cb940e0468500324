"""Calls made up from an OpenAPI document: sent to a service, its answers held against the document."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure, ServerError
from schemathesis.engine import StopReason, events, from_schema
from schemathesis.openapi.checks import RejectedPositiveData

from buydesk.errors import IdempotencyKeyReused, NotReady, Paused, PriceStale, PriceUnavailable, QuoteInvalid
from buydesk.http.responses import PROBLEM_TYPE
from fuzz.documents import Document

ANSWER_SECONDS_MAX = 20
FAILURES_MAX = 100

# All checks of schemathesis are made but for these. (How long an answer may take it is not told.)
LEFT_OUT = {
    # Of what can be deleted one is there for that, and another one for the rest.
    "use_after_free",
    # No operation leads to another within one document: an order is placed at one service and read at another.
    "ensure_resource_availability",
    # Whoever may read may read everything.
    "object_level_authorization",
    # No header is required but Authorization, which `ignored_auth` looks at.
    "missing_required_header",
}
# Refusals that are no fault though the call was good: a key made up before may belong to another order, a quote that is
# made up is signed by nobody, on a busy machine a price may end before the next one, and one call pauses the desk that
# another one resumes. Any other answer of 500 or more is a fault, documented or not.
NO_FAULTS = {each.code for each in (IdempotencyKeyReused, QuoteInvalid, Paused, PriceStale, PriceUnavailable, NotReady)}
# Documented in words: by `multipleOf`, validators that divide floats would refuse what has fewer places too.
TOO_FINE = {"member": "max_exchange_rate", "reason": "must have at most 8 decimal places"}
ACCEPTED = ["2xx", "3xx", "401", "403", "404", "409", "429"]  # 403: to read for another needs a scope
REJECTED = ["401", "403", "404", "405", "409", "413", "415", "422", "429"]
# What fits the schema may be refused here, for rules that it does not state.
STRICTER_THAN_SCHEMA: Mapping[str, Collection[str]] = {
    # Query or body, not both (see FORMS); one of two amounts, and what it may cost.
    "create_buy_order": {"POST /place_order/", "POST /quotes/"},
    "fetch_buy_orders": {"GET /get_orders/"},  # one of the parameters only (see FORMS)
    # What makes a price proven, what a state consists of, integers without a point.
    "api_cache_proxy": {"POST /add/", "POST /sources/", "POST /rates/"},
    # One anchor of a page only; what an anchor of a price consists of; what each change has; what makes a price proven;
    # a turn of a webhook's.
    "db_proxy": {
        *("GET /page", "PUT /anchors", "POST /changes", "PUT /price/{price_id}"),
        *("POST /webhooks/changes", "POST /webhooks/leases"),
        *("POST /webhooks/renewals", "POST /webhooks/totals", "POST /webhooks/turns"),
        "POST /webhooks/{webhook_id}/deliveries",
    },
    # Where an endpoint may be; one member only, and no number beyond what was delivered.
    "process_buy_orders": {
        *("POST /webhooks", "PATCH /webhooks/{webhook_id}", "POST /webhooks/{webhook_id}/redeliver")
    },
    # Networks, and that a range is not empty.
    "operate_desk": {"POST /keys", "POST /prices/confirm"},
}


@dataclass(frozen=True)
class Part:
    """What is called together: the operations of a document, with the token for them or without."""

    service: str
    url: str
    document: Document = field(repr=False)
    token: str | None = field(repr=False)
    is_form: bool = False

    @property
    def stricter_than_schema(self) -> Collection[str]:
        if self.is_form:
            return ()
        return STRICTER_THAN_SCHEMA.get(self.service, ())


@dataclass
class Found:
    """How many calls of an operation (`service: GET /path`) were answered with a status, 0 when there was no answer;
    and what was wrong, each kind once, with its first call."""

    calls: dict[str, Counter[int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def made(self) -> int:
        """How many calls in all."""
        return sum(statuses.total() for statuses in self.calls.values())

    def add(self, other: "Found") -> None:
        """Joins what another part found out."""
        for operation, statuses in other.calls.items():
            self.calls.setdefault(operation, Counter()).update(statuses)
        self.failures = other.failures | self.failures


def call(part: Part, seed: int, examples: int, *, boundaries: bool) -> Found:
    """Makes up to so many calls of each operation, many of them against its schema. With `boundaries` the documented
    examples come before them, the values at the edges of each schema, and the methods that a path does not take."""
    schema = schemathesis.openapi.from_dict(part.document, config=_config(part, seed, examples, boundaries))
    schema.hook(filter_failure)
    found = Found()
    service = part.service
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            _note(part, event, found)
        elif isinstance(event, events.NonFatalError):
            found.failures[f"{service}: {event.label}: {event.info.title}"] = event.info.message
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.EngineFinished) and event.stop_reason != StopReason.COMPLETED:
            found.failures[f"{service}: not all calls were made"] = event.stop_reason
    return found


def _note(part: Part, event: events.ScenarioFinished, found: Found) -> None:
    recorder = event.recorder
    operation = f"{part.service}: {recorder.label}"
    for each in recorder.interactions.values():
        status = each.response.status_code if each.response is not None else 0
        found.calls.setdefault(operation, Counter())[status] += 1
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if check.failure_info is None:
                continue
            failure = check.failure_info.failure
            answered = recorder.interactions[case_id].response if case_id in recorder.interactions else None
            body = answered.content[:500].decode(errors="replace") if answered is not None else ""
            shown = f"{failure.message}\n{check.failure_info.code_sample}\n{body}"
            found.failures.setdefault(f"{operation}: {failure.title}", shown)


def filter_failure(_: HookContext, failure: Failure, __: Case[Any], response: Response) -> bool:
    """A hook of schemathesis: False for what is no fault."""
    is_refusal = isinstance(failure, RejectedPositiveData | ServerError)
    if not is_refusal or response.headers.get("content-type") != [PROBLEM_TYPE]:
        return True
    refused = response.json()
    return refused["code"] not in NO_FAULTS and refused.get("errors") != [TOO_FINE]


def _config(part: Part, seed: int, examples: int, boundaries: bool) -> SchemathesisConfig:
    checks: dict[str, Any] = {name: {"enabled": False} for name in LEFT_OUT}
    checks["positive_data_acceptance"] = {"expected-statuses": ACCEPTED}
    checks["negative_data_rejection"] = {"expected-statuses": REJECTED}
    looser = {"positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "422"]}}
    return SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "base-url": part.url,
            "request-timeout": ANSWER_SECONDS_MAX,
            "continue-on-failure": True,
            "max-failures": FAILURES_MAX,
            "headers": {"Authorization": f"Bearer {part.token}"} if part.token is not None else {},
            # The same seed makes the same calls, whatever was found before.
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True},
            "phases": {
                "examples": {"enabled": boundaries},
                "coverage": {"enabled": boundaries, "generate-duplicate-query-parameters": True},
                # Links between operations are not documented: there are none within one service.
                "stateful": {"enabled": False},
            },
            "checks": checks,
            "operations": [{"include-name": name, "checks": looser} for name in part.stricter_than_schema],
        }
    )
