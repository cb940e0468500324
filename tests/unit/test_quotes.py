"""Quotes: only what the owner of an accepted key signed is one, every character as it was signed. What proves one."""

import random
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from buydesk.errors import QuoteInvalid
from buydesk.money import AMOUNT_CENTS_MAX, MARKUP_BP_MAX, RATE_E8_MAX, SATOSHI_MAX, Currency, satoshi_for
from buydesk.orders.quotes import (
    QUOTE_CHARS_MAX,
    OrderQuote,
    QuoteFigures,
    QuoteSigner,
    discrepancies_of_quote,
    quote_from,
    quote_reader,
)
from buydesk.prices.signing import Signer
from buydesk.signing_keys import KEY_BYTES, new_signing_key, public_key, to_bytes, to_text
from tests.builders import SIGNING_KEY, order_quote, quote_figures, record, settings

KEY = public_key(SIGNING_KEY)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
PRICE = record()
QUOTE = order_quote(PRICE, reference="invoice 7 für Zoë")
SECOND = timedelta(seconds=1)


def read(token: str, *keys: str, livemode: bool = False) -> OrderQuote:
    return quote_from(token, keys or (KEY,), livemode=livemode)


def is_quote(token: str) -> bool:
    try:
        read(token)
    except QuoteInvalid:
        return False
    return True


def test_a_quote_comes_back_as_it_was_signed_and_its_text_is_safe_in_urls() -> None:
    assert read(QUOTE.token) == QUOTE
    assert set(QUOTE.token) <= {*ALPHABET, "."}
    assert len(order_quote(PRICE).token) < 320
    assert quote_reader(settings())(QUOTE.token) == QUOTE


@given(
    st.fixed_dictionaries(
        {
            "reference": st.none()
            | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=128),
            "amount_cents": st.integers(1, AMOUNT_CENTS_MAX),
            "satoshi": st.integers(1, SATOSHI_MAX),
            "rate_e8": st.integers(1, RATE_E8_MAX),
            "markup_bp": st.integers(0, MARKUP_BP_MAX),
            "quoted_at": st.datetimes(timezones=st.just(UTC)),
            "client": st.text("abc-", min_size=1, max_size=32),
        }
    )
)
def test_any_quote_comes_back_as_it_was_signed(figures: dict[str, Any]) -> None:
    signed = QuoteSigner(SIGNING_KEY).sign(replace(quote_figures(PRICE), **figures))
    assert len(signed.token) <= QUOTE_CHARS_MAX
    assert read(signed.token) == signed


# What each member may be changed into.
CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "id": lambda _: uuid.uuid4(),
    "client": lambda _: "another",
    "livemode": lambda livemode: not livemode,
    "currency": lambda _: Currency.USD,
    "reference": lambda _: None,
    "price_id": lambda _: uuid.uuid4(),
}


@pytest.mark.parametrize("member", [field.name for field in fields(QuoteFigures)])
def test_a_member_that_was_changed_makes_it_none(member: str) -> None:
    def changed(value: Any) -> Any:
        if isinstance(value, datetime):
            return value + timedelta(microseconds=1)
        return CHANGES.get(member, lambda number: number + 1)(value)

    other = replace(QUOTE, **{member: changed(getattr(QUOTE, member))})
    forged = QuoteSigner(SIGNING_KEY).sign(QuoteFigures(*(getattr(other, each.name) for each in fields(QuoteFigures))))
    version, key, payload, _ = forged.token.split(".")
    assert is_quote(forged.token) is (member != "livemode")
    assert not is_quote(".".join([version, key, payload, QUOTE.token.rpartition(".")[2]]))


@pytest.mark.parametrize(
    "figures",
    [
        *({name: 0} for name in ("amount_cents", "satoshi", "market_rate_e8", "rate_e8")),
        *({name: 2**63} for name in ("amount_cents", "satoshi", "market_rate_e8", "rate_e8", "markup_bp")),
        {"markup_bp": -1},
        {"quoted_at": datetime(2026, 1, 1)},  # noqa: DTZ001  # what is read of it could not be compared
        {"reference": ""},
        {"reference": "a\n"},
    ],
    ids=str,
)
def test_what_no_desk_would_sign_is_none_whoever_signed_it(figures: dict[str, Any]) -> None:
    """It would fail every order that is stored together with it."""
    assert not is_quote(QuoteSigner(SIGNING_KEY).sign(replace(quote_figures(PRICE), **figures)).token)


def test_every_character_counts() -> None:
    rng = random.Random(1)  # noqa: S311
    for place, was in enumerate(QUOTE.token):
        others = [each for each in ALPHABET + "." if each != was]
        for other in rng.sample(others, 5):
            assert not is_quote(QUOTE.token[:place] + other + QUOTE.token[place + 1 :]), (place, other)
        assert not is_quote(QUOTE.token[:place] + QUOTE.token[place + 1 :])
        assert not is_quote(QUOTE.token[:place] + was + QUOTE.token[place:])


def test_of_the_texts_that_decode_to_the_same_signature_one_is_taken() -> None:
    last = QUOTE.token[-1]
    same_bits = [each for each in ALPHABET if ALPHABET.index(each) // 16 == ALPHABET.index(last) // 16]
    assert [each for each in same_bits if is_quote(QUOTE.token[:-1] + each)] == [last]


@pytest.mark.parametrize(
    "text",
    [
        *("", ".", "...", "q1", "é" * 200, QUOTE.token + "\n", " " + QUOTE.token, QUOTE.token + "=", QUOTE.token * 2),
        QUOTE.token.replace("q1", "q2", 1),
        QUOTE.token.upper(),
        f"q1.{KEY[:8]}.{'A' * QUOTE_CHARS_MAX}.{'A' * 86}",
    ],
)
def test_what_is_no_quote_is_refused(text: str) -> None:
    assert not is_quote(text)


def signed_as(payload: bytes, context: bytes = b"buydesk quote\n") -> str:
    """A token with any payload."""
    signed = f"q1.{KEY[:8]}.{to_text(payload)}"
    secret = Ed25519PrivateKey.from_private_bytes(to_bytes(SIGNING_KEY, KEY_BYTES))
    return f"{signed}.{to_text(secret.sign(context + signed.encode()))}"


def test_quotes_of_a_later_version_are_refused_however_well_they_are_signed() -> None:
    figures = msgspec.structs.astuple(quote_figures(PRICE))
    encode = msgspec.msgpack.Encoder(uuid_format="bytes").encode
    assert is_quote(signed_as(encode(figures)))
    for payload in (b"", b"\xc1", encode([*figures, 1]), encode(figures[:-1]), encode(["x"] * 14), encode({})):
        assert not is_quote(signed_as(payload))
    assert not is_quote(f"q1.{KEY[:8]}.AAAAA.{'A' * 86}")


def test_no_signature_of_a_price_is_one_of_a_quote() -> None:
    payload = msgspec.msgpack.Encoder(uuid_format="bytes").encode(quote_figures(PRICE))
    assert is_quote(signed_as(payload))
    assert not is_quote(signed_as(payload, b"buydesk price record\n"))
    assert not is_quote(signed_as(payload, b""))
    price = Signer(SIGNING_KEY).sign(PRICE)
    assert price.signature is not None
    for value in (payload, b"price"):
        assert not is_quote(f"q1.{KEY[:8]}.{urlsafe_b64encode(value).decode().rstrip('=')}.{price.signature.value}")


def test_a_quote_counts_as_long_as_its_key_is_accepted() -> None:
    old, new = new_signing_key(), new_signing_key()
    keys = public_key(old), public_key(new)
    tokens = [QuoteSigner(each).sign(quote_figures(PRICE)).token for each in (old, new)]
    for token, key in zip(tokens, keys, strict=True):
        assert read(token, key) == read(token, *keys) == read(token, *keys[::-1])
    for token, key in zip(tokens, keys[::-1], strict=True):
        with pytest.raises(QuoteInvalid):
            read(token, key)
    with pytest.raises(QuoteInvalid):
        quote_from(tokens[0], (), livemode=False)


def test_keys_that_begin_alike_are_told_apart() -> None:
    impostor = KEY[:8] + public_key(new_signing_key())[8:]
    assert read(QUOTE.token, impostor, KEY) == QUOTE
    with pytest.raises(QuoteInvalid):
        read(QUOTE.token, impostor)


def test_the_other_mode_s_quote_is_none() -> None:
    with pytest.raises(QuoteInvalid):
        read(QUOTE.token, livemode=True)


def test_a_quote_at_its_price_is_proven() -> None:
    assert list(discrepancies_of_quote(QUOTE, PRICE, timedelta())) == []


UNPROVEN = {
    "names the price": {"price_id": uuid.uuid4()},
    "which is another one": {"price_as_of": PRICE.as_of + SECOND},
    "has livemode True": {"livemode": True},
    "market rate is 20000.01": {
        "market_rate_e8": 2_000_001 * 10**6,
        "rate_e8": 2_000_001 * 10**6,
        "satoshi": satoshi_for(6900, 2_000_001 * 10**6),
    },
    "rate is 20000.00, and its markup makes it 20100.00": {"markup_bp": 50},
    "rate is 19998.00, and its markup makes it 19998.00": {
        "markup_bp": -1,
        "rate_e8": 1_999_800 * 10**6,
        "satoshi": satoshi_for(6900, 1_999_800 * 10**6),
    },
    "bitcoin amount is 0.00345001": {"satoshi": QUOTE.satoshi + 1},
    "when its price was not valid": {"quoted_at": PRICE.expires_at, "expires_at": PRICE.expires_at + SECOND},
    "is of": {"quoted_at": PRICE.as_of - SECOND},
    "is valid from": {"expires_at": QUOTE.quoted_at},
    "until": {"expires_at": QUOTE.quoted_at + timedelta(seconds=901)},
}


@pytest.mark.parametrize(("said", "changes"), UNPROVEN.items())
def test_what_does_not_follow_from_the_price_is_named(said: str, changes: dict[str, Any]) -> None:
    found = list(discrepancies_of_quote(replace(QUOTE, **changes), PRICE, timedelta()))
    assert len(found) == 1
    assert said in found[0]


def test_a_currency_without_a_price_has_no_quote() -> None:
    other = replace(PRICE, rates_e8={Currency.USD: 10**12})
    assert "and the price 0.00" in next(discrepancies_of_quote(QUOTE, other, timedelta()))


def test_clocks_may_differ_by_what_is_allowed() -> None:
    early = replace(QUOTE, quoted_at=PRICE.as_of - SECOND)
    assert list(discrepancies_of_quote(early, PRICE, SECOND)) == []
    assert len(list(discrepancies_of_quote(early, PRICE, SECOND / 2))) == 1
