"""The one assertion that an answer is a problem (RFC 9457) of ours."""

from typing import Any

import httpx2


def assert_problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document, which has every member that all of them have."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document: dict[str, Any] = answer.json()
    assert (answer.status_code, document["status"], document["code"]) == (status, status, code), document
    assert document["type"] == f"urn:buydesk:problem:{code}"
    assert all(document[member] for member in ("title", "detail", "instance"))
    return document
