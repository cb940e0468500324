"""The files of the containers hold together, as far as that can be told without an engine (`deploy/smoke` has one)."""

import json
import re
import tomllib
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml

from buydesk import __version__
from buydesk.settings.model import Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.settings.secrets import KEY_PAIRS, OWNERS, PROVERS, SECRET_KEYS, TOKENS
from buydesk.signing_keys import DEFAULT_SIGNING_KEY, public_key
from buydesk.topology import PORTS

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
HAPROXY = (ROOT / "deploy" / "haproxy.cfg").read_text()
CADDYFILE = (ROOT / "deploy" / "Caddyfile").read_text()
OTHERS = {"postgres": 5432, "pg_admin": 5050, "api_redis": 6379}
DESK = [name for name, each in SERVICES.items() if str(each.get("image", "")).endswith("buydesk:local}")]
# What is left out of `docker compose up`: another page tells how it is started.
IN_PROFILES = {name for name, each in SERVICES.items() if "profiles" in each}


# How long the desk waits for its clients.
CLIENTS_SECONDS = ("request_seconds_max", "idle_seconds_max", "write_seconds_max")


def default(setting: str) -> float:
    number: float = Settings.model_fields[setting].default
    return number


def published(service: str) -> list[tuple[str, str]]:
    """Address and port outside, port inside."""
    found = []
    for each in SERVICES[service].get("ports", []):
        outside, _, inside = each.rpartition(":")
        found.append((outside, inside))
    return found


def stage(name: str) -> str:
    """The stage of the Dockerfile, without its first line."""
    [found] = [each for each in DOCKERFILE.split("\nFROM ") if each.partition("\n")[0].endswith(f" AS {name}")]
    return found.partition("\n")[2]


def health_check(name: str) -> list[str]:
    """What the stage's health check runs."""
    [command] = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", stage(name).replace("\\\n", ""), re.MULTILINE)
    parts: list[str] = json.loads(command)
    return parts


def test_every_service_of_the_desk_runs_as_itself() -> None:
    assert PORTS.keys() <= set(DESK)
    for service in PORTS:
        assert SERVICES[service]["command"] == ["serve", service]
    assert SERVICES["migrate"]["command"][0] == "migrate"


def test_every_port_is_published_once_as_it_is_and_on_loopback_only() -> None:
    everything = [each for service in SERVICES if service not in IN_PROFILES for each in published(service)]
    expected = {("127.0.0.1:${PORT_PREFIX:-}" + str(port), str(port)) for port in (PORTS | OTHERS).values()}
    assert sorted(everything) == sorted(expected)
    profiled = [each for service in IN_PROFILES for each in published(service)]
    assert all(outside.startswith("127.0.0.1:") for outside, _ in profiled)


def test_services_of_which_there_may_be_several_stand_behind_the_front() -> None:
    hosts = re.findall(r"^listen (\w+)\n +bind :(\d+)\n +server-template host 10 (\w+):(\d+)$", HAPROXY, re.MULTILINE)
    assert len(hosts) == HAPROXY.count("\nlisten ") == HAPROXY.count("bind ")
    for name, port, host, port_of_host in hosts:
        assert host == name
        assert int(port) == int(port_of_host) == PORTS[name]
        assert published(name) == []
    ports = [port for _, port, _, _ in hosts]
    assert [inside for _, inside in published("front")] == ports
    assert f"in ({', '.join(ports)})" in health_check("front")[-1]


def test_the_front_waits_longer_than_the_desk_and_stops_in_time() -> None:
    waits = {name: float(seconds) for name, seconds in re.findall(r"^ +(.+?) (\d+)s\b", HAPROXY, re.MULTILINE)}
    grace_seconds = float(SERVICES["front"]["stop_grace_period"].removesuffix("s"))
    assert default("order_seconds_max") < waits["hard-stop-after"] < grace_seconds
    longest_seconds = max(map(default, ("order_seconds_max", *CLIENTS_SECONDS)))
    assert longest_seconds < min(waits["timeout client"], waits["timeout server"])
    assert SERVICES["front"]["stop_signal"] == "SIGUSR1"  # HAProxy's soft stop
    all_max, of_one_max = map(int, re.findall(r"^ +maxconn (\d+)\b", HAPROXY, re.MULTILINE))
    assert of_one_max < default("connections_max")  # the host's own health check gets in
    assert all_max == of_one_max * HAPROXY.count("\nlisten ")


def test_caddy_waits_longer_than_the_desk_and_lets_go_of_connections_first() -> None:
    waits = {name: float(seconds) for name, seconds in re.findall(r"^\t+(\w+) (\d+)s\b", CADDYFILE, re.MULTILINE)}
    assert default("order_seconds_max") < waits["response_header_timeout"] < waits["write"]
    assert default("request_seconds_max") < waits["read_body"]
    assert waits["keepalive"] < default("idle_seconds_max")
    [connections_max] = re.findall(r"^\t+max_conns_per_host (\d+)\b", CADDYFILE, re.MULTILINE)
    assert int(connections_max) < default("connections_max")  # the service's own health check gets in


def test_the_front_is_told_nothing() -> None:
    assert SERVICES["front"].keys().isdisjoint({"environment", "env_file", "secrets", "volumes", "networks"})


@pytest.mark.parametrize("service", [*DESK, "front"])
def test_a_service_may_do_nothing_that_it_need_not(service: str) -> None:
    it = SERVICES[service]
    assert it["read_only"] is True
    assert it["cap_drop"] == ["ALL"]
    assert it["security_opt"] == ["no-new-privileges:true"]
    grace_seconds = float(it["stop_grace_period"].removesuffix("s"))
    assert grace_seconds > Settings.model_fields["drain_seconds_max"].default


@pytest.mark.parametrize("service", [name for name in SERVICES if name not in IN_PROFILES])
def test_every_service_is_bounded_and_comes_back(service: str) -> None:
    it = SERVICES[service]
    assert it["restart"] == ("no" if service == "migrate" else "unless-stopped")
    assert it["logging"]["options"].keys() == {"max-size", "max-file"}
    assert "mem_limit" in it


def secrets_of(service: str) -> set[str]:
    """The names under which the service finds its secrets."""
    return {each["target"] if isinstance(each, dict) else each for each in SERVICES[service].get("secrets", [])}


@pytest.mark.parametrize("service", PORTS)
def test_each_service_gets_the_secrets_that_are_its_own(service: str) -> None:
    own = {variable(field) for field, owners in OWNERS.items() if service in owners} - {"REDIS_URL"}
    own |= {variable(keys) for keys, provers in PROVERS.items() if service in provers}
    assert secrets_of(service) == own


def test_migrate_is_the_owner_and_knows_the_account_of_db_proxy() -> None:
    assert SERVICES["migrate"]["secrets"] == [
        {"source": "DATABASE_OWNER_URL", "target": "DATABASE_URL"},
        {"source": "DATABASE_URL", "target": "BUYDESK_DB_PROXY_DATABASE_URL"},
        "BUYDESK_PRICE_KEYS",
    ]


@pytest.mark.parametrize("service", DESK)
def test_settings_are_known_and_hold_no_secret(service: str) -> None:
    names = set(SERVICES[service].get("environment", {}))
    known = {variable(field) for field in Settings.model_fields}
    assert names <= known
    assert names.isdisjoint({"DATABASE_URL", *map(variable, OWNERS)} - {"REDIS_URL"})
    assert secrets_of(service) <= known


@pytest.mark.parametrize("service", DESK)
def test_a_desk_in_containers_says_that_it_is_open_and_knows_its_front(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = SERVICES[service]["environment"]
    for field in ("access", "hosts", "proxies"):
        monkeypatch.delenv(variable(field), raising=False)
    for field in ("access", "proxies"):
        monkeypatch.setenv(variable(field), environment[variable(field)])
    settings = read_settings(host="0.0.0.0")  # noqa: S104  # as the image sets it
    assert settings.access == "open"
    for address in ("10.1.2.3", "172.18.0.5", "192.168.16.4"):
        assert any(ip_address(address) in network for network in settings.proxies)
    assert not any(ip_address("8.8.8.8") in network for network in settings.proxies)


def test_only_those_that_own_them_can_reach_the_database_and_redis() -> None:
    in_data = {name for name, each in SERVICES.items() if "data" in each.get("networks", [])} - IN_PROFILES
    assert in_data == {*OTHERS, "migrate", "db_proxy", "api_cache_proxy", "health_check"}
    has_url = {name for name in SERVICES if "DATABASE_URL" in secrets_of(name)}
    assert has_url == {"migrate", "db_proxy"}


def test_the_secrets_that_come_along_are_the_documented_defaults() -> None:
    here = {path.name: path.read_text().strip() for path in (ROOT / "deploy" / "secrets").iterdir()}
    assert here == {
        "postgres_password": "changeme",
        "pgadmin_password": "changeme",
        **dict.fromkeys(TOKENS, "changeme"),
        **dict.fromkeys(SECRET_KEYS, DEFAULT_SIGNING_KEY),
        **dict.fromkeys(KEY_PAIRS.values(), public_key(DEFAULT_SIGNING_KEY)),
        "database_owner_url": "postgresql://postgres:changeme@postgres:5432/buydesk",
        "database_url": "postgresql://db_proxy:changeme@postgres:5432/buydesk",
    }
    files = {each["file"] for each in COMPOSE["secrets"].values()}
    assert files == {"${SECRETS_DIR:-./deploy/secrets}/" + name for name in here}


def test_pgadmin_knows_the_database() -> None:
    [server] = json.loads((ROOT / "deploy" / "pgadmin" / "servers.json").read_text())["Servers"].values()
    environment = SERVICES["postgres"]["environment"]
    assert (server["Host"], server["Port"]) == ("postgres", OTHERS["postgres"])
    assert server["Username"] == environment["POSTGRES_USER"]
    assert server["MaintenanceDB"] == environment["POSTGRES_DB"]


def test_a_plain_up_starts_neither_tests_nor_load() -> None:
    assert "tests" in IN_PROFILES
    started = [each for name, each in SERVICES.items() if name not in IN_PROFILES]
    waited_for = {other for each in started for other in each.get("depends_on", {})}
    assert waited_for.isdisjoint(IN_PROFILES)


@pytest.mark.parametrize("name", ["front", "desk"])
def test_what_runs_has_no_installer_and_runs_as_nobody(name: str) -> None:
    assert f"\nFROM bare AS {name}\n" in DOCKERFILE
    assert "shutil.rmtree" in stage("bare")
    assert re.search(r"^USER \d+:\d+$", stage(name), re.MULTILINE)
    assert "pip install" not in stage(name)


def test_the_last_stage_is_small_and_is_the_desk() -> None:
    last = stage("desk")
    assert DOCKERFILE.endswith(last)
    assert 'ENTRYPOINT ["buydesk"]' in last
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert health_check("desk")[0] in scripts
    assert f"ARG VERSION={__version__}\n" in last
    assert "apt-get" not in last


def test_what_is_installed_is_pinned_by_hash() -> None:
    installing = [line for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines() if re.search(r"pip install", line)]
    assert len(installing) >= 3
    for line in installing:
        assert "--require-hashes" in line or "--no-index" in line
