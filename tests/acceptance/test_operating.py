"""What an operator reads and sets up agrees with the desk: alerts, what is scraped, secrets, drawings, commands."""

import re
import stat
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from buydesk.errors import CannotStart
from buydesk.settings.model import Settings, variable
from buydesk.settings.reading import read_settings
from buydesk.settings.secrets import OWNERS, SECRET_CHARS_MIN
from buydesk.topology import PORTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
RULES = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text(encoding="utf-8")
DRAWN = {*PORTS, "PostgreSQL", "Redis", "exchanges", "clients"}


def test_every_alert_has_its_paragraph() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES)
    explained = re.findall(r"^### (\w+)\n\n[A-Z]", PAGE.partition("## Alerts")[2], re.MULTILINE)
    assert alerts == explained


def test_every_alert_is_tested_to_fire() -> None:
    tested = (ROOT / "deploy" / "prometheus" / "rules_test.yml").read_text(encoding="utf-8")
    fired = re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n", tested)
    assert sorted(fired) == sorted(re.findall(r"- alert: (\w+)", RULES))


def test_every_service_is_scraped_and_missed() -> None:
    config = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    scraped = re.findall(r"names: \[(\w+)\], type: A, port: (\d+)", config)
    assert {service: int(port) for service, port in scraped} == PORTS
    assert set(re.findall(r'absent\(up\{job="buydesk", service="(\w+)"\}\)', RULES)) == set(PORTS)


def test_in_production_nothing_but_the_proxy_has_a_published_port() -> None:
    override = (ROOT / "deploy" / "compose.production.yaml").read_text(encoding="utf-8")
    base = (
        (ROOT / "compose.yaml").read_text(encoding="utf-8").partition("\nservices:\n")[2].partition("\nnetworks:\n")[0]
    )
    blocks = re.split(r"^  (?=\w+:$)", base, flags=re.MULTILINE)[1:]
    published = {block.partition(":")[0] for block in blocks if "\n    ports:" in block}
    assert published >= {"postgres", "api_redis", "health_check", "prometheus", "pg_admin"}
    # These start only by their own name, and then on this machine only.
    asked_for = {"locust", "pg_admin", "prometheus"}
    kept = {
        service
        for service in published
        if not re.search(rf"^  {service}: .*ports: !reset \[\]", override, re.MULTILINE)
    }
    assert kept == asked_for
    assert re.findall(r"^    ports:$", override, re.MULTILINE) == ["    ports:"]
    assert all("profiles: [" in block for block in blocks if block.partition(":")[0] in asked_for - {"pg_admin"})
    assert re.search(r"^  pg_admin:\n    profiles: \[admin\]$", override, re.MULTILINE)


def test_production_sells_live_and_takes_neither_default_secrets_nor_orders_without_keys() -> None:
    override = (ROOT / "deploy" / "compose.production.yaml").read_text(encoding="utf-8")
    common = override.partition("x-production: &desk\n")[2].partition("\nservices:\n")[0]
    told = dict(re.findall(r'^    (\w+): "?(\w+)"?(?: #.*)?$', common, re.MULTILINE))
    given = {field: told[variable(field)] for field in Settings.model_fields if variable(field) in told}
    assert given == {
        "price_feed": "live",
        "access": "keys",
        "refuse_default_secrets": "true",
        "idempotency_keys_required": "true",
    }
    for service in PORTS:
        assert re.search(rf"^  {service}: ({{<<: )?\*desk\b", override, re.MULTILINE), service


def secrets_of(directory: Path) -> dict[str, str]:
    """The settings that stand in files of the directory; those that only production has where they are."""
    names = [*OWNERS, "price_keys"]
    found = {field: (directory / field).read_text().strip() for field in names if (directory / field).exists()}
    return found | {"db_proxy_database_url": (directory / "database_url").read_text().strip()}


def test_the_secrets_that_come_along_do_not_start_production() -> None:
    local = secrets_of(ROOT / "deploy" / "secrets")
    assert isinstance(read_settings(**local), Settings)
    for field, secret in (local | {"redis_url": "redis://api_redis:6379/0"}).items():
        with pytest.raises(CannotStart, match=f"{variable(field)} must hold a secret of your own"):
            read_settings(refuse_default_secrets=True, **{field: secret})


def test_in_production_redis_asks_for_the_password_that_those_who_use_it_show(tmp_path: Path) -> None:
    override = (ROOT / "deploy" / "compose.production.yaml").read_text(encoding="utf-8")
    assert "command: *redis_command, secrets: [REDIS_CONF]" in override
    assert "&redis_command [redis-server, /run/secrets/REDIS_CONF, " in override
    for service in OWNERS["redis_url"]:
        assert f"  {service}: {{<<: *desk, environment: *with_redis, secrets: [REDIS_URL], " in override
    assert '&with_redis {<<: *settings, REDIS_URL: ""}' in override  # so that the file counts
    made = tmp_path / "secrets"
    subprocess.run([str(ROOT / "deploy" / "new-secrets"), str(made)], check=True, capture_output=True)  # noqa: S603
    [password] = re.findall(r"^requirepass (\w+)\n$", (made / "redis.conf").read_text())
    assert f"redis://:{password}@api_redis:6379/0" == (made / "redis_url").read_text().strip()


def test_secrets_of_one_s_own_are_made_once_and_start_production(tmp_path: Path) -> None:
    made = tmp_path / "not there yet" / "secrets"
    command = [str(ROOT / "deploy" / "new-secrets"), str(made)]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603  # our own
    secrets = secrets_of(made)
    read_settings(refuse_default_secrets=True, **secrets)
    assert (made / "postgres_password").read_text().strip() in (made / "database_owner_url").read_text()
    assert secrets.keys() == {*OWNERS, "price_keys"}
    assert len(set(secrets.values())) == len(secrets) - 1  # db_proxy's address twice, for itself and for `migrate`
    assert len((made / "pgadmin_password").read_text()) >= SECRET_CHARS_MIN
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    again = subprocess.run(command, check=False, capture_output=True)  # noqa: S603
    assert again.returncode != 0
    assert secrets_of(made) == secrets


def test_the_drawings_name_every_service_and_have_the_same_arrows() -> None:
    drawio = ET.parse(ROOT / "docs" / "architecture.drawio").getroot()  # noqa: S314  # our own
    svg = ET.parse(ROOT / "docs" / "architecture.svg").getroot()  # noqa: S314
    cells = {str(cell.get("id")): cell for cell in drawio.iter("mxCell")}
    assert cells.keys() >= DRAWN
    texts = " ".join(str(text.text) for text in svg.iter("{http://www.w3.org/2000/svg}text"))
    for service, port in PORTS.items():
        assert f"{service} :{port}" in str(cells[service].get("value"))
        assert f"{service} :{port}" in texts
    assert all(name in texts for name in DRAWN)
    arrows = [
        title.text
        for title in svg.iterfind(".//{http://www.w3.org/2000/svg}polyline/{http://www.w3.org/2000/svg}title")
    ]
    edges = [f"{cell.get('source')} to {cell.get('target')}" for cell in cells.values() if cell.get("edge")]
    assert sorted(map(str, arrows)) == sorted(edges)
    assert "](architecture.drawio)" in (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["pg_dump", "pg_restore"])
def test_backup_and_restore_are_the_commands_that_are_tried(command: str) -> None:
    smoke = (ROOT / "deploy" / "smoke").read_text(encoding="utf-8")
    lines = re.findall(rf"^(docker compose exec -T postgres {command} .*?) [<>]", PAGE, re.MULTILINE)
    assert lines
    assert all(line in smoke for line in lines)
