"""Keys: what their text consists of, and how one is told from what is none before anything is looked up.

A key is `bd_test_` or `bd_live_` and 43 letters and digits: its id (10), its secret (27, of more than 160 random bits)
and the CRC-32 of all before (6). Only the SHA-256 of the whole text is stored: the secret is random enough that nobody
finds one by trying.
"""

import hashlib
import re
import secrets
import string
from typing import NamedTuple
from zlib import crc32

ID_CHARS = 10
SECRET_CHARS = 27
CHECKSUM_CHARS = 6
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_PREFIXES = {False: "bd_test_", True: "bd_live_"}
# For secret scanners too; docs/security.md has it.
KEY_PATTERN = rf"bd_(?:test|live)_[0-9A-Za-z]{{{ID_CHARS + SECRET_CHARS + CHECKSUM_CHARS}}}"
_KEY = re.compile(KEY_PATTERN, re.ASCII)
ID_PATTERN = rf"^[0-9A-Za-z]{{{ID_CHARS}}}$"


class Key(NamedTuple):
    """A key as it is shown, once: `digest` is what is stored of its `text`."""

    text: str
    id: str
    livemode: bool
    digest: bytes


def new_key(*, livemode: bool) -> Key:
    """A key that nobody knows yet."""
    body = _PREFIXES[livemode] + "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARS + SECRET_CHARS))
    return parse_key_text(body + _checksum(body))


def parse_key_text(text: str) -> Key:
    """The key; raises ValueError for what is none: it is not written as one, or its checksum is wrong."""
    if not _KEY.fullmatch(text):
        raise ValueError("is no key")
    body, checksum = text[:-CHECKSUM_CHARS], text[-CHECKSUM_CHARS:]
    if _checksum(body) != checksum:
        raise ValueError("is no key: its checksum is wrong")
    prefix = len(_PREFIXES[False])
    livemode = text.startswith(_PREFIXES[True])
    return Key(text, text[prefix : prefix + ID_CHARS], livemode, hashlib.sha256(text.encode()).digest())


def _checksum(body: str) -> str:
    number, digits = crc32(body.encode()), ""
    for _ in range(CHECKSUM_CHARS):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits
