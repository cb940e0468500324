"""Signatures of price records: Ed25519 (RFC 8032) over a record's canonical JSON (RFC 8785)."""

from collections.abc import Collection

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec.structs import replace

from buydesk.prices.documents import record_document
from buydesk.prices.model import PriceRecord, Signature
from buydesk.signing_keys import KEY_BYTES, public_key, to_bytes, to_text

SIGNATURE_BYTES = 64
# So that a signature of anything else, should the same key ever sign it, is none of a price.
_CONTEXT = b"buydesk price record\n"


class Signer:
    """Signs price records with a signing key (`signing_keys`)."""

    def __init__(self, signing_key: str) -> None:
        self._secret = Ed25519PrivateKey.from_private_bytes(to_bytes(signing_key, KEY_BYTES))
        self._public_key = public_key(signing_key)

    def sign(self, record: PriceRecord) -> PriceRecord:
        """The record with its signature, which covers everything in it."""
        value = to_text(self._secret.sign(_signed_bytes(record)))
        return replace(record, signature=Signature(self._public_key, value, record.expires_at))


def signature_discrepancy(record: PriceRecord, keys: Collection[str]) -> str:
    """Why the record is not proven to come from an owner of one of these public keys, "" when it is.

    It may end earlier than what was signed; in all else it has to be the same.
    """
    signature = record.signature
    if signature is None:
        return "the record is not signed"
    if signature.key not in keys:
        return f"the record is signed with the key {signature.key}, which this desk does not accept"
    if record.expires_at > signature.expires_at:
        return "the record ends later than its signature allows"
    try:
        key = Ed25519PublicKey.from_public_bytes(to_bytes(signature.key, KEY_BYTES))
        value = to_bytes(signature.value, SIGNATURE_BYTES)
        key.verify(value, _signed_bytes(replace(record, expires_at=signature.expires_at)))
    except (InvalidSignature, ValueError):
        return "the signature is not one of this record"
    return ""


def _signed_bytes(record: PriceRecord) -> bytes:
    # There are texts, whole numbers and nulls only: sorted and without blanks they are canonical already.
    return _CONTEXT + msgspec.json.encode(record_document(replace(record, signature=None)), order="sorted")
