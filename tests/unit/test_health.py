"""Health: the state that follows from a service's last report, and a report's document."""

import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice

import msgspec
import pytest

from buydesk.observability.reports import (
    DATA_CHARS_MAX,
    STOPPED,
    Report,
    State,
    StoredReport,
    newest_first,
    service_state,
    stored_report_document,
    stored_report_from,
)

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def kept(data: str = "ready") -> StoredReport:
    return StoredReport(Report("info", "db_proxy", 200, data), NOON, verified=True)


@pytest.mark.parametrize(
    ("seconds", "state"),
    [
        (-60.1, "unknown"),
        (-60, "alive"),
        (-5, "alive"),
        (0, "alive"),
        (90, "alive"),
        (90.1, "late"),
        (240, "late"),
        (240.1, "dead"),
    ],
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
    assert service_state(StoredReport(report, NOON, verified=True), NOON, MINUTE) == "alive"


def test_document_of_a_report_reads_back_as_the_same_report() -> None:
    assert stored_report_from(stored_report_document(kept())) == kept()
    assert stored_report_document(kept())["arrived_at"] == "2026-01-31T12:00:00.000000Z"


@pytest.mark.parametrize("verified", [None, False, "true", 1, []])
def test_report_is_verified_only_where_its_document_says_so(verified: object) -> None:
    assert stored_report_from({**stored_report_document(kept()), "verified": verified}).verified is False
    without = {name: value for name, value in stored_report_document(kept()).items() if name != "verified"}
    assert stored_report_from(without).verified is False


# Of what is category Cc but the end of a line and the tab, Cf, Cs, Zl and Zp.
UNSEEN = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]


def test_no_character_that_cannot_be_seen_is_left_of_a_report_s_text() -> None:
    for char in UNSEEN:
        data = Report("info", "db_proxy", 200, f"a{char}b").data
        assert data == (f"a{char}b" if char in "\n\t" else f"a{char!r}b".replace("'", "")), hex(ord(char))
        # In JSON too, in the bytes that are sent.
        assert char in "\n\t" or char not in msgspec.json.encode({"data": data}).decode()


def test_text_that_was_written_out_once_stays_as_it_is() -> None:
    written_out = Report("info", "db_proxy", 200, "\x9b\u202e\U000e0001\n\t\\x00 é₿😀 ").data
    assert written_out == "\\x9b\\u202e\\U000e0001\n\t\\x00 é₿😀 "
    assert Report("info", "db_proxy", 200, written_out).data == written_out


def test_text_of_a_report_is_cut_after_it_was_written_out() -> None:
    assert Report("info", "db_proxy", 200, "\x9b" * DATA_CHARS_MAX).data == "\\x9b" * (DATA_CHARS_MAX // 4)
    assert Report("info", "db_proxy", 200, "x" * DATA_CHARS_MAX * 2).data == "x" * DATA_CHARS_MAX


def test_reports_of_several_places_are_put_in_order_without_reading_all() -> None:
    def of(*minutes: int) -> Iterator[StoredReport]:
        for minute in minutes:
            yield StoredReport(Report("info", "db_proxy", 200, str(minute)), NOON + minute * MINUTE, verified=True)
        raise AssertionError("read too far")

    first = islice(newest_first(of(9, 5, 1), of(8, 7, 0)), 4)
    assert [each.report.data for each in first] == ["9", "8", "7", "5"]
