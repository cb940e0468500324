import pytest

from buydesk import errors
from buydesk.errors import (
    DeskError,
    ExposureCapExceeded,
    InsufficientScope,
    InternalError,
    InvalidRequest,
    PriceStale,
    problem,
    rebuild,
)
from buydesk.http.responses import problem_response

KINDS = list(DeskError.by_code.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_every_error_crosses_http_unchanged(kind: type[DeskError]) -> None:
    error = kind("Something.", retry_after_seconds=5, available="0.5", nested=[{"a": 1}])
    again = rebuild(problem(error, "/place_order/"), retry_after_seconds=5)
    assert type(again) is kind
    assert (again.detail, again.retry_after_seconds, again.facts) == (error.detail, 5, error.facts)


def test_codes_statuses_and_titles_are_fit_for_clients() -> None:
    assert len(KINDS) == len({kind.title for kind in KINDS}) > 20
    for kind in KINDS:
        assert kind.code.replace("_", "").isalpha()
        assert kind.code.islower()
        assert 400 <= kind.status <= 503
        assert kind.title[0].isupper()


def test_a_problem_document_has_the_standard_members_and_the_facts() -> None:
    error = ExposureCapExceeded("Too much.", cap="100.00000000", used="99.00000000", available="1.00000000")
    assert problem(error, "/place_order/") == {
        "type": "urn:buydesk:problem:exposure_cap_exceeded",
        "title": "The order would exceed the cap",
        "status": 409,
        "detail": "Too much.",
        "instance": "/place_order/",
        "code": "exposure_cap_exceeded",
        "cap": "100.00000000",
        "used": "99.00000000",
        "available": "1.00000000",
    }


@pytest.mark.parametrize(
    "document",
    [{}, {"code": "teapot"}, {"code": None}, {"code": ["a"]}, {"code": 7, "self": 1, "retry_after_seconds": 9}],
)
def test_what_is_no_problem_of_ours_becomes_an_internal_error(document: dict[str, object]) -> None:
    error = rebuild({"detail": "Odd.", **document})
    assert type(error) is InternalError
    assert (error.detail, error.retry_after_seconds, str(error)) == ("Odd.", None, "Odd.")


def test_an_invalid_request_names_each_member_with_its_reason() -> None:
    error = InvalidRequest.of_all([("amount", "must be greater than 0"), ("currency", "is missing")])
    assert error.detail == "amount: must be greater than 0; currency: is missing"
    assert error.facts["errors"] == [
        {"member": "amount", "reason": "must be greater than 0"},
        {"member": "currency", "reason": "is missing"},
    ]
    assert InvalidRequest.of("amount", "is missing").detail == "amount: is missing"


def test_an_invalid_request_cuts_and_mends_the_names_a_client_made_up() -> None:
    error = InvalidRequest.of("\ud800" + "x" * 1000, "is unknown")
    assert error.facts["errors"] == [{"member": "?" + "x" * 99, "reason": "is unknown"}]


def test_an_invalid_request_names_no_more_members_than_a_person_reads() -> None:
    error = InvalidRequest.of_all([(f"x{number}", "is unknown") for number in range(30_000)])
    assert len(error.detail) < 1000
    assert len(error.facts["errors"]) == errors.REASONS_MAX  # type: ignore[arg-type]


def test_an_error_says_its_detail() -> None:
    assert str(PriceStale("Old.")) == "Old."


def test_a_missing_scope_is_named_in_the_header_too() -> None:
    error = InsufficientScope.of("orders:read_all")
    assert error.facts == {"scope": "orders:read_all"}
    answer = problem_response(error, "/get_orders/")
    assert answer.status_code == 403
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="orders:read_all"'
