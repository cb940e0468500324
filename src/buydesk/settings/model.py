"""Settings: one frozen object, read once from the environment (secrets also from files, in containers).

Four variables have the names everybody uses (DATABASE_URL, REDIS_URL, PRICE_FEED, SENTRY_DSN); all others start with
BUYDESK_. One that is unknown, or has no sense by itself or beside the others, fails at start by its name.
"""

import operator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from buydesk import hosts, signing_keys
from buydesk.money import Currency
from buydesk.settings.secrets import KEY_PAIRS, SECRET_CHARS_MIN, TOKENS, new_token
from buydesk.settings.types import (
    EXTRA_SOURCES,
    LIVE_SOURCES,
    Access,
    BasisPoints,
    Count,
    Currencies,
    DatabaseUrl,
    ExtraSources,
    HostNames,
    HttpUrl,
    Markup,
    Networks,
    NotEmpty,
    PublicKeys,
    QuoteSeconds,
    RateOrOff,
    RedisUrl,
    SandboxFault,
    Seconds,
    SentryDsn,
    SigningKey,
    Tokens,
    WebhookKeys,
    not_empty,
    tokens,
)
from buydesk.topology import PORTS

PREFIX = "BUYDESK_"
PORT_OFFSET_MAX = 50_000
PRICE_TTL_SECONDS_MAX = 3600
# One source proves nothing, whatever else is set.
SOURCES_MIN = 2

_RELATIONS = {"more than": operator.gt, "at most": operator.le, "less than": operator.lt}
_RULES = (
    # What was accepted last is still answered in its time.
    ("drain_seconds_max", "more than", "order_seconds_max"),
    # Or waiting for the row would end as a statement that took too long.
    ("lock_seconds_max", "at most", "statement_seconds_max"),
    # Or every price would expire before the next one comes.
    ("feed_interval_seconds", "less than", "price_ttl_seconds"),
    ("quote_age_seconds_max", "less than", "price_ttl_seconds"),
    ("batch_orders_max", "at most", "orders_waiting_max"),
    ("quote_seconds", "at most", "quote_seconds_max"),
)
# Where none are given, of a single process, they are its own.
SharedTokens = Annotated[Tokens, Field(default_factory=lambda: SecretStr(new_token()))]


# Beyond these a price proves little: sources that differ by so much, quotes so wide, or moves that nobody looks at.
_PROVING_BP_MAX = {
    "price_deviation_bp_max": 300,
    "price_spread_bp_max": 300,
    "price_jump_bp_max": 2000,
    "price_anchor_bp_max": 5000,
    "price_old_anchor_bp_max": 8000,
    "price_cross_bp_max": 3000,
}


def _access(given: dict[str, Any]) -> Access:
    """By default, what harms nobody."""
    is_sandbox = given.get("price_feed") == "sandbox"
    return "open" if is_sandbox and hosts.is_loopback(given.get("host", "")) else "keys"


class Settings(BaseSettings):
    """Every time-out, pool and limit of the desk; times in seconds. An alias has no prefix before it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it may be a secret
    )

    database_url: DatabaseUrl | None = Field(
        None, validation_alias=AliasChoices("DATABASE_URL"), description="The PostgreSQL database (only db_proxy)."
    )
    db_proxy_database_url: DatabaseUrl | None = Field(
        None,
        description="The DATABASE_URL of db_proxy, if it has an account of its own: `migrate` makes that account, sets "
        "its password and lets it do what db_proxy does, and nothing else.",
    )
    redis_url: RedisUrl | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_URL"),
        description="Redis for prices, reports and counts of requests; without it the service that owns them keeps "
        "them in memory.",
    )
    price_feed: Literal["sandbox", "live"] = Field(
        "sandbox", validation_alias=AliasChoices("PRICE_FEED"), description="Recorded prices, or the exchanges'."
    )

    sentry_dsn: SentryDsn | None = Field(
        None,
        validation_alias=AliasChoices("SENTRY_DSN"),
        description="Where errors are reported: a Sentry project; needs `buydesk[sentry]`.",
    )

    host: NotEmpty = Field("127.0.0.1", description="The address all services listen on.")
    access: Access = Field(
        default_factory=_access,
        description="Who may call: whoever has a key (`keys`), whoever a proxy in front lets through (`proxy`), or "
        "everybody (`open`). `open` for a sandbox that only this machine reaches, otherwise `keys`.",
    )
    key_cache_seconds: Seconds = Field(2, description="How long a key is kept: revoking it acts within that.")
    key_grace_seconds: Seconds = Field(
        300, description="How long a key that is known is honoured while the ledger does not answer."
    )
    client_rate_per_minute: Count = Field(
        60, description="Orders, reads, and look-ups, each a minute, of a client that has no rate of its own."
    )
    anonymous_rate: RateOrOff = Field(
        60, description="The same for callers without a key, of one address (IPv6: /64); `off` for none."
    )
    hosts: HostNames = Field((), description="Names, beside those without a dot, by which an open desk may be called.")
    proxies: Networks = Field((), description="Proxies (addresses, networks) whose word on callers' addresses counts.")
    port_offset: int = Field(0, ge=0, le=PORT_OFFSET_MAX, description="Added to every port.")
    data_dir: Annotated[Path | None, BeforeValidator(not_empty)] = Field(
        None, description="Where the sandbox keeps its position (and `up` everything)."
    )
    publishing_tokens: SharedTokens = Field(
        description="What api_updater shows api_cache_proxy to publish prices and db_proxy to keep the last ones."
    )
    placing_tokens: SharedTokens = Field(description="What create_buy_order shows db_proxy to place orders.")
    reading_tokens: SharedTokens = Field(description="What fetch_buy_orders shows db_proxy to read orders.")
    processing_tokens: SharedTokens = Field(
        description="What processors show process_buy_orders to settle and cancel orders and to follow the desk's "
        "events, and it shows db_proxy."
    )
    operating_tokens: SharedTokens = Field(
        description="What operate_desk shows db_proxy. It permits nothing without an operator's key beside it."
    )
    counting_tokens: SharedTokens = Field(
        description="What the services that callers call show api_cache_proxy to count requests together."
    )
    reporting_tokens: SharedTokens = Field(description="What the services show health_check when they report.")
    webhook_keys: WebhookKeys = Field(
        default_factory=lambda: SecretStr(signing_keys.new_signing_key()),
        description="What the secrets of webhooks are derived from, as `buydesk secrets` makes it: the first key for "
        "new ones; those behind it, separated by commas, for those that were not rotated since.",
    )
    refuse_default_secrets: bool = Field(
        False,
        description="Whether a secret of less than 16 characters, as defaults are, keeps a service from starting.",
    )
    idempotency_keys_required: bool = Field(
        False,
        description="Whether an order without an Idempotency-Key, which cannot be sent again without harm, is refused.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least that is logged.")
    supervisor_fd: int | None = Field(None, description="Set by `up --separate`: the service ends when it closes.")

    api_cache_proxy_url: HttpUrl = Field("", description="Where the service is; by default on this host.")
    db_proxy_url: HttpUrl = Field("", description="Where the service is; by default on this host.")
    fetch_buy_orders_url: HttpUrl = Field(
        "", description="Where the service is, for clients too (`Location`); by default on this host."
    )
    health_check_url: HttpUrl = Field("", description="Where the service is; by default on this host.")

    order_seconds_max: Seconds = Field(8, description="An order is answered within this time, one way or another.")
    markup_bp: Markup = Field(
        0,
        description="What the desk adds to the market's rate, in 0.01 %, for clients without a markup of their own: of "
        "all currencies (`50`), or by currency (`EUR:50,GBP:75`; none for the others).",
    )
    orders_waiting_max: Count = Field(10_000, description="Orders that may wait for a batch; more are `overloaded`.")
    batch_orders_max: int = Field(500, ge=1, le=1000, description="Orders in one batch.")
    clock_skew_seconds_max: Seconds = Field(10, description="How far the services' and PostgreSQL's clocks may differ.")
    resend_pause_seconds: Seconds = Field(0.2, description="Between two sendings of a batch of unknown outcome.")
    statement_seconds_max: Seconds = Field(2, description="PostgreSQL ends a statement of ours after this time.")
    lock_seconds_max: Seconds = Field(1, description="The longest wait for the exposure row.")
    database_connections_max: Annotated[int, Field(ge=5, le=100)] = Field(
        9,
        description="Connections of one db_proxy: one places orders, one checks, one looks up keys, of the others a "
        "third reads large pages.",
    )
    reads_waiting_max: Count = Field(
        100, description="Reads that may wait for their turn, and as many for large pages; more are `overloaded`."
    )
    read_wait_seconds_max: Seconds = Field(1, description="How long a read may wait; then it is `overloaded`.")
    connect_seconds_max: Seconds = Field(2, description="The longest wait for a connection, to any server.")
    remote_seconds_max: Seconds = Field(3, description="The longest wait for another service's answer (not placing).")
    remote_connections_max: int = Field(
        64, ge=5, le=1_000_000, description="Connections one service keeps to another; reads take all but four of them."
    )

    feed_interval_seconds: Seconds = Field(15, description="How often prices are asked for.")
    price_ttl_seconds: float = Field(
        60, gt=0, le=PRICE_TTL_SECONDS_MAX, description="How long a price may be used after it was observed."
    )
    price_signing_key: SigningKey = Field(
        default_factory=lambda: SecretStr(signing_keys.new_signing_key()),
        description="What api_updater signs prices with, as `buydesk secrets` makes it.",
    )
    price_keys: PublicKeys = Field(
        (), description="Public keys whose prices are taken, separated by commas; by default that of the signing key."
    )
    quote_signing_key: SigningKey = Field(
        default_factory=lambda: SecretStr(signing_keys.new_signing_key()),
        description="What create_buy_order signs quotes with, as `buydesk secrets` makes it.",
    )
    quote_keys: PublicKeys = Field(
        (), description="Public keys whose quotes are taken, separated by commas; by default that of the signing key."
    )
    quote_seconds: QuoteSeconds = Field(30, description="How long a quote is valid that asks for nothing else.")
    quote_seconds_max: QuoteSeconds = Field(60, description="How long a quote may be valid that asks for it.")
    price_history_records_max: Count = Field(6000, description="Price records kept for history; the oldest go.")
    price_refresh_seconds: Seconds = Field(1, description="How often create_buy_order fetches the price.")
    source_seconds_max: Seconds = Field(4, description="The longest wait for a price source.")
    source_cooldown_seconds: Seconds = Field(
        20, description="How long a source that failed three times in a row is not asked at first; doubled each time."
    )
    source_cooldown_seconds_max: Seconds = Field(240, description="The longest pause of a source that keeps failing.")
    source_unchanged_seconds_max: Seconds = Field(120, description="How long a clockless source may repeat itself.")
    bitfinex_unchanged_seconds_max: Seconds | None = Field(None, description="The same for Bitfinex alone.")
    bitvavo_unchanged_seconds_max: Seconds | None = Field(None, description="The same for Bitvavo alone.")
    gemini_unchanged_seconds_max: Seconds | None = Field(None, description="The same for Gemini alone.")
    kraken_unchanged_seconds_max: Seconds | None = Field(None, description="The same for Kraken alone.")
    quote_age_seconds_max: Count = Field(30, description="Older quotes prove no price.")
    price_sources_min: int = Field(
        SOURCES_MIN, ge=SOURCES_MIN, le=len(LIVE_SOURCES + EXTRA_SOURCES), description="Sources that must agree."
    )
    extra_sources: ExtraSources = Field((), description="Exchanges to ask beside the five: bitvavo (euros), okx.")
    price_deviation_bp_max: BasisPoints = Field(100, description="How far apart sources that agree may be, in 0.01 %.")
    price_spread_bp_max: BasisPoints = Field(100, description="How far an ask may lie above its bid, in 0.01 %.")
    price_jump_bp_max: BasisPoints = Field(500, description="A price that moves more must be seen twice, in 0.01 %.")
    price_anchor_bp_max: BasisPoints = Field(2000, description="One that moves more must be confirmed, in 0.01 %.")
    price_old_anchor_bp_max: BasisPoints = Field(4000, description="The same, after more than a day without a price.")
    price_cross_bp_max: BasisPoints = Field(1000, description="The same, against the other currencies.")
    price_limits_wide: bool = Field(False, description="Limits of prices may be so wide that they prove little.")
    currencies: Currencies = Field(tuple(Currency), description="What is sold for; the others are refused.")
    # Faster, one tick of 15 s would now and then move further than a price may jump.
    replay_speed: float = Field(1, ge=0, le=60, description="Historic minutes a minute.")
    sandbox_fault: SandboxFault | None = Field(None, description="How the sandbox's price sources are to misbehave.")
    bitfinex_url: HttpUrl = Field("https://api-pub.bitfinex.com", description="Bitfinex's address, or a mirror's.")
    bitstamp_url: HttpUrl = Field("https://www.bitstamp.net", description="Bitstamp's address, or a mirror's.")
    bitvavo_url: HttpUrl = Field("https://api.bitvavo.com", description="Bitvavo's address, or a mirror's.")
    coinbase_url: HttpUrl = Field("https://api.exchange.coinbase.com", description="Coinbase's address, or a mirror's.")
    gemini_url: HttpUrl = Field("https://api.gemini.com", description="Gemini's address, or a mirror's.")
    kraken_url: HttpUrl = Field("https://api.kraken.com", description="Kraken's address, or a mirror's.")
    okx_url: HttpUrl = Field("https://www.okx.com", description="OKX's address, or a mirror's.")

    request_seconds_max: Seconds = Field(10, description="The head of a request comes within this time, then its body.")
    idle_seconds_max: Seconds = Field(75, description="A connection without a request ends after this time.")
    write_seconds_max: Seconds = Field(20, description="A client has taken its answer within this time.")
    connections_max: Count = Field(5000, description="Connections open to one service; more are `overloaded`.")
    connections_per_address_max: Count = Field(
        1250, description="Connections of one address, unless it is of `BUYDESK_PROXIES`; more are `overloaded`."
    )

    report_interval_seconds: Seconds = Field(60, description="How often a service says that it is alive.")
    report_retry_seconds: Seconds = Field(2, description="Between two tries to send a report that did not get through.")
    # The ceiling: health.DATA_CHARS_MAX says what has to fit where.
    reports_kept_max: int = Field(4000, ge=1, le=4000, description="Verified reports kept; the oldest go.")
    reports_waiting_max: Count = Field(1000, description="Reports that may wait to be sent; more are dropped, counted.")
    drain_seconds_max: Seconds = Field(10, description="The longest a service takes to finish what it accepted.")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        broken = [
            f"{variable(one)} ({getattr(self, one):g}) must be {relation} {variable(other)} ({getattr(self, other):g})"
            for one, relation, other in _RULES
            if not _RELATIONS[relation](getattr(self, one), getattr(self, other))
        ]
        if self.sandbox_fault and self.price_feed == "live":
            broken.append(
                f"{variable('sandbox_fault')} ({self.sandbox_fault}) needs {variable('price_feed')}=sandbox: "
                "nothing makes the exchanges misbehave"
            )
        broken += [
            f"{variable(name)} ({getattr(self, name)}) must be at most {most}, or {variable('price_limits_wide')} true"
            for name, most in _PROVING_BP_MAX.items()
            if getattr(self, name) > most and not self.price_limits_wide
        ]
        # The sandbox has as many as are always asked.
        sources = len(LIVE_SOURCES) + (len(set(self.extra_sources)) if self.price_feed == "live" else 0)
        if self.price_sources_min > sources:
            broken.append(
                f"{variable('price_sources_min')} ({self.price_sources_min}) must be at most the number of sources "
                f"({sources}; {variable('extra_sources')} adds some to the live feed's)"
            )
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @model_validator(mode="after")
    def _accept_own_signatures(self) -> Self:
        for signing_key, keys in KEY_PAIRS.items():
            own, accepted = self._public_key(signing_key), getattr(self, keys)
            if signing_key in self.model_fields_set and accepted and own not in accepted:
                raise ValueError(
                    f"{variable(keys)} must have the public key of {variable(signing_key)}, which is {own}"
                )
        return self

    @model_validator(mode="after")
    def _keep_secrets(self) -> Self:
        secret = {field: min(tokens(getattr(self, field)), key=len) for field in TOKENS}
        for field in ("database_url", "db_proxy_database_url", "redis_url"):
            url = getattr(self, field)
            if url is not None and not url.get_secret_value().startswith("unix:"):  # where files have owners
                secret[field] = unquote(urlsplit(url.get_secret_value()).password or "")
        weak = [variable(field) for field in secret if len(secret[field]) < SECRET_CHARS_MIN]
        default = signing_keys.DEFAULT_SIGNING_KEY
        for signing_key, keys in KEY_PAIRS.items():
            if getattr(self, signing_key).get_secret_value() == default:
                weak.append(variable(signing_key))
            if signing_keys.public_key(default) in getattr(self, keys):
                weak.append(variable(keys))
        if default in tokens(self.webhook_keys):
            weak.append(variable("webhook_keys"))
        if self.refuse_default_secrets and weak:
            detail = f"must hold a secret of your own, of at least {SECRET_CHARS_MIN} characters"
            raise ValueError("; ".join(f"{each} {detail}" for each in weak))
        return self

    @property
    def accepted_price_keys(self) -> tuple[str, ...]:
        """The public keys whose prices may be published, sold and stored."""
        return self.price_keys or (self._public_key("price_signing_key"),)

    @property
    def accepted_quote_keys(self) -> tuple[str, ...]:
        """The public keys whose quotes are sold by."""
        return self.quote_keys or (self._public_key("quote_signing_key"),)

    def _public_key(self, signing_key: str) -> str:
        return signing_keys.public_key(getattr(self, signing_key).get_secret_value())

    def markup_bp_of(self, currency: Currency) -> int:
        """The desk's own markup in a currency, in basis points."""
        return self.markup_bp if isinstance(self.markup_bp, int) else self.markup_bp.get(currency, 0)

    @property
    def is_beyond_loopback(self) -> bool:
        """Whether other machines may reach the services that run here."""
        return not hosts.is_loopback(self.host)

    def unchanged_seconds_max(self, source: str) -> float:
        """For how long a source that tells no time may give the same answer."""
        own: float | None = getattr(self, f"{source}_unchanged_seconds_max", None)
        return self.source_unchanged_seconds_max if own is None else own

    def port(self, service: str) -> int:
        """The port the service listens on."""
        return PORTS[service] + self.port_offset

    def url(self, service: str) -> str:
        """Where the other services find the service, without a trailing slash."""
        return (getattr(self, f"{service}_url") or self.own_url(service)).rstrip("/")

    def own_url(self, service: str) -> str:
        """Where this host reaches the service when it runs here, without a trailing slash."""
        return f"http://{hosts.reachable(self.host)}:{self.port(service)}"


def variable(field: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[field].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else PREFIX + field.upper()
