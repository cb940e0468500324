"""Members of requests: what a query or a JSON body may have, how each is read, and how it is documented."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from buydesk.errors import InvalidRequest
from buydesk.http.requests import Request, require_utf8, single_parameters
from buydesk.reading import Repeated, decode_json

_WHOLE_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)

Reasons = list[tuple[str, str]]


class Member(NamedTuple):
    """A query parameter or a member of a body. `parse` makes its value, or raises ValueError with the reason why not;
    what is not there and not required is `default`. `schema` and `description` document it."""

    name: str
    parse: Callable[[Any], Any]
    schema: Mapping[str, object]
    description: str = ""
    is_required: bool = False
    default: object = None


def whole_number(name: str, description: str, highest: int, *, lowest: int = 1, default: int | None = None) -> Member:
    """A query parameter in ASCII digits, from `lowest` to `highest`."""

    def parse(text: str) -> int:
        if not _WHOLE_NUMBER.fullmatch(text) or not lowest <= int(text) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    schema = {"type": "integer", "minimum": lowest, "maximum": highest}
    return Member(
        name, parse, schema if default is None else schema | {"default": default}, description, default=default
    )


def read_query(request: Request, *members: Member) -> dict[str, Any]:
    """The value of each query parameter; raises InvalidRequest naming all that are unknown, given twice or wrong."""
    reasons: Reasons = []
    found = read_members(single_parameters(request, [each.name for each in members]), members, reasons)
    if reasons:
        raise InvalidRequest.of_all(reasons)
    return found


def read_members(given: Mapping[str, object], members: Iterable[Member], reasons: Reasons) -> dict[str, Any]:
    """The value of each member; what is wrong with those that are, or are missing, is added to `reasons`."""
    found = {}
    for each in members:
        found[each.name] = each.default
        if each.name in given:
            try:
                found[each.name] = each.parse(given[each.name])
            except ValueError as error:
                reasons.append((each.name, str(error)))
        elif each.is_required:
            reasons.append((each.name, "is missing"))
    return found


def unknown(given: Mapping[str, object], members: Iterable[Member], what: str) -> Reasons:
    """What is wrong with members that are none of these: `what` has no such member."""
    names = {each.name for each in members}
    return [(name, f"is not a member of {what}") for name in given if name not in names]


def json_members(body: bytes) -> dict[str, object]:
    """The members of a stranger's JSON object, numbers as `Number`; raises InvalidRequest, also for repeated ones."""
    document = decode_body(body, lambda strict: decode_json(strict.decode()))
    if not isinstance(document, dict):
        raise InvalidRequest.of("body", "must be a JSON object")
    return document


def decode_body(body: bytes, decode: Callable[[bytes], object] = msgspec.json.decode) -> object:
    """The document of a JSON body; raises InvalidRequest."""
    require_utf8(body)
    try:
        return decode(body)
    except Repeated as error:
        raise InvalidRequest.of_all([(name, "is given more than once") for name in error.names]) from error
    except ValueError as error:
        raise InvalidRequest.of("body", f"is not JSON: {error}"[:200]) from error
    except RecursionError as error:
        raise InvalidRequest.of("body", "is nested too deeply") from error


def parameter_documents(members: Iterable[Member]) -> list[Mapping[str, object]]:
    """The OpenAPI parameters of a query that may have these members."""
    return [
        {"name": each.name, "in": "query", "schema": each.schema}
        | ({"description": each.description} if each.description else {})
        | ({"required": True} if each.is_required else {})
        for each in members
    ]


def body_schema(members: Sequence[Member]) -> dict[str, object]:
    """The JSON schema of a body that may have these members."""
    return {
        "type": "object",
        "required": [each.name for each in members if each.is_required],
        "additionalProperties": False,
        "properties": {each.name: each.schema for each in members},
    }
