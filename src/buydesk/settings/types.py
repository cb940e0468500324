"""Types of settings: what each value has to be."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import ip_network
from typing import Annotated, Literal, TypeVar, get_args
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from buydesk import hosts, signing_keys
from buydesk.money import CURRENCIES_TEXT, MARKUP_BP_MAX, Currency, parse_currency, parse_markup

# The sources of the live feed: those that are always asked, and those that are asked where a setting names them.
LIVE_SOURCES = ("bitfinex", "bitstamp", "coinbase", "gemini", "kraken")
EXTRA_SOURCES = ("bitvavo", "okx")
# An old one and a new one, while they are changed.
TOKENS_MAX = 2
# Webhooks keep the key that their secret is of until they rotate it, so that there may be several.
WEBHOOK_KEYS_MAX = 10
COUNT_MAX = 1_000_000
# A quote of fewer seconds nobody could use, and one of more would be an option on the price, for nothing.
QUOTE_SECONDS_MIN = 5
QUOTE_SECONDS_MAX = 900
DATABASE_SCHEMES = ("postgresql://", "postgres://")
# Parameters that other programs read from such an address. asyncpg does not: it would send them to the server, which
# refuses them in words that fit nothing that was written here.
# fmt: off
OTHER_DRIVERS_PARAMETERS = frozenset((
    "channel_binding", "connect_timeout", "connection_limit", "fallback_application_name", "gssdelegation",
    "gssencmode", "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval",
    "load_balance_hosts", "pgbouncer", "pool_timeout", "replication", "require_auth", "requirepeer", "requiressl",
    "scram_client_key", "scram_server_key", "sslcertmode", "sslcompression", "sslcrldir", "sslkeylogfile", "sslsni",
))
# fmt: on
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
# One @ at the most, and no other way to read where the password ends: what a driver takes for a host, a port or a
# database, and shows, is one. PostgreSQL may have several hosts.
_HOST = r"(\[[0-9A-Za-z:.%]+\]|[^:/?#@\[\],]*)(:[0-9]{1,5})?"
_SERVER_URL = re.compile(rf"[a-z]+://([^@/?#\[\]]*@)?{_HOST}(,{_HOST})*(/[^@?#]*)?(\?[^@#\"'\\]*)?")
_DSN = re.compile(r"https?://[^:@/?#\[\]]+(:[^:@/?#\[\]]*)?@[^@?#]+/[0-9]+", re.ASCII)


def _http_url(url: str) -> str:
    """An address to put a path behind; the empty one stands for the default."""
    if "@" in url:  # it is shown to clients and in logs
        raise ValueError("must be an address without a user or a password, and without an @")
    if url and not (hosts.is_http_url(url) and _is_visible(url) and not {"?", "#"} & set(url)):
        raise ValueError("must be an http:// or https:// address with a host, without a query")
    return url


def _is_visible(text: str) -> bool:
    """Whether there are visible ASCII characters only."""
    return all("!" <= char <= "~" for char in text)


def _is_splittable(url: str) -> bool:
    try:
        query = urlsplit(url).query
        if query:
            parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:  # shows what it takes for an IPv6 address, or for a part of the query without a value
        return False
    return True


def not_empty(given: object) -> object:
    if given == "":
        raise ValueError("must not be empty")
    return given


def _public_key(text: str) -> str:
    signing_keys.to_bytes(text, signing_keys.KEY_BYTES)
    return text


T = TypeVar("T")


def _listed(one: Callable[[str], T], what: str) -> BeforeValidator:
    """What is given as text is a list with commas; `one` reads one of them, and raises ValueError."""

    def read(given: object) -> object:
        if not isinstance(given, str):
            return given
        try:
            return tuple(one(each.strip()) for each in given.split(","))
        except ValueError:
            raise ValueError(f"must be {what}, separated by commas") from None

    return BeforeValidator(read)


def _extra_source(text: str) -> str:
    if text not in EXTRA_SOURCES:
        raise ValueError(f"is not one of {', '.join(EXTRA_SOURCES)}")
    return text


def _rate(given: object) -> object:
    if given == "off" or (isinstance(given, int | str) and str(given).isdecimal() and 0 < int(given) <= COUNT_MAX):
        return given if given == "off" else int(str(given))
    raise ValueError(f"must be a number of requests a minute, from 1 to {COUNT_MAX}, or off")


def _markup(given: object) -> object:
    """Basis points for every currency, or by currency."""
    if not isinstance(given, int | str):
        return given
    try:
        if ":" not in str(given):
            return parse_markup(str(given))
        parts = [each.strip().partition(":") for each in str(given).split(",")]
        by_currency = {parse_currency(code): parse_markup(text) for code, _, text in parts}
        if len(by_currency) < len(parts):
            raise ValueError("a currency is given twice")
    except ValueError:
        raise ValueError(
            f"must be basis points from 0, below which the desk would sell under the market, to {MARKUP_BP_MAX}: "
            "of all currencies (50), or by currency, each once (EUR:50,GBP:75)"
        ) from None
    return by_currency


Access = Literal["open", "proxy", "keys"]
SandboxFault = Literal[
    "source-down", "outlier", "disagree", "stale", "garbage", "frozen", "one-currency", "crash", "jump", "swapped"
]
SANDBOX_FAULTS: tuple[SandboxFault, ...] = get_args(SandboxFault)
Seconds = Annotated[float, Field(gt=0, le=86_400)]
QuoteSeconds = Annotated[int, Field(ge=QUOTE_SECONDS_MIN, le=QUOTE_SECONDS_MAX)]
Count = Annotated[int, Field(ge=1, le=COUNT_MAX)]
RateOrOff = Annotated[int | Literal["off"], BeforeValidator(_rate)]
BasisPoints = Annotated[int, Field(ge=1, le=10_000)]
_MarkupBp = Annotated[int, Field(ge=0, le=MARKUP_BP_MAX)]
Markup = Annotated[_MarkupBp | Mapping[Currency, _MarkupBp], NoDecode, BeforeValidator(_markup)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
PublicKeys = Annotated[
    tuple[str, ...],
    NoDecode,
    _listed(_public_key, f"public keys as `buydesk secrets` shows them ({signing_keys.KEY_BYTES} bytes as base64url)"),
]
Currencies = Annotated[
    tuple[Currency, ...], Field(min_length=1), NoDecode, _listed(parse_currency, f"currencies: {CURRENCIES_TEXT}")
]
ExtraSources = Annotated[
    tuple[str, ...], NoDecode, _listed(_extra_source, f"names of exchanges, of {' and '.join(EXTRA_SOURCES)}")
]
HostNames = Annotated[
    tuple[str, ...], NoDecode, _listed(hosts.host_name, "host names without ports (IP addresses need no name)")
]
Networks = Annotated[
    tuple[hosts.Network, ...], NoDecode, _listed(ip_network, "IP addresses, or networks such as 10.0.0.0/8")
]


def tokens(setting: SecretStr) -> tuple[str, ...]:
    """The tokens, or keys, of a setting: the first one is shown, all of them are taken."""
    return tuple(setting.get_secret_value().split(","))


def _secret(check: Callable[[str], object]) -> AfterValidator:
    """A secret; `check` raises ValueError for a text that cannot be one."""

    def checked(given: SecretStr) -> SecretStr:
        check(given.get_secret_value())
        return given

    return AfterValidator(checked)


def _check_tokens(text: str) -> None:
    each = text.split(",")
    if len(each) > TOKENS_MAX or not all(token and _is_visible(token) for token in each):
        raise ValueError("must be a token of visible ASCII characters, or two of them with a comma between")


def _check_webhook_keys(text: str) -> None:
    each = text.split(",")
    if len(each) > WEBHOOK_KEYS_MAX or len(set(each)) < len(each):
        raise ValueError(f"must be at most {WEBHOOK_KEYS_MAX} keys, each once, separated by commas")
    for key in each:
        signing_keys.to_bytes(key, signing_keys.KEY_BYTES)


def _check_server_url(text: str, schemes: tuple[str, ...]) -> None:
    """Raises ValueError unless every driver reads the address in the same way."""
    if not text.startswith(schemes):
        raise ValueError(f"must start with {' or '.join(schemes)}")
    if not (_is_visible(text) and _SERVER_URL.fullmatch(text) and _is_splittable(text)):
        raise ValueError(
            f"must be an address such as {schemes[0]}HOST:PORT/NAME, with USER:PASSWORD@ before the host where "
            "needed, the password's special characters percent-encoded (@ is %40, / is %2F, ? is %3F, # is %23)"
        )


def _check_database_url(text: str) -> None:
    _check_server_url(text, DATABASE_SCHEMES)
    foreign = sorted(OTHER_DRIVERS_PARAMETERS & {name for name, _ in parse_qsl(urlsplit(text).query)})
    if foreign:
        raise ValueError(f"has parameters that are not for the driver here: leave out {', '.join(foreign)}")


def _check_sentry_dsn(text: str) -> None:
    if not (_is_visible(text) and _DSN.fullmatch(text) and hosts.is_http_url(text)):
        raise ValueError("must be as Sentry gives it: https://KEY@HOST/PROJECT")


Tokens = Annotated[SecretStr, _secret(_check_tokens)]
DatabaseUrl = Annotated[SecretStr, _secret(_check_database_url)]
RedisUrl = Annotated[SecretStr, _secret(partial(_check_server_url, schemes=REDIS_SCHEMES))]
SentryDsn = Annotated[SecretStr, _secret(_check_sentry_dsn)]
SigningKey = Annotated[SecretStr, _secret(partial(signing_keys.to_bytes, length=signing_keys.KEY_BYTES))]
WebhookKeys = Annotated[SecretStr, _secret(_check_webhook_keys)]
NotEmpty = Annotated[str, BeforeValidator(not_empty)]
