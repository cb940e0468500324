import socket
from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import SecretStr

from buydesk.errors import CannotStart
from buydesk.money import Currency
from buydesk.settings import reading as settings_reading
from buydesk.settings.model import PREFIX, Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.settings.secrets import SECRET_KEYS, TOKENS
from buydesk.settings.types import SANDBOX_FAULTS, tokens
from buydesk.signing_keys import DEFAULT_SIGNING_KEY, new_signing_key, public_key
from buydesk.topology import PORTS

HOSTS = ("desk.example.org", "my_desk", "xn--bcher-kva.example")
PROXIES = (ip_network("10.0.0.0/8"), ip_network("192.0.2.7/32"), ip_network("2001:db8::/32"))
SHARED_NAMES = {"DATABASE_URL", "REDIS_URL", "PRICE_FEED", "SENTRY_DSN"}


@pytest.fixture(autouse=True)
def minimal_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable(field), raising=False)


def test_every_setting_is_documented_and_has_a_default() -> None:
    settings = read_settings()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert hasattr(settings, name)
    assert {variable(name) for name in Settings.model_fields if not variable(name).startswith(PREFIX)} == SHARED_NAMES


def test_every_number_has_bounds() -> None:
    schema = Settings.model_json_schema(by_alias=False)["properties"]
    unbounded = {
        name for name, each in schema.items() if each.get("type") in ("integer", "number") and "maximum" not in each
    }
    assert unbounded == set()


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("PRICE_FEED", "live", "price_feed", "live"),
        ("BUYDESK_PORT_OFFSET", "100", "port_offset", 100),
        ("BUYDESK_DATA_DIR", "here/data", "data_dir", Path("here/data")),
        ("BUYDESK_FEED_INTERVAL_SECONDS", "0.5", "feed_interval_seconds", 0.5),
        ("BUYDESK_HOST", "", "host", "127.0.0.1"),
        ("BUYDESK_ACCESS", "proxy", "access", "proxy"),
        ("BUYDESK_ACCESS", "", "access", "open"),
        ("BUYDESK_ANONYMOUS_RATE", "off", "anonymous_rate", "off"),
        ("BUYDESK_ANONYMOUS_RATE", "1", "anonymous_rate", 1),
        ("BUYDESK_ANONYMOUS_RATE", "1000000", "anonymous_rate", 1_000_000),
        ("BUYDESK_ANONYMOUS_RATE", "", "anonymous_rate", 60),
        ("BUYDESK_HOSTS", "Desk.Example.org, my_desk,xn--bcher-kva.example", "hosts", HOSTS),
        ("BUYDESK_HOSTS", "", "hosts", ()),
        ("BUYDESK_PROXIES", "10.0.0.0/8, 192.0.2.7,2001:db8::/32", "proxies", PROXIES),
        ("BUYDESK_PROXIES", "", "proxies", ()),
        ("BUYDESK_MARKUP_BP", "", "markup_bp", 0),
        ("BUYDESK_MARKUP_BP", "50", "markup_bp", 50),
        ("BUYDESK_MARKUP_BP", "5000", "markup_bp", 5000),
        ("BUYDESK_MARKUP_BP", "EUR:50, gbp:0", "markup_bp", {Currency.EUR: 50, Currency.GBP: 0}),
    ],
)
def test_a_setting_comes_from_its_variable(
    name: str, text: str, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    assert variable(field) == name
    assert getattr(read_settings(), field) == value


@pytest.mark.parametrize("field", ["price_feed", "log_level"])
def test_the_command_line_wins_over_the_environment(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = {"price_feed": ("live", "sandbox"), "log_level": ("DEBUG", "ERROR")}[field]
    monkeypatch.setenv(variable(field), there)
    assert getattr(read_settings(**{field: here}), field) == here


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PRICE_FEED", "toy"),
        ("BUYDESK_PORT_OFFSET", "50001"),
        ("BUYDESK_PORT_OFFSET", "x"),
        ("BUYDESK_PRICE_TTL_SECONDS", "0"),
        ("BUYDESK_REPLAY_SPEED", "nan"),
        ("BUYDESK_ORDER_SECONDS_MAX", "inf"),
        ("BUYDESK_PRICE_TLL_SECONDS", "60"),
        ("BUYDESK_DATABASE_URL", "postgresql://nobody"),
        ("DATABASE_URL", "mysql://u:hunter2@db/desk"),
        ("DATABASE_URL", "hunter2"),
        ("REDIS_URL", "http://:hunter2@r/0"),
        ("REDIS_URL", "redis://:my@pass:hunter2/x@r/0"),
        ("REDIS_URL", "redis://:12/hunter2@r/0"),
        ("REDIS_URL", "redis://:12?hunter2@r/0"),
        ("REDIS_URL", "redis://:12#hunter2"),
        ("REDIS_URL", "redis://:hunter2"),
        ("REDIS_URL", "redis://:a[hunter2]b@r/0"),
        ("REDIS_URL", "redis://[hunter2]/0"),
        ("REDIS_URL", "redis://:hunter2\uff0f@r/0"),
        ("REDIS_URL", "redis://:hunter2 @r/0"),
        ("REDIS_URL", "unix:///r.sock?password='hunter2"),
        ("REDIS_URL", "unix:///r.sock?password=hunter2@"),
        ("DATABASE_URL", "postgresql://u:hunter2/x@h/db"),
        ("DATABASE_URL", "postgresql://u:p@hunter2@h/db"),
        ("DATABASE_URL", "postgresql://u:p@h:hunter2/db"),
        ("DATABASE_URL", "postgresql://u@[h/db"),
        ("DATABASE_URL", "postgresql://u:hunter2@h/db?sslmode=require&channel_binding=require"),
        ("SENTRY_DSN", "https://hunter2/x@host/1"),
        ("SENTRY_DSN", "https://k@hunter2@host/1"),
        ("SENTRY_DSN", "https://:hunter2@host/1"),
        ("SENTRY_DSN", "https://hunter2\n@host/1"),
        ("SENTRY_DSN", "hunter2"),
        ("SENTRY_DSN", "https://hunter2@/1"),
        ("SENTRY_DSN", "https://hunter2@host/"),
        ("SENTRY_DSN", "https://host/hunter2"),
        ("SENTRY_DSN", "ftp://hunter2@host/1"),
        ("BUYDESK_DB_PROXY_URL", "db-proxy:8010/hunter2"),
        ("BUYDESK_DB_PROXY_URL", "ftp://hunter2"),
        ("BUYDESK_FETCH_BUY_ORDERS_URL", "http://"),
        ("BUYDESK_FETCH_BUY_ORDERS_URL", "http:///hunter2"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://u:hunter2"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://[hunter2"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://u:hunter2@host"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://hunter2@host"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://u/hunter2@host"),
        ("BUYDESK_HEALTH_CHECK_URL", "http://host:0"),
        ("BUYDESK_KRAKEN_URL", "https://host/?hunter2"),
        ("BUYDESK_KRAKEN_URL", "https://host\n"),
        ("BUYDESK_SANDBOX_FAULT", "hunter2"),
        ("BUYDESK_PRICE_SOURCES_MIN", "1"),
        ("BUYDESK_PRICE_DEVIATION_BP_MAX", "0.5"),
        ("BUYDESK_GEMINI_URL", "gemini"),
        ("BUYDESK_ACCESS", "nobody"),
        ("BUYDESK_ANONYMOUS_RATE", "0"),
        ("BUYDESK_ANONYMOUS_RATE", "-1"),
        ("BUYDESK_ANONYMOUS_RATE", "1000001"),
        ("BUYDESK_ANONYMOUS_RATE", "none"),
        ("BUYDESK_ANONYMOUS_RATE", "1.5"),
        ("BUYDESK_CLIENT_RATE_PER_MINUTE", "off"),
        ("BUYDESK_HOSTS", "desk.example.org:8001"),
        ("BUYDESK_HOSTS", "http://desk.example.org"),
        ("BUYDESK_HOSTS", "desk.example.org."),
        ("BUYDESK_HOSTS", "desk,,desk"),
        ("BUYDESK_HOSTS", "*.example.org"),
        ("BUYDESK_HOSTS", "-desk"),
        ("BUYDESK_HOSTS", "desk-.example.org"),
        ("BUYDESK_HOSTS", "bücher.example"),
        ("BUYDESK_HOSTS", "192.0.2.7"),
        ("BUYDESK_HOSTS", "[::1]"),
        ("BUYDESK_HOSTS", "a" * 64),
        ("BUYDESK_HOSTS", "a." * 127 + "a"),
        ("BUYDESK_PROXIES", "10.0.0.1/8"),
        ("BUYDESK_PROXIES", "10.0.0.0/33"),
        ("BUYDESK_PROXIES", "10.0.0.0/8,"),
        ("BUYDESK_PROXIES", "front"),
        ("BUYDESK_MARKUP_BP", "-1"),
        ("BUYDESK_MARKUP_BP", "5001"),
        ("BUYDESK_MARKUP_BP", "0.5"),
        ("BUYDESK_MARKUP_BP", "EUR:-1"),
        ("BUYDESK_MARKUP_BP", "EUR:50,"),
        ("BUYDESK_MARKUP_BP", "EUR:50,eur:60"),
        ("BUYDESK_MARKUP_BP", "CHF:50"),
        ("BUYDESK_MARKUP_BP", "EUR=50"),
        ("BUYDESK_PLACING_TOKENS", "hunter2\n"),
        ("BUYDESK_READING_TOKENS", "hunter2 and more"),
        ("BUYDESK_REPORTING_TOKENS", "hunter2é"),
        ("BUYDESK_PUBLISHING_TOKENS", "hunter2,"),
        ("BUYDESK_PUBLISHING_TOKENS", "hunter2,hunter3,hunter4"),
        ("BUYDESK_INTERNAL_TOKEN", "hunter2"),
        ("BUYDESK_PRICE_SIGNING_KEY", "hunter2"),
        ("BUYDESK_WEBHOOK_KEYS", "hunter2"),
        ("BUYDESK_WEBHOOK_KEYS", f"{'A' * 43},{'A' * 43}"),
        ("BUYDESK_WEBHOOK_KEYS", ",".join("A" * 41 + each + "A" for each in "ABCDEFGHIJK")),
        ("BUYDESK_PRICE_KEYS", "hunter2"),
        ("BUYDESK_PRICE_KEYS", "A" * 42 + "hunter2"),
        ("BUYDESK_QUOTE_SIGNING_KEY", "hunter2"),
        ("BUYDESK_QUOTE_KEYS", "hunter2"),
        ("BUYDESK_QUOTE_SECONDS", "4"),
        ("BUYDESK_QUOTE_SECONDS_MAX", "901"),
        ("BUYDESK_QUOTE_SECONDS_MAX", "29"),  # less than one gets that asks for nothing else
    ],
)
def test_a_variable_that_is_wrong_or_unknown_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CannotStart, match=name) as refused:
        read_settings()
    assert "\n" not in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("field", ["host", "data_dir", "placing_tokens", "price_signing_key"])
def test_nothing_is_no_value_on_the_command_line(field: str) -> None:
    with pytest.raises(CannotStart, match=f"^{variable(field)}: must"):
        read_settings(**{field: ""})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"order_seconds_max": 10}, "BUYDESK_DRAIN_SECONDS_MAX (10) must be more than BUYDESK_ORDER_SECONDS_MAX (10)"),
        (
            {"statement_seconds_max": 0.5},
            "BUYDESK_LOCK_SECONDS_MAX (1) must be at most BUYDESK_STATEMENT_SECONDS_MAX (0.5)",
        ),
        (
            {"price_ttl_seconds": 15, "quote_age_seconds_max": 10},
            "BUYDESK_FEED_INTERVAL_SECONDS (15) must be less than BUYDESK_PRICE_TTL_SECONDS (15)",
        ),
        (
            {"orders_waiting_max": 499},
            "BUYDESK_BATCH_ORDERS_MAX (500) must be at most BUYDESK_ORDERS_WAITING_MAX (499)",
        ),
        (
            {"quote_age_seconds_max": 60},
            "BUYDESK_QUOTE_AGE_SECONDS_MAX (60) must be less than BUYDESK_PRICE_TTL_SECONDS (60)",
        ),
        (
            {"sandbox_fault": "stale", "price_feed": "live"},
            "BUYDESK_SANDBOX_FAULT (stale) needs PRICE_FEED=sandbox: nothing makes the exchanges misbehave",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(CannotStart) as refused:
        read_settings(**given)
    assert str(refused.value) == said


@pytest.mark.parametrize("fault", SANDBOX_FAULTS)
def test_the_sandbox_may_be_told_to_misbehave(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_SANDBOX_FAULT", fault)
    assert read_settings().sandbox_fault == fault
    with pytest.raises(CannotStart, match=r"^BUYDESK_SANDBOX_FAULT .* needs PRICE_FEED=sandbox"):
        read_settings(price_feed="live")


def test_settings_that_just_fit_together_are_taken() -> None:
    read_settings(
        drain_seconds_max=8.1,
        lock_seconds_max=2,
        feed_interval_seconds=59.9,
        quote_age_seconds_max=59,
        batch_orders_max=500,
        orders_waiting_max=500,
    )


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u@h/db",
        "postgresql:///db?host=/run",
        "postgresql://u:p@[::1]:5432/db",
        "postgresql://u:p@one:5432,two:5433,three/db?target_session_attrs=read-write",
        "postgresql://u:p@%2Frun%2Fpostgresql/db",
        "postgresql://u:a:b!$&'()*+,;=%40^|~@h/db",
        "postgresql://",
    ],
)
def test_a_database_may_be_named_in_every_usual_way(url: str) -> None:
    assert read_settings(database_url=url).database_url == SecretStr(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "rediss://:p@h:6379/0",
        "unix:///run/redis.sock?db=0&password=p",
        "redis://u:a:b%2F%40@[::1]:6379",
        "redis://",
    ],
)
def test_a_redis_may_be_named_in_every_usual_way(url: str) -> None:
    assert read_settings(redis_url=url).redis_url == SecretStr(url)


@pytest.mark.parametrize("dsn", ["https://key@sentry.example/1", "http://key:secret@[::1]:9000/sub/path/42"])
def test_a_sentry_may_be_named_in_every_usual_way(dsn: str) -> None:
    assert read_settings(sentry_dsn=dsn).sentry_dsn == SecretStr(dsn)


def test_all_complaints_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_PORT_OFFSET", "-1")
    monkeypatch.setenv("BUYDESK_LOG_LEVEL", "LOUD")
    with pytest.raises(CannotStart, match=r"BUYDESK_PORT_OFFSET.*BUYDESK_LOG_LEVEL"):
        read_settings()


def test_an_override_that_is_no_setting_is_refused() -> None:
    with pytest.raises(CannotStart, match="colour"):
        read_settings(colour="red")


def test_secrets_show_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@db/desk")
    settings = read_settings(redis_url=SecretStr("redis://:hunter2@r/0"), placing_tokens=SecretStr("hunter2"))
    assert "hunter2" not in repr(settings) + str(settings)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value().endswith("@db/desk")


def test_tokens_and_a_key_are_made_when_none_are_given() -> None:
    made = [getattr(read_settings(), name).get_secret_value() for name in (*TOKENS, *SECRET_KEYS) * 2]
    assert min(map(len, made)) >= 32
    assert len(set(made)) == len(made)


def test_the_first_of_two_tokens_is_the_one_to_show() -> None:
    assert tokens(read_settings(placing_tokens="new,old").placing_tokens) == ("new", "old")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("BUYDESK_INTERNAL_TOKEN", "BUYDESK_PUBLISHING_TOKENS, BUYDESK_PLACING_TOKENS"),
        ("BUYDESK_SOURCE_REST_SECONDS", "BUYDESK_SOURCE_COOLDOWN_SECONDS"),
        ("BUYDESK_SOURCE_REST_SECONDS_MAX", "BUYDESK_SOURCE_COOLDOWN_SECONDS_MAX"),
    ],
)
def test_an_old_name_says_what_is_called_so_now(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.setenv(old, "17")
    with pytest.raises(CannotStart, match=f"instead of {old} use {new}"):
        read_settings()


@pytest.mark.parametrize("what", ["price", "quote"])
def test_what_is_signed_is_taken_from_those_whose_keys_are_given_or_from_oneself(what: str) -> None:
    signing_key, old = new_signing_key(), public_key(new_signing_key())
    own = public_key(signing_key)

    def accepted(**given: str) -> object:
        return getattr(
            read_settings(**{f"{what}_{name}": text for name, text in given.items()}), f"accepted_{what}_keys"
        )

    assert accepted(signing_key=signing_key) == (own,)
    assert accepted(keys=old) == (old,)
    assert accepted(signing_key=signing_key, keys=f"{old}, {own}") == (old, own)
    names = f"BUYDESK_{what.upper()}"
    told = f"{names}_KEYS must have the public key of {names}_SIGNING_KEY, which is {own}"
    with pytest.raises(CannotStart, match=f"^{told}$"):
        accepted(signing_key=signing_key, keys=old)


def test_a_markup_is_of_all_currencies_or_of_those_that_are_named() -> None:
    assert [read_settings(markup_bp=50).markup_bp_of(each) for each in Currency] == [50, 50, 50]
    some = read_settings(markup_bp="GBP:75")
    assert [some.markup_bp_of(each) for each in Currency] == [0, 75, 0]
    assert read_settings(markup_bp={"USD": 5}).markup_bp_of(Currency.USD) == 5


def test_a_negative_markup_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_MARKUP_BP", "-1")
    with pytest.raises(CannotStart, match=r"^BUYDESK_MARKUP_BP: must be .* the desk would sell under the market"):
        read_settings()


@pytest.mark.parametrize("given", [{"USD": -1}, {"USD": 5001}, {"CHF": 1}, -1, 0.5, True])
def test_a_markup_out_of_bounds_is_refused_however_it_is_given(given: object) -> None:
    with pytest.raises(CannotStart, match="BUYDESK_MARKUP_BP"):
        read_settings(markup_bp=given)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings().port_offset = 5  # type: ignore[misc]


def test_all_ports_shift_together() -> None:
    settings = read_settings(port_offset=100)
    assert {service: settings.port(service) - 100 for service in PORTS} == PORTS
    assert settings.url("db_proxy") == "http://127.0.0.1:8110"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8010"),
        ("0.0.0.0", "http://127.0.0.1:8010"),  # noqa: S104
        ("192.0.2.7", "http://192.0.2.7:8010"),
        ("::", "http://127.0.0.1:8010"),
        ("::1", "http://[::1]:8010"),
        ("2001:db8::7", "http://[2001:db8::7]:8010"),
        ("localhost", "http://localhost:8010"),
    ],
)
def test_services_find_each_other_where_they_listen(host: str, url: str) -> None:
    assert read_settings(host=host).url("db_proxy") == url


def test_a_desk_on_all_of_ipv6_only_is_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert read_settings(host="::").url("db_proxy") == "http://[::1]:8010"
    assert read_settings(host="0.0.0.0").url("db_proxy") == "http://127.0.0.1:8010"  # noqa: S104


def test_lists_may_be_given_whole() -> None:
    assert read_settings(hosts=HOSTS, proxies=PROXIES).proxies == PROXIES


BEYOND_LOOPBACK = ["0.0.0.0", "::", "192.0.2.7", "fe80::1%eth0", "::ffff:192.0.2.7", "desk.example.org"]  # noqa: S104


LOOPBACK = ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "localhost", "LocalHost"]


@pytest.mark.parametrize("host", LOOPBACK + BEYOND_LOOPBACK)
@pytest.mark.parametrize("feed", ["sandbox", "live"])
def test_callers_need_keys_but_for_a_sandbox_that_only_this_machine_reaches(feed: str, host: str) -> None:
    harms_nobody = feed == "sandbox" and host in LOOPBACK
    assert read_settings(price_feed=feed, host=host).access == ("open" if harms_nobody else "keys")
    assert read_settings(price_feed=feed, host=host, access="open").access == "open"


KUBERNETES = [
    "BUYDESK_PORT",
    "BUYDESK_PORT_8001_TCP",
    "BUYDESK_PORT_8001_TCP_ADDR",
    "BUYDESK_SERVICE_HOST",
    "BUYDESK_SERVICE_PORT",
    "BUYDESK_SERVICE_PORT_ORDERS",
    "BUYDESK_DB_PROXY_SERVICE_HOST",
    "BUYDESK_DB_PROXY_PORT_8010_TCP_PROTO",
]


@pytest.mark.parametrize("name", KUBERNETES)
def test_what_kubernetes_sets_for_a_service_is_said_to_be_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tcp://10.0.0.7:8001")
    with pytest.raises(
        CannotStart, match=f"^unknown setting {name}: .*{name} for a Service.*enableServiceLinks: false"
    ):
        read_settings()


@pytest.mark.parametrize("name", ["BUYDESK_PORT_OFSET", "BUYDESK_SERVICE", "BUYDESK_PORTS", "BUYDESK_PORT_8001"])
def test_what_kubernetes_does_not_set_is_not_blamed_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(
        CannotStart, match=f"^unknown setting {name}: unset it, or see `buydesk serve --help` for names$"
    ):
        read_settings()


def test_a_service_elsewhere_is_found_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUYDESK_DB_PROXY_URL", "http://db-proxy:8010/")
    settings = read_settings(port_offset=5)
    assert settings.url("db_proxy") == "http://db-proxy:8010"
    assert settings.own_url("db_proxy") == "http://127.0.0.1:8015"


LONG = "a-secret-of-my-own-making"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"placing_tokens": "changeme"}, ["BUYDESK_PLACING_TOKENS"]),
        ({"reporting_tokens": f"{LONG},changeme"}, ["BUYDESK_REPORTING_TOKENS"]),
        ({"database_url": "postgresql://postgres:changeme@h/db"}, ["DATABASE_URL"]),
        ({"database_url": "postgresql://postgres@h/db"}, ["DATABASE_URL"]),
        ({"database_url": f"postgresql://{LONG}@h/db"}, ["DATABASE_URL"]),
        (
            {"reading_tokens": "short", "database_url": "postgres://u:p@h/db"},
            ["BUYDESK_READING_TOKENS", "DATABASE_URL"],
        ),
        ({"price_signing_key": DEFAULT_SIGNING_KEY}, ["BUYDESK_PRICE_SIGNING_KEY"]),
        ({"quote_signing_key": DEFAULT_SIGNING_KEY}, ["BUYDESK_QUOTE_SIGNING_KEY"]),
        ({"quote_keys": public_key(DEFAULT_SIGNING_KEY)}, ["BUYDESK_QUOTE_KEYS"]),
        ({"webhook_keys": f"{'B' * 42 + 'A'},{DEFAULT_SIGNING_KEY}"}, ["BUYDESK_WEBHOOK_KEYS"]),
        ({"price_keys": f"{public_key('B' * 42 + 'A')},{public_key(DEFAULT_SIGNING_KEY)}"}, ["BUYDESK_PRICE_KEYS"]),
    ],
)
def test_default_secrets_are_refused_where_that_is_asked_for(given: dict[str, str], named: list[str]) -> None:
    assert read_settings(**given).refuse_default_secrets is False
    with pytest.raises(CannotStart) as refused:
        read_settings(refuse_default_secrets=True, **given)
    assert [part.split()[0] for part in str(refused.value).split("; ")] == named
    assert LONG not in str(refused.value)


def test_secrets_of_one_s_own_are_taken() -> None:
    url = "postgresql://postgres:" + LONG.replace("-", "%2d") + "@h/db"
    read_settings(refuse_default_secrets=True, placing_tokens=f"{LONG},{LONG}2", database_url=url)


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings_reading, "SECRETS_DIR", tmp_path)
    return tmp_path


def test_a_secret_comes_from_its_file(secrets: Path) -> None:
    (secrets / "DATABASE_URL").write_text("postgresql://u:hunter2@db/desk\n")
    (secrets / "BUYDESK_PLACING_TOKENS").write_text("hunter2\n")
    (secrets / "another program's").write_text("x")
    settings = read_settings()
    assert settings.database_url == SecretStr("postgresql://u:hunter2@db/desk")
    assert settings.placing_tokens == SecretStr("hunter2")
    assert "placing_tokens" in settings.model_fields_set


def test_a_variable_and_the_command_line_win_over_a_secret_file(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "BUYDESK_PLACING_TOKENS").write_bytes(b"\xff")
    monkeypatch.setenv("BUYDESK_PLACING_TOKENS", "here")
    assert read_settings().placing_tokens == SecretStr("here")
    (secrets / "BUYDESK_LOG_LEVEL").write_text("ERROR")
    assert read_settings(log_level="DEBUG").log_level == "DEBUG"


@pytest.mark.parametrize(("name", "content"), [("DATABASE_URL", b"hunter2"), ("BUYDESK_PLACING_TOKENS", b"")])
def test_a_secret_file_without_sense_is_named(name: str, content: bytes, secrets: Path) -> None:
    (secrets / name).write_bytes(content)
    with pytest.raises(CannotStart, match=f"^{name}: must"):
        read_settings()


def test_a_secret_file_that_is_unknown_or_cannot_be_read_is_named(secrets: Path) -> None:
    (secrets / "BUYDESK_PLACING_TOKENS").write_bytes(b"\xff")
    with pytest.raises(CannotStart, match=r"^BUYDESK_PLACING_TOKENS: .* cannot be read: it is no text"):
        read_settings()
    (secrets / "DATABASE_URL").mkdir()
    with pytest.raises(CannotStart, match=r"^DATABASE_URL: .* cannot be read: Is a directory"):
        read_settings()
    (secrets / "BUYDESK_TOKEN").write_text("hunter2")
    with pytest.raises(CannotStart, match=r"^unknown setting BUYDESK_TOKEN:"):
        read_settings()


def test_parameters_of_other_drivers_in_the_database_s_address_are_named() -> None:
    url = "postgresql://u:hunter2@h/db?sslmode=require&channel_binding=prefer&pgbouncer=true&application_name=desk"
    with pytest.raises(CannotStart) as raised:
        read_settings(database_url=url)
    told = "DATABASE_URL: has parameters that are not for the driver here: leave out channel_binding, pgbouncer"
    assert told in str(raised.value)
