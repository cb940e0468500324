"""Keys' texts: what one consists of, and that what is none is told at once."""

import hashlib
import math
import re
import string
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buydesk.clients.keys import KEY_PATTERN, SECRET_CHARS, new_key, parse_key_text
from buydesk.clients.model import StoredKey

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
# Made once, and checked against another implementation of CRC-32 in base 62.
TEST_KEY = "bd_test_2cKspaWC5SKr2Qr0cqPFjKJGcSoT11a7h6Ud61OghJg"


def stored(**given: object) -> StoredKey:
    fields: dict[str, object] = {"scopes": ["orders:read"], "allow_from": [], "expires_at": None, "revoked_at": None}
    return StoredKey(id="x" * 10, client="shop", digest=bytes(32), last_used_on=None, **(fields | given))  # type: ignore[arg-type]


def test_a_key_is_its_mode_an_id_and_a_secret_that_nobody_guesses() -> None:
    keys = [new_key(livemode=livemode) for livemode in (False, True) for _ in range(50)]
    assert len({key.id for key in keys}) == len({key.text for key in keys}) == 100
    assert SECRET_CHARS * math.log2(62) >= 160
    for key in keys:
        assert key.text.startswith(f"bd_{'live' if key.livemode else 'test'}_{key.id}")
        assert key.digest == hashlib.sha256(key.text.encode()).digest()
        assert parse_key_text(key.text) == key
        assert re.fullmatch(KEY_PATTERN, key.text)


def test_secret_scanners_are_told_what_keys_look_like() -> None:
    page = Path(__file__).parents[2] / "docs" / "security.md"
    assert f"For secret scanners: `{KEY_PATTERN}`." in page.read_text(encoding="utf-8")


def test_a_key_of_before_is_one_for_ever() -> None:
    assert parse_key_text(TEST_KEY).id == "2cKspaWC5S"


@given(st.integers(0, len(TEST_KEY) - 1), st.sampled_from(string.digits + string.ascii_letters))
def test_a_character_that_is_wrong_is_told_by_the_checksum(place: int, char: str) -> None:
    text = TEST_KEY[:place] + char + TEST_KEY[place + 1 :]
    if text == TEST_KEY:
        assert parse_key_text(text)
    else:
        with pytest.raises(ValueError, match="is no key"):
            parse_key_text(text)


@pytest.mark.parametrize(
    "text", ["", "bd_test_", TEST_KEY[:-1], TEST_KEY + "0", TEST_KEY.upper(), " " + TEST_KEY, TEST_KEY + "\n", "\u0660"]
)
def test_what_is_not_written_as_a_key_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        parse_key_text(text)


def test_a_key_is_valid_until_it_is_revoked_or_ends() -> None:
    assert stored().is_valid(NOW)
    assert not stored(revoked_at=NOW).is_valid(NOW)
    ends = stored(expires_at=NOW + timedelta(seconds=1))
    assert ends.is_valid(NOW)
    assert not ends.is_valid(NOW + timedelta(seconds=1))


@pytest.mark.parametrize(
    ("allow_from", "address", "taken"),
    [
        ([], "192.0.2.7", True),
        ([], None, True),
        (["192.0.2.0/24", "2001:db8::/32"], "192.0.2.7", True),
        (["192.0.2.0/24", "2001:db8::/32"], "2001:db8::1", True),
        (["192.0.2.0/24"], "192.0.3.1", False),
        (["192.0.2.0/24"], "2001:db8::1", False),
        (["192.0.2.0/24"], None, False),
    ],
)
def test_a_key_is_taken_from_its_networks_only(allow_from: list[str], address: str | None, taken: bool) -> None:
    assert stored(allow_from=allow_from).is_taken_from(ip_address(address) if address else None) is taken


def test_a_scope_of_a_later_version_permits_nothing() -> None:
    assert stored(scopes=["orders:read", "orders:paint"]).caller.scopes == {"orders:read"}
