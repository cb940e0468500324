"""What a child of `up` reads from its environment is what `up` was given, whatever kind of setting it is."""

from typing import Any

import pytest

from buydesk.runtime.up import environment
from buydesk.settings.model import Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.settings.secrets import KEY_PAIRS, OWNERS, SECRET_KEYS, TOKENS
from buydesk.signing_keys import DEFAULT_SIGNING_KEY, public_key
from tests.builders import SIGNING_KEY

OTHERS = {
    "database_url": "postgresql://u:p%40@h:1,i:2/d?target_session_attrs=read-write",
    "redis_url": "redis://:p@h:1/0",
    "price_feed": "live",
    "sentry_dsn": "https://k@sentry.example/1",
    "host": "::",
    "access": "proxy",
    "anonymous_rate": "off",
    "hosts": "a.example,b.example",
    "proxies": "10.0.0.0/8,2001:db8::/32",
    "data_dir": "/d x",
    "log_level": "DEBUG",
    "supervisor_fd": 7,
    "markup_bp": "EUR:50,GBP:75",
    **dict.fromkeys(SECRET_KEYS, SIGNING_KEY),
    **dict.fromkeys(KEY_PAIRS.values(), f"{public_key(SIGNING_KEY)},{public_key(DEFAULT_SIGNING_KEY)}"),
    "extra_sources": "okx,bitvavo",
    "currencies": "GBP,EUR",
    "sandbox_fault": "one-currency",
    "reports_kept_max": 3999,
    "price_sources_min": 3,
    "db_proxy_database_url": "postgresql://db_proxy:p@h/d",
    **dict.fromkeys(TOKENS, "one,two"),
}


def not_default(name: str) -> Any:
    """A value of the setting that is not its default, and fits beside the others' defaults."""
    if name in OTHERS:
        return OTHERS[name]
    if name.endswith("_url"):
        return "https://elsewhere.example:1/x"
    if name.endswith("_unchanged_seconds_max"):
        return 7.25
    default = Settings.model_fields[name].default
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, int) else default * 1.1  # which has no short decimal text


NOT_DEFAULT = [(name, not_default(name)) for name in Settings.model_fields]


@pytest.mark.parametrize(("name", "value"), [*NOT_DEFAULT, ("markup_bp", 50), ("anonymous_rate", 7)])
def test_a_child_reads_the_settings_that_it_is_given_as_they_are(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable(field), raising=False)
    given = Settings(**{name: value})
    assert getattr(given, name) != Settings.model_fields[name].get_default(call_default_factory=False)
    for service in OWNERS.get(name, ("create_buy_order",)):
        for field in Settings.model_fields:
            monkeypatch.delenv(variable(field), raising=False)
        for each, text in environment(given, service).items():
            monkeypatch.setenv(each, text)
        found = read_settings()
        assert found.model_fields_set == {name}
        made = {each for each, field in Settings.model_fields.items() if field.default_factory and each != name}
        assert found.model_dump(exclude=made) == given.model_dump(exclude=made)
