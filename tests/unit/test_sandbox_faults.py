"""What the sandbox's five sources play, fault by fault, tick by tick."""

from collections.abc import Sequence

import pytest

from buydesk.backends.sources.sandbox import CLOCKLESS, sandbox_sources
from buydesk.errors import SourceFailed
from buydesk.money import Currency
from buydesk.prices.model import PriceSource, SourceResponse
from buydesk.prices.polling import SourcePoller
from buydesk.prices.rule import differs
from buydesk.settings.model import Settings
from buydesk.settings.types import SandboxFault
from tests.clock import FakeClock

EUR, GBP, USD = Currency
WITH_CLOCKS = ["sandbox-1", "sandbox-2"]
TICK_SECONDS = 15


class Sandbox:
    """The five sources of a sandbox with a fault, asked tick by tick. The series stands still."""

    def __init__(self, fault: SandboxFault | None) -> None:
        self.clock = FakeClock()
        self.settings = Settings(sandbox_fault=fault, replay_speed=0)
        self.sources: Sequence[PriceSource] = sandbox_sources(self.settings, None, self.clock)

    async def tick(self) -> dict[str, SourceResponse]:
        """What each says at the next tick; nothing of one that fails."""
        said = {}
        for source in self.sources:
            try:
                said[source.name] = await source.quotes()
            except SourceFailed:
                continue
        self.clock.seconds += TICK_SECONDS
        return said

    async def mids(self) -> dict[str, dict[Currency, int]]:
        """The middles of bid and ask at the next tick, in cents."""
        said = await self.tick()
        return {name: {each.currency: each.mid_e8 // 10**6 for each in of.quotes} for name, of in said.items()}


@pytest.mark.parametrize("fault", [None, "outlier", "stale"])
async def test_three_of_the_five_have_no_clock_and_show_at_every_tick_that_they_are_alive(
    fault: SandboxFault | None,
) -> None:
    sandbox = Sandbox(fault)
    seen = [{name: said.fingerprint for name, said in (await sandbox.tick()).items()} for _ in range(20)]
    for name in WITH_CLOCKS:
        assert {each[name] for each in seen} == {None}
    for name in CLOCKLESS:
        assert len({each[name] for each in seen}) == 20


async def test_frozen_sources_repeat_their_first_answer_while_those_with_clocks_move_on_and_away() -> None:
    sandbox = Sandbox("frozen")
    first = await sandbox.mids()
    for tick in range(1, 12):
        seen = await sandbox.mids()
        assert {name: seen[name] for name in CLOCKLESS} == {name: first[name] for name in CLOCKLESS}
        for name in WITH_CLOCKS:
            away = seen[name][EUR] / first[name][EUR] - 1
            assert away == pytest.approx(min(tick, 4) / 100, abs=1e-4)


async def test_frozen_sources_are_dated_now_and_set_aside_when_their_time_is_up() -> None:
    sandbox = Sandbox("frozen")
    pollers = [SourcePoller(each, sandbox.settings, clock=sandbox.clock) for each in sandbox.sources]
    for tick in range(10):
        answers = {poller.name: await poller.poll() for poller in pollers}
        assert {quote.observed_at for said in answers.values() for quote in said.quotes} == {sandbox.clock.at}
        quoting = [name for name, said in answers.items() if said.quotes]
        assert quoting == (WITH_CLOCKS if tick * TICK_SECONDS > 120 else [*WITH_CLOCKS, *CLOCKLESS])
        sandbox.clock.seconds += TICK_SECONDS


async def test_one_currency_is_left_to_one_source_and_the_others_say_so() -> None:
    said = await Sandbox("one-currency").tick()
    assert [name for name, each in said.items() if GBP in {quote.currency for quote in each.quotes}] == ["sandbox-1"]
    assert {quote.currency for quote in said["sandbox-2"].quotes} == {EUR, USD}
    assert [each.reason for each in said["sandbox-2"].rejected] == ["GBP: has no book (a fault that was asked for)"]
    assert said["sandbox-1"].rejected == ()


async def test_crash_is_to_exactly_one_of_each_currency_at_the_third_tick() -> None:
    sandbox = Sandbox("crash")
    first, second = await sandbox.mids(), await sandbox.mids()
    assert first == second
    assert first == await Sandbox(None).mids()
    for _ in range(2):
        assert await sandbox.mids() == dict.fromkeys(first, dict.fromkeys(Currency, 100))


async def test_jump_is_of_ten_percent_at_the_third_tick_and_for_good() -> None:
    sandbox = Sandbox("jump")
    first, second = await sandbox.mids(), await sandbox.mids()
    assert first == second
    for _ in range(2):
        for name, mids in (await sandbox.mids()).items():
            for currency, cents in mids.items():
                assert not differs(cents * 10, first[name][currency] * 11, 1)


async def test_swapped_sources_give_the_dollar_s_number_in_all_currencies_and_are_left_alone_at_the_third_tick() -> (
    None
):
    sandbox, right = Sandbox("swapped"), await Sandbox(None).mids()
    for tick in range(1, 6):
        seen = await sandbox.mids()
        for name in WITH_CLOCKS:
            assert set(seen[name].values()) == {right[name][USD]}
        others = {name: mids for name, mids in seen.items() if name not in WITH_CLOCKS}
        assert others == ({name: right[name] for name in CLOCKLESS} if tick < 3 else {})


async def test_what_is_asked_twice_in_one_tick_is_one_tick() -> None:
    sandbox = Sandbox("crash")
    for _ in range(3):
        said = await sandbox.tick()
        sandbox.clock.seconds -= TICK_SECONDS
        assert said["sandbox-3"].fingerprint == b"1"
