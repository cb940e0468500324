"""Secrets of webhooks: derived, never stored, shown nowhere; and what is signed with them."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook as Library

from buydesk.events.model import Secret
from buydesk.events.signing import WebhookKeys
from buydesk.signing_keys import KEY_BYTES, new_signing_key, to_text
from tests.signatures import valid_signatures

KEY, OTHER = to_text(bytes(range(KEY_BYTES))), new_signing_key()
HOOK = uuid.UUID("5c9f1d1e-7a3b-4c56-9d8e-2f4a6b8c0d1e")
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_secret_is_always_the_same_of_its_key_endpoint_and_version_and_no_other() -> None:
    keys = WebhookKeys([KEY, OTHER])
    first, second = keys.fingerprints
    secret = keys.secret(HOOK, Secret(1, first, None))
    # For ever: clients have it.
    assert secret == "whsec_z7xtnCJ/ghCQS/fSa8EVIjeJlDMfY++McUkq1bR78K0="
    assert WebhookKeys([OTHER, KEY]).secret(HOOK, Secret(1, first, None)) == secret
    others = {
        keys.secret(HOOK, Secret(2, first, None)),
        keys.secret(HOOK, Secret(1, second, None)),
        keys.secret(uuid.uuid4(), Secret(1, first, None)),
    }
    assert len(others | {secret}) == 4
    assert WebhookKeys([OTHER, KEY]).current == second
    with pytest.raises(KeyError):
        WebhookKeys([OTHER]).secret(HOOK, Secret(1, first, None))


def test_fingerprint_and_what_is_printed_tell_nothing_of_a_key() -> None:
    keys = WebhookKeys([KEY])
    assert KEY[:6] not in f"{keys.fingerprints}{keys!r}{keys}"
    assert len(keys.current) == 16


def test_message_is_signed_by_the_secrets_that_are_valid_and_known() -> None:
    keys = WebhookKeys([KEY, OTHER])
    first, second = keys.fingerprints
    secrets = [
        Secret(4, first, None),
        Secret(3, second, NOW + timedelta(hours=1)),
        Secret(2, first, NOW),
        Secret(1, "0" * 16, NOW + timedelta(hours=1)),
    ]
    headers = keys.headers(HOOK, secrets, "an-event.placed", NOW, b'{"a":"\xc3\xa9"}')
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("an-event.placed", "1769860800")
    signed = [valid_signatures(keys.secret(HOOK, each), headers, b'{"a":"\xc3\xa9"}') for each in secrets[:3]]
    assert signed == [1, 1, 0]
    assert len(headers["webhook-signature"].split(" ")) == 2
    assert valid_signatures(keys.secret(HOOK, secrets[0]), headers, b'{"a":"e"}') == 0


def test_library_of_the_standard_verifies_it() -> None:
    keys = WebhookKeys([KEY])
    secret = Secret(1, keys.current, None)
    headers = keys.headers(HOOK, [secret], "x", datetime.now(UTC), b'{"a":1}')
    assert Library(keys.secret(HOOK, secret)).verify(b'{"a":1}', dict(headers)) == {"a": 1}
