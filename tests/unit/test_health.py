"""Health: the state that follows from a service's last report, and a report's document."""

from datetime import UTC, datetime, timedelta

import pytest

from buydesk.health import STOPPED, KeptReport, Report, State, kept_document, kept_from, service_state

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def kept(data: str = "ready") -> KeptReport:
    return KeptReport(Report("info", "db_proxy", 200, data), NOON)


@pytest.mark.parametrize(
    ("seconds", "state"),
    [(-5, "alive"), (0, "alive"), (90, "alive"), (90.1, "late"), (240, "late"), (240.1, "dead")],
)
def test_state_follows_from_the_age_of_the_last_report(seconds: float, state: State) -> None:
    assert service_state(kept(), NOON + timedelta(seconds=seconds), MINUTE) == state


def test_service_that_was_never_heard_of_is_unknown() -> None:
    assert service_state(None, NOON, MINUTE) == "unknown"


def test_service_that_said_it_stopped_is_dead_at_once() -> None:
    assert service_state(kept(STOPPED), NOON, MINUTE) == "dead"


@pytest.mark.parametrize(
    "report", [Report("warning", "db_proxy", 200, STOPPED), Report("info", "db_proxy", 503, STOPPED)]
)
def test_only_the_last_words_as_our_services_say_them_mean_dead(report: Report) -> None:
    assert service_state(KeptReport(report, NOON), NOON, MINUTE) == "alive"


def test_document_of_a_report_reads_back_as_the_same_report() -> None:
    assert kept_from(kept_document(kept())) == kept()
    assert kept_document(kept())["arrived_at"] == "2026-01-31T12:00:00.000000Z"
