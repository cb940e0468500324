"""Keys that price records and quotes are signed with (Ed25519, RFC 8032), as text: base64url without padding
(RFC 4648).

A signing key is its 32 random bytes and a secret; a public key is what everybody may know.
"""

import secrets
from base64 import b64decode, urlsafe_b64encode
from functools import lru_cache

# cryptography takes a while to import, and `buydesk --help` needs none of it.

KEY_BYTES = 32
# What comes along for local use, as "changeme" does: everybody knows it.
DEFAULT_SIGNING_KEY = "A" * 43


def new_signing_key() -> str:
    """A new signing key."""
    return to_text(secrets.token_bytes(KEY_BYTES))


@lru_cache(maxsize=8)
def public_key(signing_key: str) -> str:
    """The public key of a signing key; raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    secret = Ed25519PrivateKey.from_private_bytes(to_bytes(signing_key, KEY_BYTES))
    return to_text(secret.public_key().public_bytes_raw())


def to_text(raw: bytes) -> str:
    """The bytes as base64url without padding."""
    return urlsafe_b64encode(raw).decode().rstrip("=")


def to_bytes(text: str, length: int) -> bytes:
    """The bytes, `length` of them, from the one text that stands for them; raises ValueError for any other."""
    try:
        raw = b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if len(raw) != length or to_text(raw) != text:
        raise ValueError(f"must be {length} bytes as base64url without padding")
    return raw
