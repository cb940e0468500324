"""What the load users hold against the desk: everything that is broken is found, and what is right is not."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from load import promises
from load.promises import Asked, Placed, Walk, in_exposure, in_order, in_record, in_repeats, in_replay

ASKED = Asked("EUR", "69.00", "key-1")
ORDER = {
    "id": "01a2047e-656e-762f-9b6b-7da8f4487c67",
    "number": 1,
    "currency": "EUR",
    "amount": "69.00",
    "exchange_rate": "20572.78",
    "bitcoin_amount": "0.00335395",
    "client_order_id": "key-1",
}


def test_the_order_that_was_asked_for_is_right() -> None:
    assert in_order(ORDER, ASKED) is None
    assert in_order({**ORDER, "exchange_rate": "6900", "bitcoin_amount": "0.01000000"}, ASKED) is None


@pytest.mark.parametrize(
    "change",
    [
        {"currency": "GBP"},
        {"amount": "69.01"},
        {"client_order_id": None},
        {"bitcoin_amount": "0.00335394"},  # rounded down
        {"bitcoin_amount": "0.00335396"},
        {"exchange_rate": "20572.79", "bitcoin_amount": "0.00335395000001"},
    ],
)
def test_another_order_than_asked_for_is_found(change: dict[str, Any]) -> None:
    assert in_order({**ORDER, **change}, ASKED) is not None


def test_a_number_or_an_id_that_two_orders_have_is_found() -> None:
    placed = Placed()
    assert placed.broken_by(ORDER) is None
    assert placed.broken_by(ORDER) is None
    assert placed.broken_by({**ORDER, "id": "other", "number": 2}) is None
    assert "no two orders" in str(placed.broken_by({**ORDER, "id": "third"}))
    assert "no two orders" in str(placed.broken_by({**ORDER, "number": 3}))


def test_only_so_many_orders_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "REMEMBERED_MAX", 2)
    placed = Placed()
    for number in range(3):
        assert placed.broken_by({"id": f"id-{number}", "number": number}) is None
    assert placed.broken_by({"id": "another", "number": 0}) is None
    assert placed.broken_by({"id": "another", "number": 2}) is not None


def test_a_repeat_has_the_same_bytes_and_says_so() -> None:
    assert in_replay(b"{}", b"{}", True) is None
    assert "other bytes" in str(in_replay(b"{}", b"{ }", True))
    assert "not told" in str(in_replay(b"{}", b"{}", False))


@pytest.mark.parametrize(
    ("answers", "broken"),
    [
        ([], None),
        ([(b"1", False)], None),
        ([(b"1", True), (b"1", False), (b"1", True)], None),
        ([(b"1", True), (b"1", True)], None),  # the new one's answer was lost
        ([(b"1", False), (b"2", True)], "requests with one key got different answers"),
        ([(b"1", False), (b"1", False)], "one key was placed more than once"),
    ],
)
def test_of_one_key_one_order_is_placed(answers: list[tuple[bytes, bool]], broken: str | None) -> None:
    assert in_repeats(answers) == broken


def page(*numbers: int, more: bool = False, key: str | None = None) -> dict[str, Any]:
    orders = [{"number": number, "client_order_id": key and f"{key}-{number}"} for number in numbers]
    return {"data": orders, "_links": {"self": {}, "prev": {}} | ({"next": {}} if more else {})}


def test_a_walk_that_shows_each_order_once_is_right() -> None:
    walk = Walk()
    assert [walk.broken_by_next(each) for each in (page(5, 4, more=True, key="a"), page(3, 2, more=True), page(1))] == [
        None,
        None,
        None,
    ]
    assert walk.newest == 5
    assert walk.broken_by_newer(page(7, 6, more=True)) is None
    assert walk.broken_by_newer(page()) is None


def test_an_empty_desk_has_an_empty_page() -> None:
    walk = Walk()
    assert walk.broken_by_next(page()) is None
    assert walk.broken_by_newer(page(2, 1)) is None


@pytest.mark.parametrize(
    "second",
    [
        page(2, 1),  # 3 is left out
        page(4, 3, more=True),  # 4 comes again
        page(2, 3, more=True),
        page(3, 1),
        page(3, 2),  # the end, where it is not
        page(3, 2, 1, more=True),  # no end, where it is
    ],
)
def test_an_order_left_out_twice_or_in_the_wrong_place_is_found(second: dict[str, Any]) -> None:
    walk = Walk()
    assert walk.broken_by_next(page(5, 4, more=True)) is None
    assert walk.broken_by_next(second) is not None


@pytest.mark.parametrize("newer", [page(8, 7), page(6, 7), page(5), page(8, 6)])
def test_what_came_meanwhile_has_no_gap(newer: dict[str, Any]) -> None:
    walk = Walk()
    assert walk.broken_by_next(page(5, 4, more=True)) is None
    assert walk.broken_by_newer(newer) is not None


def test_two_orders_with_one_key_are_a_duplicate() -> None:
    walk = Walk()
    one, other = page(2, more=True), page(1)
    one["data"][0]["client_order_id"] = other["data"][0]["client_order_id"] = "same"
    assert walk.broken_by_next(one) is None
    assert "duplicate" in str(walk.broken_by_next(other))


@pytest.mark.parametrize(
    ("cap", "used", "available", "is_right"),
    [
        ("100.00000000", "0.03126145", "99.96873855", True),
        ("100.00000000", "100.00000000", "0.00000000", True),
        ("100.00000000", "100.00000001", "0.00000000", False),
        ("100.00000000", "1.00000000", "98.99999999", False),
    ],
)
def test_more_than_the_cap_is_found(cap: str, used: str, available: str, is_right: bool) -> None:
    assert (in_exposure({"cap": cap, "used": used, "available": available}) is None) == is_right


NOW = datetime(2026, 11, 22, 18, 22, tzinfo=UTC)
RECORD = {
    "as_of": "2026-11-22T18:21:30.000000Z",
    "expires_at": "2026-11-22T18:22:30.000000Z",
    "rates": {"EUR": "20572.78"},
    "sources": {"used": [{"source": "replay"}], "rejected": []},
}


def test_a_price_in_its_time_is_right() -> None:
    assert in_record(RECORD, NOW) is None
    assert in_record(RECORD, NOW + timedelta(seconds=31)) is None  # a Date header has whole seconds


@pytest.mark.parametrize(
    ("change", "late_seconds"),
    [
        ({}, 33),
        ({"expires_at": RECORD["as_of"]}, -60),
        ({"rates": {"EUR": "0"}}, 0),
        ({"sources": {"used": [], "rejected": []}}, 0),
    ],
)
def test_a_price_without_proof_or_past_its_end_is_found(change: dict[str, Any], late_seconds: int) -> None:
    assert in_record({**RECORD, **change}, NOW + timedelta(seconds=late_seconds)) is not None
