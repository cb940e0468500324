"""The one assertion that an answer is a problem (RFC 9457) of ours."""

from typing import Any

import httpx2

from buydesk.errors import DeskError


def assert_problem(answer: httpx2.Response, status: int, code: str, *, is_by_desk: bool = True) -> dict[str, Any]:
    """The problem document, which has every member that all of them have: one by a proxy in front has no instance."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document: dict[str, Any] = answer.json()
    assert (answer.status_code, document["status"], document["code"]) == (status, status, code), document
    assert (document["type"], document["title"]) == (f"urn:buydesk:problem:{code}", DeskError.by_code[code].title)
    assert document["detail"]
    assert document.get("instance") or not is_by_desk
    return document
