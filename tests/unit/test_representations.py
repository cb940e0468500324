"""How orders are written: a 201 in the bytes of the first answer for ever, all else with what became of the order."""

import json
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from buydesk.http.orders import created
from buydesk.money import Currency
from buydesk.orders.model import ANONYMOUS, REPRESENTATION, NewOrder, Order, is_repeat, parse_metadata, parse_reference
from buydesk.orders.representations import order_document
from tests.builders import at

NOON = at(2026, 1, 31, 9, 5)
ORDER = Order(
    number=9,
    client_number=7,
    id=uuid.UUID("01926e60-7a7c-7cc3-9c4e-3a1d1f1d8a35"),
    created_at=NOON + timedelta(seconds=2.123456),
    client=ANONYMOUS,
    client_order_id='a"b\\c',
    currency=Currency.EUR,
    amount_cents=6900,
    rate_e8=2057278 * 10**6,
    satoshi=335395,
    price_id=uuid.UUID("0b6f3a52-3c1e-4f0a-9a55-0d8a2f1c7e11"),
    price_as_of=NOON,
    livemode=True,
    representation=REPRESENTATION,
    received_at=NOON + timedelta(seconds=2),
    market_rate_e8=2057278 * 10**6,
    markup_bp=0,
    reference=None,
    metadata=None,
    quote_id=None,
)
NEW = NewOrder(ORDER.id, ORDER.client, ORDER.client_order_id, ORDER.currency, ORDER.amount_cents)
BODIES = json.loads((Path(__file__).parents[1] / "data" / "representations.json").read_text(encoding="utf-8"))
CLOSED: dict[str, Any] = {"closed_at": NOON + timedelta(seconds=3)}


@pytest.mark.parametrize(
    "became",
    [{}, CLOSED | {"status": "settled"}, CLOSED | {"status": "cancelled", "reason": "why not"}],
    ids=["accepted", "settled", "cancelled"],
)
@pytest.mark.parametrize("kept", BODIES, ids=range(len(BODIES)))
def test_repeat_has_the_bytes_of_the_first_answer_whatever_became_of_the_order(
    kept: dict[str, Any], became: dict[str, Any]
) -> None:
    given = {name: kept[name] for name in ("representation", "reference", "metadata")}
    assert created(replace(ORDER, **given, **became), "", is_replay=True).body == kept["body"].encode()


def test_bytes_of_every_representation_are_kept() -> None:
    assert {kept["representation"] for kept in BODIES} == set(range(1, REPRESENTATION + 1))


def test_order_of_a_later_program_is_repeated_in_the_newest_shape_there_is() -> None:
    later = replace(ORDER, representation=REPRESENTATION + 1)
    assert created(later, "", is_replay=True).body == created(ORDER, "", is_replay=True).body


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({}, {}),
        ({"representation": 1}, {}),  # whatever it was answered in
        ({"market_rate_e8": 2 * 10**12, "markup_bp": 287}, {"market_rate": "20000.00", "markup_bp": 287}),
        ({"reference": "r", "metadata": '{"a":"1"}'}, {"reference": "r", "metadata": {"a": "1"}}),
        (CLOSED | {"status": "settled"}, {"status": "settled", "settlement_reference": None}),
        (
            CLOSED | {"status": "settled", "settlement_reference": "bank-7"},
            {"status": "settled", "settlement_reference": "bank-7"},
        ),
        (CLOSED | {"status": "cancelled", "reason": "why not"}, {"status": "cancelled", "reason": "why not"}),
    ],
)
def test_all_else_shows_the_newest_shape_and_what_became_of_the_order(
    change: dict[str, Any], shown: dict[str, Any]
) -> None:
    placed = json.loads(BODIES[1]["body"])["order"]
    closed = {"closed_at": "2026-01-31T09:05:03.000000Z"} if "closed_at" in change else {}
    document = msgspec.json.decode(msgspec.json.encode(order_document(replace(ORDER, **change))))
    assert document == placed | shown | closed
    assert list(document)[: len(placed)] == list(placed)


@pytest.mark.parametrize(
    ("change", "repeat"),
    [
        ({"reference": "r", "metadata": '{"b":"2","a":"1"}'}, True),
        ({"reference": "r", "metadata": '{"a":"1","b":"3"}'}, False),
        ({"reference": "r"}, False),
        ({"reference": "q", "metadata": '{"a":"1","b":"2"}'}, False),
        ({"metadata": '{"a":"1","b":"2"}'}, False),
        ({"reference": "r", "metadata": '{"a":"1","b":"2"}', "received_at": NOON, "representation": 1}, True),
    ],
)
def test_reference_and_metadata_are_part_of_what_is_asked_for(change: dict[str, Any], repeat: bool) -> None:
    stored = replace(ORDER, reference="r", metadata='{"a":"1","b":"2"}')
    assert is_repeat(replace(NEW, **change), stored) is repeat


@pytest.mark.parametrize("text", ["r", "M\u00fcller, invoice\u00a07", "x" * 128, "\U0001f468\u200d\U0001f469"])
def test_reference_is_text_without_control_characters(text: str) -> None:
    assert parse_reference(text) == text


@pytest.mark.parametrize("text", ["", "x" * 129, "a\n", "\x00", "\x7f", "\u2028", "\u202e", "\ud800"])
def test_what_is_no_reference_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 128 characters without control characters"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["{}", '{"b":"1","a":"\u00e9"}', f'{{"a":"{"x" * 2040}"}}'])
def test_metadata_is_kept_as_it_is_written(text: str) -> None:
    assert parse_metadata(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be an object whose members are text"),
        ("[]", "must be an object whose members are text"),
        ('{"a":1}', "must be an object whose members are text"),
        ('{"a":"\\u0000"}', "must have no control characters"),
        ('{"\\n":""}', "must have no control characters"),
        (f'{{"a":"{"x" * 2041}"}}', "may have 20 members and 2048 bytes at most"),
        (json.dumps({str(number): "" for number in range(21)}), "may have 20 members and 2048 bytes at most"),
    ],
)
def test_what_is_no_metadata_is_refused_with_the_rule(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_metadata(text)
