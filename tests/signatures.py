"""Signatures of webhooks as an endpoint verifies them: written from the text of Standard Webhooks 1.0, with nothing of
the desk in it or of the library that signs for it."""

import base64
import hashlib
import hmac
from collections.abc import Mapping


def valid_signatures(secret: str, headers: Mapping[str, str], body: bytes) -> int:
    """How many of the signatures are of this secret, in whose text the key stands in Base64 behind `whsec_`."""
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    assert 24 <= len(key) <= 64
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return headers["webhook-signature"].split(" ").count(expected)
