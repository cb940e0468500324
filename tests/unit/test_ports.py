"""Ports and what a process needs to serve them: the limit of open files."""

import resource

import pytest

from buydesk.http.listeners import OPEN_FILES, allow_connections

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (1024, 4096, 4096),
        (1024, 1_000_000, OPEN_FILES),
        (1024, UNLIMITED, OPEN_FILES),
        (100_000, 1_000_000, None),
        (4096, 4096, None),
        (UNLIMITED, UNLIMITED, None),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_allowed_and_never_lowered(
    soft: int, hard: int, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    allow_connections()
    assert limits == ([] if wanted is None else [(wanted, hard)])
