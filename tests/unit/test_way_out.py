"""Asking an exchange through a proxy that the environment names, with TLS over real TCP; its password stays secret."""

import asyncio
import base64
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp.connector
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from buydesk.backends.sources import EXCHANGES
from buydesk.backends.sources.exchange import ExchangeSource
from buydesk.money import Currency
from buydesk.prices.polling import SourcePoller
from buydesk.settings.model import Settings
from buydesk.times import utc_now
from buydesk.way_out import proxy_for
from tests.exchanges import kraken_answer
from tests.serving import free_port

[KRAKEN] = [exchange for exchange in EXCHANGES if exchange.name == "kraken"]
# Nobody but the proxy knows where it is.
NAME = "exchange.test"
PASSWORD = "hunter2hunter2"
NO_ADDRESS = "the proxy that HTTPS_PROXY names is no http:// address"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def certified(directory: Path) -> tuple[Path, Path]:
    """A certificate of the exchange, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc_now() - timedelta(days=1))
        .not_valid_after(utc_now() + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@pytest.fixture
async def exchange_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Where the exchange listens, with TLS; its certificate is trusted."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=kraken_answer(dict.fromkeys(Currency, ("1", "1"))))

    certificate, key = certified(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


class Proxy:
    """A proxy that knows CONNECT and leads everybody to the exchange, if they have the password."""

    def __init__(self, exchange_port: int) -> None:
        self.asked: list[str] = []
        self.port = 0
        self._exchange_port = exchange_port

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head.partition("\r\n")[0])
        shown = base64.b64encode(f"desk:{PASSWORD}".encode()).decode()
        if f"Proxy-Authorization: Basic {shown}" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            writer.close()
            return
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._exchange_port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_copy(reader, to_writer), _copy(to_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


@pytest.fixture
async def proxy(exchange_port: int) -> AsyncIterator[Proxy]:
    made = Proxy(exchange_port)
    async with made.running():
        yield made


@contextlib.asynccontextmanager
async def polled(url: str = f"https://{NAME}") -> AsyncIterator[SourcePoller]:
    source = ExchangeSource(KRAKEN, url, Settings())
    yield SourcePoller(source, Settings())
    await source.close()


async def test_exchange_is_asked_through_the_proxy_that_the_environment_names(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://desk:{PASSWORD}@127.0.0.1:{proxy.port}")
    async with polled() as source:
        assert [quote.currency for quote in (await source.poll()).quotes] == list(Currency)
    assert proxy.asked == [f"CONNECT {NAME}:443 HTTP/1.1"] * 3


async def test_no_proxy_is_kept_to(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://desk:{PASSWORD}@127.0.0.1:{proxy.port}")
    monkeypatch.setenv("NO_PROXY", "other.test,.test")
    async with polled() as source:
        [rejected] = (await source.poll()).rejected
    assert "no answer (ClientConnectorDNSError)" in rejected.reason
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://desk:{password}x@127.0.0.1:{port}", "the proxy refuses with status 407"),
        ("http://desk:{password}@127.0.0.1:{free_port}", "no answer (ClientProxyConnectionError)"),
        ("http://desk:{password}@127.0.0.1:99999", NO_ADDRESS),
        ("socks5://desk:{password}@127.0.0.1:{port}", NO_ADDRESS),
        ("desk:{password}@127.0.0.1:{port}", NO_ADDRESS),
        ("http://[desk:{password}@", NO_ADDRESS),
    ],
)
async def test_proxy_that_cannot_be_used_is_named_and_its_password_told_nowhere(
    address: str, reason: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", address.format(password=PASSWORD, port=proxy.port, free_port=free_port()))
    with caplog.at_level(logging.DEBUG):
        async with polled() as source:
            said = await source.poll()
    assert [each.reason for each in said.rejected] == [f"gave no quote: {reason}"]
    for told in (repr(said), repr(source.state()), caplog.text):
        assert PASSWORD not in told


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("https://api.kraken.com", "http://secure:1"),
        ("http://mirror.test/kraken", "http://plain:1"),
        ("https://sub.kept.test", None),
        ("http://127.0.0.1:8080", None),
        ("http://localhost", None),
        ("http://[::1]:5", None),
        ("gopher://a.test", None),
        ("", None),
    ],
)
def test_each_address_has_its_way_out(url: str, proxied: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://secure:1")
    monkeypatch.setenv("http_proxy", "http://plain:1")
    monkeypatch.setenv("no_proxy", "kept.test")
    assert proxy_for(url) == proxied
