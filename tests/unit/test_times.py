from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.times import format_time, parse_time, utc_now


@given(st.datetimes(datetime(1000, 1, 2), datetime(9999, 12, 30), timezones=st.timezones()))  # noqa: DTZ001
def test_a_moment_survives_its_text_to_the_microsecond(moment: datetime) -> None:
    text = format_time(moment)
    assert len(text) == len("2026-01-31T09:05:00.000000Z")
    assert parse_time(text) == moment.astimezone(UTC)


def test_text_is_utc() -> None:
    moment = datetime(2026, 1, 31, 10, 5, 0, 120, tzinfo=timezone(timedelta(hours=1)))
    assert format_time(moment) == "2026-01-31T09:05:00.000120Z"
    assert parse_time("2026-01-31T10:05:00.00012+01:00") == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-01-31", "2026-01-31T09:05:00", "2026-13-31T09:05:00Z", "0001-01-01T00:00:00+23:59"]
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # that is what is promised
        parse_time(text)


def test_now_has_its_zone() -> None:
    assert utc_now().utcoffset() == timedelta(0)
