"""Secrets of webhooks, and what is signed with them (Standard Webhooks 1.0, https://www.standardwebhooks.com).

No secret is stored: each is derived from a key of the desk, the endpoint's id and the secret's version. So neither the
database nor a backup holds one.
"""

import hashlib
import hmac
import uuid
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime

from standardwebhooks.webhooks import Webhook as Signer

from buydesk import signing_keys
from buydesk.events.model import Secret

PREFIX = "whsec_"
_FINGERPRINT_BYTES = 8


class WebhookKeys:
    """The desk's keys for secrets: new secrets are derived from the first, those of before still from the others."""

    def __init__(self, texts: Sequence[str]) -> None:
        raw = [signing_keys.to_bytes(text, signing_keys.KEY_BYTES) for text in texts]
        self._by_fingerprint = {_fingerprint(each): each for each in raw}

    @property
    def fingerprints(self) -> list[str]:
        """What the keys are called, which tells nothing of them."""
        return list(self._by_fingerprint)

    @property
    def current(self) -> str:
        """The fingerprint of the key for new secrets."""
        return self.fingerprints[0]

    def secret(self, webhook_id: uuid.UUID, secret: Secret) -> str:
        """The secret as text; raises KeyError for one of a key that the desk does not have any more.

        HMAC-SHA256 as the expansion of HKDF (RFC 5869, section 2.3) to one block: the keys are random throughout.
        """
        info = f"buydesk webhook {webhook_id} {secret.version}".encode()
        derived = hmac.digest(self._by_fingerprint[secret.key], info + b"\x01", hashlib.sha256)
        return PREFIX + b64encode(derived).decode()

    def headers(
        self, webhook_id: uuid.UUID, secrets: Sequence[Secret], message: str, at: datetime, body: bytes
    ) -> Mapping[str, str]:
        """The headers of a message, with a signature by each secret that is valid `at` the moment of its sending;
        raises KeyError."""
        newest, *older = secrets
        valid = [newest, *(each for each in older if each.ends_at is not None and each.ends_at > at)]
        known = [each for each in valid if each is newest or each.key in self._by_fingerprint]
        texts = [self.secret(webhook_id, each) for each in known]
        return {
            "webhook-id": message,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": " ".join(Signer(text).sign(message, at, body.decode()) for text in texts),
        }


def _fingerprint(key: bytes) -> str:
    return hashlib.sha256(b"buydesk webhook key " + key).digest()[:_FINGERPRINT_BYTES].hex()
