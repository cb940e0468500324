"""ClockMonitor: what is heard of others' clocks says whose is off, and never that one is off which is not."""

import logging
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.errors import ClockSkewed
from buydesk.observability.clock_skew import KEPT_SECONDS, ClockMonitor, verdict
from buydesk.times import Clock

NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
SKEW = 10.0


class World(Clock):
    """The true time, our own clock, which this is, and others' by how far they are off."""

    def __init__(self, own: str = "db_proxy") -> None:
        self.seconds = 0.0
        self.own_is_off = 0.0
        self.off: dict[str, float] = {}
        self.clocks = ClockMonitor(own, SKEW, self)

    def now(self) -> datetime:
        return self.shown(self.own_is_off)

    def monotonic(self) -> float:
        return 1000 + self.seconds

    def shown(self, off: float) -> datetime:
        return NOON + timedelta(seconds=self.seconds + off)

    def ask(self, whose: str, there: float = 0.0, back: float = 0.0, *, by_http: bool = True) -> None:
        """Asks for the time; the way there and the way back take so many seconds."""
        asked_at = self.clocks.moment()
        self.seconds += there
        told = self.shown(self.off.get(whose, 0.0))
        self.seconds += back
        if by_http:
            self.clocks.hear_date(whose, format_datetime(told, usegmt=True), asked_at)
        else:
            self.clocks.hear(whose, told, asked_at)

    async def said(self) -> str:
        """What /readyz says, "" when the clock is right."""
        try:
            await self.clocks.check()
        except ClockSkewed as error:
            return error.detail
        return ""


async def test_clocks_that_agree_are_right() -> None:
    world = World()
    assert await world.said() == ""
    world.off = {"PostgreSQL": 9.0, "health_check": -0.9}
    world.ask("PostgreSQL", by_http=False)
    world.ask("health_check", 0.3, 0.2)
    assert await world.said() == ""
    world.clocks.require_agreement_with("PostgreSQL")
    world.clocks.require_agreement_with("nobody heard of")


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (11, "11 s ahead of"),
        (-11, "11 s behind"),
        (60, "60 s ahead of"),
        (-60, "60 s behind"),
        (3600, "3600 s ahead of"),
        (-3600, "3600 s behind"),
    ],
)
async def test_own_clock_that_is_off_is_named_by_those_that_agree(off: float, said: str) -> None:
    world = World()
    world.ask("PostgreSQL", 0.001, 0.001, by_http=False)
    for _ in range(4):
        world.ask("health_check", 0.004, 0.3)
    assert await world.said() == ""
    world.own_is_off = off  # at once, without anybody being asked again
    assert await world.said() == f"The clock of db_proxy is {said} PostgreSQL, health_check."
    with pytest.raises(ClockSkewed, match=f"The clock of db_proxy is {said} PostgreSQL"):
        world.clocks.require_agreement_with("PostgreSQL")
    world.own_is_off = 0
    assert await world.said() == ""


async def test_other_clock_that_is_off_is_logged_once_and_stops_only_whoever_needs_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    world = World()
    world.ask("health_check")
    world.off["PostgreSQL"] = -61
    world.ask("PostgreSQL", by_http=False)
    told = "The clock of PostgreSQL is 61 s behind db_proxy, health_check."
    assert [await world.said(), await world.said()] == ["", ""]
    with pytest.raises(ClockSkewed, match=told):
        world.clocks.require_agreement_with("PostgreSQL")
    world.off["PostgreSQL"] = -63
    world.ask("PostgreSQL", by_http=False)  # it drifts on
    world.ask("fetch_buy_orders")  # and another one agrees with us
    assert await world.said() == ""
    world.off["PostgreSQL"] = 0
    world.ask("PostgreSQL", by_http=False)  # it was set meanwhile
    assert await world.said() == ""
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("WARNING", told),
        ("INFO", "The clocks agree again."),
    ]


async def test_of_two_clocks_nobody_can_say_which_is_off() -> None:
    world = World()
    world.off["PostgreSQL"] = 61
    world.ask("PostgreSQL", by_http=False)
    told = r"The clocks of db_proxy and PostgreSQL \(61 s ahead of db_proxy\) differ, and it is not known which is off."
    assert await world.said() == ""
    with pytest.raises(ClockSkewed, match=told):
        world.clocks.require_agreement_with("PostgreSQL")


async def test_what_was_heard_long_ago_counts_no_more() -> None:
    world = World()
    for name in ("PostgreSQL", "health_check"):
        world.ask(name)
    world.seconds += KEPT_SECONDS
    world.own_is_off = 60
    assert await world.said() != ""
    world.seconds += 1
    assert await world.said() == ""


@pytest.mark.parametrize(
    "header", [None, "", "now", "Sat, 31 Jan 2026 12:00:00 -0000", "Sat, 99 Jan 2026 12:00:00 GMT"]
)
async def test_date_that_is_none_says_nothing(header: str | None) -> None:
    world = World()
    for name in ("one", "two"):
        world.clocks.hear_date(name, header, world.clocks.moment())
    world.own_is_off = 60
    assert await world.said() == ""


async def test_answers_that_took_their_time_sharpen_each_other() -> None:
    """Each date alone leaves room for a clock that is right; together they do not."""
    world = World()
    world.off = {"one": 10.9, "two": 10.9}
    for _ in range(10):
        for name in world.off:
            world.ask(name, 0.0, 0.45)
            world.seconds += 0.13
    assert (await world.said()).startswith("The clock of db_proxy is 1")


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=9), st.floats(-5, 5))
def test_no_delay_makes_a_right_clock_look_off(delays: list[tuple[float, float]], off: float) -> None:
    world = World()
    world.off["other"] = off
    for there, back in delays:
        world.ask("other", there, back)
        world.clocks.require_agreement_with("other")


def test_the_largest_group_is_right() -> None:
    ahead = {"a": 0.5, "b": 60.0, "c": 61.0, "d": 62.0}
    assert verdict("own", ahead, SKEW) == (
        {"own", "a"},
        "The clock of a is 60 s behind b, c, d. The clock of own is 61 s behind b, c, d.",
    )
    assert verdict("own", {"a": 0.5, "b": 60.0, "c": 61.0}, SKEW) == (
        {"a", "b", "c"},
        "The clocks of own and a (0 s ahead of own), b (60 s ahead of own), c (61 s ahead of own) differ, "
        "and it is not known which is off.",
    )
    assert verdict("own", {"a": 6.0, "b": -6.0}, SKEW)[1].endswith("it is not known which is off.")
