"""An order's reference and metadata: the client's own words, kept as they were answered, and part of its request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import msgspec
import pytest

from buydesk.orders.model import METADATA_BYTES_MAX, METADATA_MEMBERS_MAX, REFERENCE_CHARS_MAX
from tests.problems import assert_problem
from tests.services.test_create_buy_order import Desk, desk_of


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desk_of() as desk:
        yield desk


async def post(desk: Desk, key: str | None = None, **members: Any) -> httpx2.Response:
    headers = {} if key is None else {"Idempotency_Key": key}
    return await desk.post({"currency": "EUR", "amount": 1} | members, **headers)


async def test_both_are_answered_as_they_were_sent(desk: Desk) -> None:
    metadata = {"z": "1", "a": "", "": "Zoë \u00a0😀", 'q"': "\\"}
    answer = await post(desk, reference="Müller, invoice 7", metadata=metadata)
    assert answer.status_code == 201
    order = answer.json()["order"]
    assert (order["reference"], order["metadata"]) == ("Müller, invoice 7", metadata)
    [stored] = desk.ledger.stored
    assert stored.metadata is not None
    assert list(msgspec.json.decode(stored.metadata)) == list(metadata)
    assert stored.metadata.encode() in answer.content


async def test_query_takes_a_reference(desk: Desk) -> None:
    answer = await desk.client.post("/place_order/?currency=eur&amount=1&reference=M%C3%BCller+7")
    assert (answer.status_code, answer.json()["order"]["reference"]) == (201, "Müller 7")
    for wrong in ("reference=", "reference=a%0Ab", "reference=a&reference=b", "metadata=%7B%7D"):
        refused = await desk.client.post(f"/place_order/?currency=eur&amount=1&{wrong}")
        problem = assert_problem(refused, 422, "invalid_request")
        assert [each["member"] for each in problem["errors"]] == [wrong.partition("=")[0]]
    assert len(desk.ledger.stored) == 1


async def test_null_is_none(desk: Desk) -> None:
    answer = await post(desk, reference=None, metadata=None)
    assert (answer.json()["order"]["reference"], answer.json()["order"]["metadata"]) == (None, None)


async def test_they_are_part_of_the_request(desk: Desk) -> None:
    first = await post(desk, "k", reference="r", metadata={"a": "1", "b": "2"})
    again = await post(desk, "k", reference="r", metadata={"b": "2", "a": "1"})
    assert (again.status_code, again.content, again.headers["idempotent-replayed"]) == (201, first.content, "true")
    for other in (
        {"metadata": {"a": "1", "b": "2"}},
        {"reference": "s", "metadata": {"a": "1", "b": "2"}},
        {"reference": "r"},
        {"reference": "r", "metadata": {}},
        {"reference": "r", "metadata": {"a": "1"}},
        {"reference": "r", "metadata": {"a": "2", "b": "1"}},
    ):
        assert_problem(await post(desk, "k", **other), 422, "idempotency_key_reused")


@pytest.mark.parametrize(
    "text", ["", "x" * (REFERENCE_CHARS_MAX + 1), "a\n", "\x00", "\x7f", "\u2028", "\u202e", "\ud800", 7, 1.5, True, []]
)
async def test_what_is_no_reference_is_named(desk: Desk, text: object) -> None:
    problem = assert_problem(await post(desk, reference=text), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == ["reference"]
    assert desk.ledger.stored == []


@pytest.mark.parametrize(
    "metadata",
    ["text", 7, [], [["a", "b"]], {"a": 1}, {"a": None}, {"a": True}, {"a": {"b": "c"}}, {"a": ["b"]},
     {"a": "\x00"}, {"a\n": "b"}, {"a": "\ud800"}, {"\udfff": "b"}, {"a": "\u202e"},
     {str(number): "" for number in range(METADATA_MEMBERS_MAX + 1)}, {"a": "x" * (METADATA_BYTES_MAX - 7)},
     {"a": "é" * (METADATA_BYTES_MAX // 2 - 3)}],
    ids=range(17),
)  # fmt: skip
async def test_what_is_no_metadata_is_named(desk: Desk, metadata: object) -> None:
    problem = assert_problem(await post(desk, metadata=metadata), 422, "invalid_request")
    assert [each["member"] for each in problem["errors"]] == ["metadata"]
    assert desk.ledger.stored == []


async def test_the_most_is_taken(desk: Desk) -> None:
    for metadata in (
        {str(number): "" for number in range(METADATA_MEMBERS_MAX)},
        {"a": "x" * (METADATA_BYTES_MAX - 8)},
        {"a": "é" * (METADATA_BYTES_MAX // 2 - 4)},
        {},
    ):
        answer = await post(desk, reference="é" * REFERENCE_CHARS_MAX, metadata=metadata)
        assert (answer.status_code, answer.json()["order"]["metadata"]) == (201, metadata)


async def test_member_of_metadata_that_is_given_twice_is_named(desk: Desk) -> None:
    answer = await desk.post(b'{"currency":"EUR","amount":1,"metadata":{"shop":"1","shop":"2"}}')
    assert [each["member"] for each in assert_problem(answer, 422, "invalid_request")["errors"]] == ["shop"]


async def test_the_documented_example_is_taken(desk: Desk) -> None:
    body = (await desk.client.get("/openapi.json")).json()["paths"]["/place_order/"]["post"]["requestBody"]
    example = body["content"]["application/json"]["example"]
    answer = await desk.post(json.loads(json.dumps(example)))
    order = answer.json()["order"]
    assert (order["reference"], order["metadata"]) == (example["reference"], example["metadata"])
