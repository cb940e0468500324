"""Limits: how often something may be done."""

from datetime import timedelta

import pytest

from buydesk.errors import RateLimited
from buydesk.limits import TokenBucket
from tests.clock import FakeClock


class Taker:
    """Takes from a bucket of 3 at once and 2 a second, at a time that the tests set."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.bucket = TokenBucket(2, 3, self.clock)

    def taken(self) -> int:
        """How many are there; takes them all."""
        for number in range(100):
            try:
                self.bucket.take()
            except RateLimited:
                return number
        raise AssertionError("no end of them")


@pytest.fixture
def taker() -> Taker:
    return Taker()


def test_so_many_are_taken_at_once_and_no_more(taker: Taker) -> None:
    assert taker.taken() == 3
    assert taker.taken() == 0


def test_an_empty_bucket_fills_up_with_time_as_far_as_it_goes(taker: Taker) -> None:
    taker.taken()
    taker.clock.seconds += 0.5
    assert taker.taken() == 1
    taker.clock.seconds += 1
    assert taker.taken() == 2
    taker.clock.seconds += 3600
    assert taker.taken() == 3


def test_vain_tries_do_not_put_off_the_next_one(taker: Taker) -> None:
    taker.taken()
    taken = []
    for _ in range(8):
        taker.clock.seconds += 0.125
        taken.append(taker.taken())
    assert taken == [0, 0, 0, 1, 0, 0, 0, 1]


def test_a_clock_that_is_set_back_neither_fills_nor_stops_it(taker: Taker) -> None:
    taker.taken()
    taker.clock.at -= timedelta(hours=1)
    assert taker.taken() == 0
    taker.clock.seconds += 0.5
    assert taker.taken() == 1


def test_a_refusal_tells_when_there_is_one_again(taker: Taker) -> None:
    slow = TokenBucket(1, 1, taker.clock)
    slow.take()
    with pytest.raises(RateLimited, match="At the most 1 a second") as refused:
        slow.take()
    assert refused.value.retry_after_seconds == 1
