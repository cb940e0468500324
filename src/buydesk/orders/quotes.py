"""Quotes of orders: what an order would be, which the desk holds itself to until the quote expires.

Nothing is stored of a quote but its price record. The client keeps all of it, as a text that the desk has signed
(Ed25519, RFC 8032), its token: `q1.KEY.PAYLOAD.SIGNATURE`. KEY are the first characters of the public key, PAYLOAD is
the members of `QuoteFigures` as a MessagePack array; both PAYLOAD and SIGNATURE are base64url without padding.
"""

import re
import uuid
from base64 import urlsafe_b64decode
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timedelta
from functools import lru_cache, partial
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec.structs import asdict

from buydesk.errors import QuoteExpired, QuoteInvalid
from buydesk.money import (
    AMOUNT_CENTS_MAX,
    MARKUP_BP_MAX,
    RATE_E8_MAX,
    SATOSHI_MAX,
    Currency,
    format_btc,
    format_rate,
    sale_rate,
    satoshi_for,
)
from buydesk.prices.model import PriceRecord
from buydesk.reading import LINE_PATTERN
from buydesk.settings.model import Settings
from buydesk.settings.types import QUOTE_SECONDS_MAX
from buydesk.signing_keys import KEY_BYTES, public_key, to_bytes, to_text
from buydesk.times import format_time

# The longest reference takes 4 bytes a character, each 3 of which take 4 in the token.
QUOTE_CHARS_MAX = 1200
QUOTE_PATTERN = r"^q1\.[A-Za-z0-9_-]{8}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{86}$"
SIGNATURE_BYTES = 64
_VERSION = "q1"
_KEY_CHARS = 8
_TEXT = re.compile(QUOTE_PATTERN.strip("^$"), re.ASCII)
# So that a signature of anything else, should the same key ever sign it, is none of a quote.
_CONTEXT = b"buydesk quote\n"
_REFUSAL = "The text is no quote of this desk, was changed, or is of a key that the desk has given up since."


_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class QuoteFigures(msgspec.Struct, frozen=True, gc=False, array_like=True, forbid_unknown_fields=True):
    """What a quote says: to whom, what the order would be, at which price, and from when until when the desk sells so.

    A token of one version has these members in this order for ever.
    """

    id: uuid.UUID
    client: str
    livemode: bool
    currency: Currency
    amount_cents: Annotated[int, msgspec.Meta(ge=1, le=AMOUNT_CENTS_MAX)]
    satoshi: Annotated[int, msgspec.Meta(ge=1, le=SATOSHI_MAX)]
    market_rate_e8: Annotated[int, msgspec.Meta(ge=1, le=RATE_E8_MAX)]
    markup_bp: Annotated[int, msgspec.Meta(ge=0, le=MARKUP_BP_MAX)]
    rate_e8: Annotated[int, msgspec.Meta(ge=1, le=2 * RATE_E8_MAX)]
    price_id: uuid.UUID
    price_as_of: _Moment
    quoted_at: _Moment
    expires_at: _Moment
    reference: Annotated[str, msgspec.Meta(pattern=LINE_PATTERN.replace("$", r"\Z"))] | None


class OrderQuote(QuoteFigures, frozen=True, gc=False, array_like=True):
    """A quote with the token that proves it."""

    token: str


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(QuoteFigures)


class QuoteSigner:
    """Signs quotes with a signing key (`signing_keys`)."""

    def __init__(self, signing_key: str) -> None:
        self._secret = Ed25519PrivateKey.from_private_bytes(to_bytes(signing_key, KEY_BYTES))
        self._prefix = f"{_VERSION}.{public_key(signing_key)[:_KEY_CHARS]}."

    def sign(self, figures: QuoteFigures) -> OrderQuote:
        """The quote with its token."""
        signed = self._prefix + to_text(_encoder.encode(figures))
        signature = self._secret.sign(_CONTEXT + signed.encode())
        return OrderQuote(**asdict(figures), token=f"{signed}.{to_text(signature)}")


def quote_from(token: str, keys: Collection[str], *, livemode: bool) -> OrderQuote:
    """The quote of a token; raises QuoteInvalid unless the owner of one of these public keys signed every character of
    it, as a quote of a desk in this mode. Nothing of it is read before that is known."""
    parts = _TEXT.fullmatch(token) if len(token) <= QUOTE_CHARS_MAX else None
    if parts is None:
        raise QuoteInvalid(_REFUSAL)
    _, key, payload, signature = token.split(".")
    signed = _CONTEXT + token.rpartition(".")[0].encode()
    if not any(_is_signed(signed, signature, each) for each in keys if each.startswith(key)):
        raise QuoteInvalid(_REFUSAL)
    encoded = urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    try:
        figures = _decoder.decode(encoded)
    except ValueError as error:  # of a later version, or of a thief of the key: what no quote says would fail a batch
        raise QuoteInvalid(_REFUSAL) from error
    if figures.livemode != livemode or _encoder.encode(figures) != encoded:
        raise QuoteInvalid(_REFUSAL)
    return OrderQuote(**asdict(figures), token=token)


def quote_reader(settings: Settings) -> Callable[[str], OrderQuote]:
    """What reads the quotes that a desk of these settings takes; see `quote_from`."""
    return partial(quote_from, keys=settings.accepted_quote_keys, livemode=settings.price_feed == "live")


def _is_signed(signed: bytes, signature: str, key: str) -> bool:
    try:
        _public_key(key).verify(to_bytes(signature, SIGNATURE_BYTES), signed)
    except (InvalidSignature, ValueError):  # the latter of a text that is not the one for its bytes
        return False
    return True


@lru_cache(maxsize=16)
def _public_key(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(to_bytes(key, KEY_BYTES))


def expired(quote: QuoteFigures) -> QuoteExpired:
    """The refusal to sell by a quote that has expired."""
    text = format_time(quote.expires_at)
    return QuoteExpired(f"The quote could be used until {text}: ask for a new one.", expires_at=text)


def discrepancies_of_quote(quote: QuoteFigures, record: PriceRecord, clock_skew: timedelta) -> Iterator[str]:
    """What of the quote does not follow from its price record; nothing means that it is proven.

    `clock_skew` is how far the clock that dated the quote may be behind the one that dated the price.
    """
    if (quote.price_id, quote.price_as_of) != (record.id, record.as_of):
        yield f"it names the price {quote.price_id} of {format_time(quote.price_as_of)}, which is another one"
    if quote.livemode != (record.feed == "live"):
        yield f"it has livemode {quote.livemode}, and its price is of the {record.feed} feed"
    market_rate_e8 = record.rates_e8.get(quote.currency, 0)
    if quote.market_rate_e8 != market_rate_e8:
        yield f"its market rate is {format_rate(quote.market_rate_e8)}, and the price {format_rate(market_rate_e8)}"
    rate_e8 = sale_rate(quote.market_rate_e8, quote.markup_bp)
    if quote.rate_e8 != rate_e8 or quote.markup_bp < 0:
        yield f"its rate is {format_rate(quote.rate_e8)}, and its markup makes it {format_rate(rate_e8)}"
    if (satoshi := satoshi_for(quote.amount_cents, quote.rate_e8)) != quote.satoshi:
        yield f"its bitcoin amount is {format_btc(quote.satoshi)}, and its amount makes it {format_btc(satoshi)}"
    if not record.made_at - clock_skew <= quote.quoted_at < record.expires_at:
        yield f"it is of {format_time(quote.quoted_at)}, when its price was not valid"
    if not timedelta() < quote.expires_at - quote.quoted_at <= timedelta(seconds=QUOTE_SECONDS_MAX):
        yield f"it is valid from {format_time(quote.quoted_at)} until {format_time(quote.expires_at)}"
