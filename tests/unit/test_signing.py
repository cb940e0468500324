"""Signatures of price records: only what the owner of an accepted key signed is taken, and as it was signed."""

import json
from base64 import urlsafe_b64decode
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec.structs import fields, replace

from buydesk.http.examples import EXAMPLE_RECORD
from buydesk.money import Currency
from buydesk.prices.documents import record_document, record_from
from buydesk.prices.model import PriceRecord, RejectedQuote, Signature, UnsettledRate
from buydesk.prices.signing import Signer, signature_discrepancy
from buydesk.signing_keys import new_signing_key, public_key, to_bytes, to_text
from tests.builders import SIGNING_KEY, record, signed

KEY = public_key(SIGNING_KEY)
MOMENT = timedelta(microseconds=1)
RECORD = record()
# RFC 8032, section 7.1, test 1.
RFC_SIGNING_KEY = to_text(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
RFC_PUBLIC_KEY = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def test_keys_are_those_of_the_standard() -> None:
    assert to_bytes(public_key(RFC_SIGNING_KEY), 32).hex() == RFC_PUBLIC_KEY
    assert len({new_signing_key() for _ in range(9)}) == 9
    assert len(to_bytes(new_signing_key(), 32)) == 32


@pytest.mark.parametrize(
    "text", ["", "x", KEY[:-1], KEY + "=", KEY + "A", KEY[:-1] + "+", " " + KEY[1:], KEY[:-1] + "ä"]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be 32 bytes as base64url without padding"):
        public_key(text)


def test_of_the_texts_that_decode_to_the_same_bytes_one_is_a_key() -> None:
    last = KEY[-1]
    other = chr(ord(last) + 1)
    assert urlsafe_b64decode(KEY + "=") == urlsafe_b64decode(KEY[:-1] + other + "=")
    with pytest.raises(ValueError, match="must be 32 bytes"):
        to_bytes(KEY[:-1] + other, 32)


def test_signed_record_is_proven_also_after_its_way_as_json() -> None:
    assert signature_discrepancy(RECORD, (KEY,)) == ""
    crossed = record_from(msgspec.json.decode(msgspec.json.encode(record_document(RECORD))))
    assert crossed == RECORD
    assert signature_discrepancy(crossed, ("another", KEY)) == ""


def test_record_that_was_stored_long_ago_is_still_proven() -> None:
    """Its bytes are those of the day it was signed: whatever the code becomes, they have to be made again."""
    stored = (Path(__file__).parents[1] / "data" / "signed_record.json").read_bytes().rstrip()
    old = record_from(msgspec.json.decode(stored))
    assert msgspec.json.encode(record_document(old), order="sorted") == stored
    assert signature_discrepancy(old, (KEY,)) == ""


def test_what_is_signed_can_be_checked_with_other_means() -> None:
    document = record_document(
        signed(replace(RECORD, rejected=(RejectedQuote("sandbox-3", 'gave "nö"\n\x01 answer'),)))
    )
    signature: Any = document.pop("signature")
    document["signature"] = None
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    key = Ed25519PublicKey.from_public_bytes(urlsafe_b64decode(signature["key"] + "="))
    value = urlsafe_b64decode(signature["value"] + "==")
    key.verify(value, b"buydesk price record\n" + canonical.encode())
    with pytest.raises(InvalidSignature):
        key.verify(value, canonical.encode())


def test_record_may_end_earlier_than_it_was_signed_for_and_not_later() -> None:
    shorter = replace(RECORD, expires_at=RECORD.expires_at - timedelta(seconds=30))
    assert signature_discrepancy(shorter, (KEY,)) == ""
    longer = replace(RECORD, expires_at=RECORD.expires_at + MOMENT)
    assert signature_discrepancy(longer, (KEY,)) == "the record ends later than its signature allows"
    assert RECORD.signature is not None
    both = replace(longer, signature=replace(RECORD.signature, expires_at=longer.expires_at))
    assert signature_discrepancy(both, (KEY,)) == "the signature is not one of this record"


def test_whatever_else_is_changed_is_seen() -> None:
    changes: dict[str, Any] = {
        "id": record().id,
        "as_of": RECORD.as_of + MOMENT,
        "feed": "live",
        "rates_e8": dict(RECORD.rates_e8) | {Currency.GBP: 1},
        "used": RECORD.used[1:],
        "rejected": (RejectedQuote("sandbox-3", "is down"),),
        "replayed_from": RECORD.as_of,
        "rule": None,
        "decided_at": RECORD.as_of + MOMENT,
        "bids_e8": {},
        "asks_e8": {Currency.GBP: 1},
        "missing": {Currency.GBP: "is gone"},
        "unsettled": {Currency.GBP: UnsettledRate(1, "has moved")},
    }
    assert changes.keys() | {"expires_at", "signature"} == {field.name for field in fields(RECORD)}
    for name, value in changes.items():
        changed = replace(RECORD, **{name: value})
        assert signature_discrepancy(changed, (KEY,)) == "the signature is not one of this record", name


def with_signature(**changes: Any) -> Callable[[PriceRecord], PriceRecord]:
    def change(given: PriceRecord) -> PriceRecord:
        assert given.signature is not None
        return replace(given, signature=replace(given.signature, **changes))

    return change


OTHER = Signer(new_signing_key())


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda given: replace(given, signature=None), "the record is not signed"),
        (with_signature(key="mine"), "the record is signed with the key mine, which this desk does not accept"),
        (OTHER.sign, "which this desk does not accept"),
        (with_signature(value="A" * 86), "the signature is not one of this record"),
        (with_signature(value="x"), "the signature is not one of this record"),
        (lambda given: replace(given, signature=record().signature), "is not one of this record"),
    ],
)
def test_what_is_not_signed_by_an_accepted_key_is_doubted(
    change: Callable[[PriceRecord], PriceRecord], doubt: str
) -> None:
    assert signature_discrepancy(change(RECORD), (KEY,)).endswith(doubt)


def test_accepted_key_that_is_none_proves_nothing() -> None:
    no_point = to_text(b"\xff" * 32)
    mine = replace(RECORD, signature=Signature(no_point, to_text(b"\0" * 64), RECORD.expires_at))
    assert signature_discrepancy(mine, (no_point,)) == "the signature is not one of this record"


def test_examples_are_signed() -> None:
    assert signature_discrepancy(EXAMPLE_RECORD, (public_key(RFC_SIGNING_KEY),)) == ""
