"""OpenAPI: how the routes that FastAPI does not document itself are described, and the whole document."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from buydesk.clients.scopes import CLIENT_SCOPES, Scope
from buydesk.errors import (
    DeskError,
    InsufficientScope,
    InternalError,
    InvalidRequest,
    LedgerUnavailable,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    Unauthorized,
    UnsupportedMediaType,
    WrongMode,
    problem,
)
from buydesk.http.members import Member, parameter_documents
from buydesk.http.responses import PROBLEM_TYPE

INTERNAL_SCHEME = "internal_token"
# The `security` of an OpenAPI operation that calls `require_token`.
INTERNAL: list[dict[str, list[str]]] = [{INTERNAL_SCHEME: []}]
KEY_SCHEME = "key"
EVERY_SERVICE = "every service"
_ABOUT_IDS = (
    "Every answer has an `X-Request-Id`, by which the desk's logs and reports name the request: the one that came with "
    "it, if that is 1 to 64 letters, digits, `.`, `_` or `-`, otherwise a fresh one."
)
Json = Mapping[str, object]
Responses = dict[int | str, dict[str, Any]]


def error_responses(*kinds: type[DeskError]) -> Responses:
    """The `responses` of an OpenAPI operation for these errors, each with an example."""
    if LedgerUnavailable in kinds and WrongMode not in kinds:
        kinds = (*kinds, WrongMode)  # whoever needs the ledger may find the other mode's
    responses: Responses = {}
    for kind in kinds:
        response = responses.setdefault(
            str(kind.status),
            {"description": kind.title, "content": {PROBLEM_TYPE: {"schema": _PROBLEM_SCHEMA, "examples": {}}}},
        )
        response["content"][PROBLEM_TYPE]["examples"][kind.code] = {
            "value": problem(kind(kind.title, **kind.example_facts), "/")
        }
    return responses


def response_example(description: str, example: object, status: int = 200) -> Responses:
    """The `responses` of an OpenAPI operation for success, with an example."""
    example = msgspec.to_builtins(example)
    return {str(status): {"description": description, "content": {"application/json": {"example": example}}}}


_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "code"],
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "code": {"type": "string", "description": "Stable; branch on this."},
    },
}


def operation(
    summary: str,
    answer: tuple[str, object],
    *,
    errors: Sequence[type[DeskError]] = (),
    description: str = "",
    tag: str = "",
    query: Sequence[Member] = (),
    parameters: Sequence[Json] = (),
    body: Json | None = None,
    is_body_required: bool = True,
    status: int = 200,
    is_internal: bool = False,
    unchanged: str = "",
) -> dict[str, Any]:
    """An OpenAPI operation. `answer` describes what is answered with `status`, and is an example of it; `unchanged`
    describes a 304, if there is one. `body` has the schema and an example of the JSON that is sent. `errors` are those
    that follow neither from the body nor from the token that a route of the desk's own services needs."""
    if body is not None:
        errors = (InvalidRequest, PayloadTooLarge, UnsupportedMediaType, *errors)
    if is_internal:
        errors = (Unauthorized, *errors)
    members: dict[str, Any] = {
        "tags": tag and [tag],
        "summary": summary,
        "description": description,
        "security": INTERNAL if is_internal else None,
        "parameters": [*parameter_documents(query), *parameters],
        "requestBody": body and {"required": is_body_required, "content": {"application/json": body}},
        "responses": response_example(*answer, status)
        | ({"304": {"description": unchanged}} if unchanged else {})
        | error_responses(*errors),
    }
    return {name: member for name, member in members.items() if member}


def needing(operation: Json, scope: Scope) -> Json:
    """The OpenAPI operation of a route for callers with the scope; an open desk takes callers without a key too, for
    what concerns orders of their own."""
    documented: dict[str, Any] = deepcopy({"description": "", "responses": {}, **operation})
    documented["description"] = f"{documented['description']} A key needs the scope `{scope}`.".lstrip()
    documented["security"] = [{KEY_SCHEME: [scope]}, *([{}] if scope in CLIENT_SCOPES else [])]
    _add_errors(documented["responses"], Unauthorized, InsufficientScope, RateLimited, LedgerUnavailable, Overloaded)
    return documented


def _add_errors(responses: dict[str, Any], *kinds: type[DeskError]) -> None:
    """Documents these errors beside those that are there."""
    for status, further in error_responses(*kinds).items():
        response = responses.setdefault(str(status), further)
        response["content"][PROBLEM_TYPE]["examples"] |= further["content"][PROBLEM_TYPE]["examples"]


def id_in_path(name: str) -> Json:
    """The OpenAPI parameter of a path that ends in a UUID."""
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}


def openapi_document(app: FastAPI, operations: Mapping[str, Mapping[str, Json]]) -> dict[str, Any]:
    """The document of a service; `operations`, by path and method, are those that FastAPI does not know of."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=_ABOUT_IDS,
        routes=app.routes,
        openapi_version="3.1.0",
    )
    for path, direct in operations.items():
        document.setdefault("paths", {}).setdefault(path, {}).update(direct)
    document = deepcopy(document)  # routes share responses, which are added to
    documented = [operation for path in document["paths"].values() for operation in path.values()]
    for operation in documented:
        _add_errors(operation["responses"], InternalError, Overloaded)
    for scheme in {name for operation in documented for each in operation.get("security", ()) for name in each}:
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes[scheme] = {"type": "http", "scheme": "bearer"}
    # Swagger shows the groups in this order: first what the service is there for.
    groups = {tag for operation in documented for tag in operation.get("tags", [])} - {EVERY_SERVICE}
    document["tags"] = [{"name": name} for name in (*sorted(groups, reverse=True), EVERY_SERVICE)]
    return document
