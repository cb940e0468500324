"""Members of orders and quotes: what a request may have, how each is read, and how it is documented."""

from buydesk.http.members import Member
from buydesk.money import (
    CURRENCIES,
    CURRENCIES_TEXT,
    Currency,
    parse_amount,
    parse_btc,
    parse_currency,
    parse_rate_limit,
)
from buydesk.orders.model import (
    KEY_PATTERN,
    METADATA_BYTES_MAX,
    METADATA_MEMBERS_MAX,
    REFERENCE_CHARS_MAX,
    metadata_text,
    parse_key,
    parse_reference,
)
from buydesk.orders.quotes import QUOTE_CHARS_MAX, QUOTE_PATTERN
from buydesk.reading import LINE_PATTERN, is_text


def _currency(value: object) -> Currency:
    return parse_currency(value if isinstance(value, str) else "")


def _amount_cents(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_amount(value)


def _rate_limit(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError("must be a number, or a number as text")
    return parse_rate_limit(value)


def _least_bitcoin(value: object) -> int | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    if not (satoshi := parse_btc(value)):
        raise ValueError("must be greater than 0")
    return satoshi


def _dry_run(value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _key(value: object) -> str | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    return parse_key(value)


def _token(value: object) -> str:
    if not is_text(value):
        raise ValueError("must be text")
    return value


def _reference(value: object) -> str | None:
    if value is None:
        return None
    if not is_text(value):
        raise ValueError("must be text")
    return parse_reference(value)


def _metadata(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(map(is_text, value.values())):
        raise ValueError("must be an object whose members are text")
    return metadata_text(value)


KEY_SCHEMA = {"type": "string", "pattern": KEY_PATTERN}
_ANY_OTHER_NUMBER = "Any other JSON number of this value in at most 32 characters will do too."
_AMOUNT_RULE = "0 < amount < 1,000,000,000, a whole number of cents."
AMOUNT_TEXT_SCHEMA = {
    "type": "string",
    "pattern": r"^([1-9][0-9]{0,8}(\.[0-9]{1,2})?|0\.(0[1-9]|[1-9][0-9]?))$",
    "description": f"{_AMOUNT_RULE} {_ANY_OTHER_NUMBER}",
    "examples": ["69.00"],
}
_AMOUNT_SCHEMA = {
    "description": _AMOUNT_RULE,
    "oneOf": [
        {"type": "number", "minimum": 0.01, "exclusiveMaximum": 1_000_000_000, "multipleOf": 0.01},
        AMOUNT_TEXT_SCHEMA,
    ],
    "examples": ["69.00"],
}
# In any letter case, but not GBp.
_CODE_PATTERNS = {code: "".join(f"[{letter}{letter.lower()}]" for letter in code) for code in CURRENCIES}
_CODE_PATTERNS["GBP"] = "[Gg][Bb]P|g[Bb]p|Gbp"
_CURRENCY_SCHEMA = {
    "type": "string",
    "pattern": f"^({'|'.join(_CODE_PATTERNS.values())})$",
    "description": f"{CURRENCIES_TEXT}, in any letter case; but `GBp`, which means pence elsewhere, is refused.",
    "examples": ["EUR"],
}
CURRENCY = Member("currency", _currency, _CURRENCY_SCHEMA, is_required=True)
AMOUNT = Member("amount", _amount_cents, _AMOUNT_SCHEMA, is_required=True)
_KEY = Member("client_order_id", _key, KEY_SCHEMA | {"type": ["string", "null"]})
_REFERENCE_SCHEMA = {"type": "string", "minLength": 1, "maxLength": REFERENCE_CHARS_MAX, "pattern": LINE_PATTERN}
REFERENCE = Member("reference", _reference, _REFERENCE_SCHEMA | {"type": ["string", "null"]})
_METADATA_SCHEMA = {
    "type": ["object", "null"],
    "maxProperties": METADATA_MEMBERS_MAX,
    "propertyNames": {"pattern": f"{LINE_PATTERN}|^$"},
    "additionalProperties": {"type": "string", "pattern": f"{LINE_PATTERN}|^$"},
    "description": f"At most {METADATA_BYTES_MAX} bytes as JSON.",
    "examples": [{"shop": "12"}],
}
_METADATA = Member("metadata", _metadata, _METADATA_SCHEMA)
MAX_RATE = Member(
    "max_exchange_rate",
    _rate_limit,
    {
        "description": "The highest `exchange_rate` at which it is placed, with at most 8 decimal places.",
        "oneOf": [
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100_000_000_000},
            {
                "type": "string",
                "pattern": r"^(0\.(?=[0-9]*[1-9])[0-9]{1,8}|[1-9][0-9]{0,10}(\.[0-9]{1,8})?)$",
                "description": _ANY_OTHER_NUMBER,
            },
            {"type": "null"},
        ],
        "examples": ["20700.00"],
    },
)
MIN_BITCOIN = Member(
    "min_bitcoin_amount",
    _least_bitcoin,
    {
        "type": ["string", "null"],
        "pattern": r"^(0\.(?=[0-9]*[1-9])[0-9]{1,8}|[1-9][0-9]{0,11}(\.[0-9]{1,8})?)$",
        "description": "The least `bitcoin_amount` for which it is placed. Not beside `max_exchange_rate`.",
        "examples": ["0.003"],
    },
)
_DRY_RUN = Member(
    "dry_run",
    _dry_run,
    {
        "type": ["boolean", "null"],
        "description": "Whether only to say what would become of the order now: nothing is stored, and no key taken.",
    },
    default=False,
)
MEMBERS = (CURRENCY, AMOUNT, _KEY, REFERENCE, _METADATA, MAX_RATE, MIN_BITCOIN, _DRY_RUN)
_QUOTE_SCHEMA = {
    "type": "string",
    "maxLength": QUOTE_CHARS_MAX,
    "pattern": QUOTE_PATTERN,
    "description": "The token of a quote: the order is what it says.",
}
_QUOTE = Member("quote", _token, _QUOTE_SCHEMA, is_required=True)
MEMBERS_BY_QUOTE = (_QUOTE, _KEY, REFERENCE, _METADATA)
# Documented as if none were needed: an order may come in the body instead.
PARAMETERS = (
    CURRENCY._replace(is_required=False),
    AMOUNT._replace(schema=AMOUNT_TEXT_SCHEMA, is_required=False),
    _KEY._replace(schema=KEY_SCHEMA),
    REFERENCE._replace(schema=_REFERENCE_SCHEMA, description="The client's own: an end customer, or an invoice."),
)
