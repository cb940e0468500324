"""The judge of the chaos scenarios: it finds nothing where all is well, and each broken promise where it is broken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos.journal import Answer, Event, Journal, read
from chaos.judge import Ledger, Stored, by_key, findings

CAP = 10_000_000_000
FIRST = Stored(1, "id-1", "a", "EUR", 6900, 100)
SECOND = Stored(2, "id-2", "b", "USD", 500, 50)
WELL = Ledger([FIRST, SECOND], 150, CAP, 2)


def placed(order: Stored, **changed: Any) -> Answer:
    shown = {"id": order.id, "number": order.number, "currency": order.currency, "amount": "69.00"}
    shown["amount"] = f"{order.amount_cents / 100:.2f}"
    return Answer(201, {"order": shown | changed})


def refused(code: str, status: int = 503) -> Answer:
    return Answer(status, {"code": code})


def events(path: Path, *told: tuple[str, Answer | None]) -> list[Event]:
    """A journal of orders sent one after the other, by their keys; None was never answered."""
    with Journal(path / "journal.jsonl", seed=1) as journal:
        for key, answer in told:
            journal.sent(key, {"currency": "EUR", "amount": "1"})
            if answer is not None:
                journal.answered(key, answer)
    return read(path / "journal.jsonl")


def test_where_all_is_well_nothing_is_found(tmp_path: Path) -> None:
    well = events(
        tmp_path,
        ("a", refused("outcome_unknown")),
        ("a", placed(FIRST)),
        ("a", placed(FIRST)),
        ("b", None),
        ("c", refused("overloaded")),
        ("d", Answer(0)),
    )
    assert list(findings(well, WELL)) == []
    assert {key: told.outcome for key, told in by_key(well).items()} == {
        "a": "placed",
        "b": "unknown",
        "c": "overloaded",
        "d": "unknown",
    }


@pytest.mark.parametrize("answer", [refused("outcome_unknown"), refused("internal_error", 500), Answer(0), None])
def test_what_may_be_stored_is_no_broken_promise(tmp_path: Path, answer: Answer | None) -> None:
    assert list(findings(events(tmp_path, ("a", answer), ("x", answer)), WELL)) == []


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([("x", placed(FIRST))], "x: answered 201 and is not stored"),
        ([("a", refused("overloaded"))], "a: refused (overloaded) and is stored as 1"),
        (
            [("a", refused("overloaded")), ("a", refused("invalid_request", 422))],
            "a: refused (invalid_request, overloaded) and is stored as 1",
        ),
        (
            [("a", placed(FIRST, id="other"))],
            "a: answered as ('other', 1, 'EUR', 6900), and is stored as order 1, id-1",
        ),
        ([("a", placed(FIRST, number=2))], "a: answered as ('id-1', 2, 'EUR', 6900), and is stored as order 1, id-1"),
        ([("a", placed(FIRST, amount="1"))], "a: answered as ('id-1', 1, 'EUR', 100), and is stored as order 1, id-1"),
    ],
)
def test_what_was_told_and_is_not_so_is_found(tmp_path: Path, told: list[tuple[str, Answer]], found: str) -> None:
    assert list(findings(events(tmp_path, *told), WELL)) == [found]


@pytest.mark.parametrize(
    ("is_final", "found"), [(True, ["a: a look-up that was final said 404, and it is stored as 1"]), (False, [])]
)
def test_a_404_that_was_final_and_not_true_is_found(tmp_path: Path, is_final: bool, found: list[str]) -> None:
    with Journal(tmp_path / "journal.jsonl", seed=1) as journal:
        journal.fault("a standby stops")
        journal.sent("a", {})
        journal.answered("a", refused("outcome_unknown"))
        journal.looked_up("a", refused("order_not_found", 404), is_final=is_final)
    assert list(findings(read(tmp_path / "journal.jsonl"), WELL)) == found


@pytest.mark.parametrize(
    ("ledger", "found"),
    [
        (replace(WELL, orders=[FIRST, replace(SECOND, key="a")]), "a: stored twice, as 1 and 2"),
        (replace(WELL, orders=[FIRST, replace(SECOND, number=3)]), "the numbers of 2 orders have gaps up to 2"),
        (replace(WELL, last_number=3), "the numbers of 2 orders have gaps up to 3"),
        (replace(WELL, used_satoshi=149), "the orders add up to 150 satoshi, and the ledger says 149"),
        (replace(WELL, cap_satoshi=149), "150 satoshi were sold over the cap of 149"),
        (
            replace(WELL, orders=[FIRST, replace(SECOND, price_was_valid=False)]),
            "order 2 was placed at a price that had ended",
        ),
        (
            replace(WELL, orders=[FIRST, replace(SECOND, rate_follows=False)]),
            "order 2 was placed at another rate than the market's and its markup",
        ),
    ],
)
def test_a_ledger_that_breaks_a_promise_is_found(ledger: Ledger, found: str) -> None:
    assert list(findings([], ledger)) == [found]
