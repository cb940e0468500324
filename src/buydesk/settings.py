"""Settings: one frozen object, read once from the environment.

Four variables have the names everybody uses (DATABASE_URL, REDIS_URL, PRICE_FEED, SENTRY_DSN later); all others start
with BUYDESK_. One that is unknown, or has no sense, fails at start by its name.
"""

import os
import secrets
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from buydesk.errors import CannotStart

PREFIX = "BUYDESK_"
PORTS = {
    "create_buy_order": 8001,
    "api_cache_proxy": 8002,
    "api_updater": 8003,
    "db_proxy": 8010,
    "fetch_buy_orders": 8020,
    "health_check": 8050,
}

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def _shared_name(name: str) -> AliasChoices:
    # pydantic-settings does not put its prefix before an alias.
    return AliasChoices(name)


class Settings(BaseSettings):
    """Every time-out, pool and limit of the desk; times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", populate_by_name=True, env_ignore_empty=True
    )

    database_url: SecretStr | None = Field(
        None, validation_alias=_shared_name("DATABASE_URL"), description="The PostgreSQL database (only db_proxy)."
    )
    redis_url: SecretStr | None = Field(
        None,
        validation_alias=_shared_name("REDIS_URL"),
        description="Redis for prices and reports; without it the service that owns them keeps them in memory.",
    )
    price_feed: Literal["sandbox", "live"] = Field(
        "sandbox", validation_alias=_shared_name("PRICE_FEED"), description="Recorded prices, or the exchanges'."
    )

    host: str = Field("127.0.0.1", description="The address all services listen on.")
    port_offset: int = Field(0, ge=0, le=50_000, description="Added to every port.")
    data_dir: Path | None = Field(None, description="Where the sandbox keeps its position (and `up` everything).")
    internal_token: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_urlsafe(32)),
        description="What the services show each other; `up` makes one, `serve` requires it.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least that is logged.")
    supervisor_fd: int | None = Field(None, description="Set by `up --separate`: the service ends when it closes.")

    create_buy_order_url: str = Field("", description="Where the service is; by default on this host.")
    api_cache_proxy_url: str = Field("", description="Where the service is; by default on this host.")
    api_updater_url: str = Field("", description="Where the service is; by default on this host.")
    db_proxy_url: str = Field("", description="Where the service is; by default on this host.")
    fetch_buy_orders_url: str = Field(
        "", description="Where the service is, for clients too (`Location`); by default on this host."
    )
    health_check_url: str = Field("", description="Where the service is; by default on this host.")

    order_seconds_max: Seconds = Field(8, description="An order is answered within this time, one way or another.")
    orders_waiting_max: Count = Field(10_000, description="Orders that may wait for a batch; more are `overloaded`.")
    batch_orders_max: Annotated[int, Field(ge=1, le=1000)] = Field(500, description="Orders in one batch.")
    resend_pause_seconds: Seconds = Field(0.2, description="Between two sendings of a batch of unknown outcome.")
    statement_seconds_max: Seconds = Field(2, description="PostgreSQL ends a statement of ours after this time.")
    lock_seconds_max: Seconds = Field(1, description="The longest wait for the exposure row.")
    database_connections_max: Annotated[int, Field(ge=2, le=100)] = Field(6, description="Pool of one db_proxy.")
    connect_seconds_max: Seconds = Field(2, description="The longest wait for a connection, to any server.")
    remote_seconds_max: Seconds = Field(3, description="The longest wait for another service's answer (not placing).")
    remote_connections_max: Count = Field(64, description="Connections one service keeps to another.")

    feed_interval_seconds: Seconds = Field(15, description="How often prices are asked for.")
    price_ttl_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        60, description="How long a price may be used after it was observed."
    )
    price_refresh_seconds: Seconds = Field(1, description="How often create_buy_order looks at the price board.")
    source_seconds_max: Seconds = Field(5, description="The longest wait for a price source.")
    replay_speed: Annotated[float, Field(ge=0, le=10_000)] = Field(1, description="Historic minutes a minute.")
    kraken_url: str = Field("https://api.kraken.com", description="Kraken's address, or a mirror's.")

    report_interval_seconds: Seconds = Field(60, description="How often a service says that it is alive.")
    reports_kept_max: Count = Field(10_000, description="Reports kept; the oldest go.")
    reports_waiting_max: Count = Field(1000, description="Reports that may wait to be sent; more are dropped, counted.")
    drain_seconds_max: Seconds = Field(10, description="The longest a service takes to finish what it accepted.")

    @model_validator(mode="after")
    def _fill_urls(self) -> Self:
        for service, port in PORTS.items():
            if not getattr(self, f"{service}_url"):
                # Frozen to everybody else; a default that depends on other settings has to be filled in here.
                self.__dict__[f"{service}_url"] = f"http://127.0.0.1:{port + self.port_offset}"
        return self

    def port(self, service: str) -> int:
        """The port the service listens on."""
        return PORTS[service] + self.port_offset

    def url(self, service: str) -> str:
        """Where the other services find the service, without a trailing slash."""
        return str(getattr(self, f"{service}_url")).rstrip("/")


def variable(field: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[field].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else PREFIX + field.upper()


def read_settings(**overrides: object) -> Settings:
    """The settings of this process: environment first, then what the command line says.

    Raises CannotStart naming every variable that is unknown or has no sense; never its value, which may be a secret.
    """
    known = {variable(field) for field in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise CannotStart(f"unknown setting {', '.join(unknown)}: unset it, or see `buydesk serve --help` for names")
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as error:
        raise CannotStart("; ".join(_complaint(each["loc"], each["msg"]) for each in error.errors())) from None


def _complaint(location: tuple[int | str, ...], message: str) -> str:
    field = str(location[0])
    name = variable(field) if field in Settings.model_fields else field
    return f"{name}: {message[0].lower()}{message[1:]}"
