"""The health check of a container asks what runs in it, and only a 200 is good."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from buydesk import topology
from buydesk.runtime import probe

SERVE = "/opt/buydesk/bin/python\0/opt/buydesk/bin/buydesk\0serve\0db_proxy\0"

Runs = Callable[[str], None]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Says what process 1 is."""

    def set_command(command: str) -> None:
        (tmp_path / "cmdline").write_text(command)
        monkeypatch.setattr(probe, "COMMAND_LINE", tmp_path / "cmdline")

    return set_command


class Answering:
    """A server at db_proxy's port that answers as it is told; `asked` is what came."""

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 200 OK\r\n\r\n{}"
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@pytest.fixture
async def answering(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Answering]:
    answering = Answering()
    server = await asyncio.start_server(answering.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setitem(topology.PORTS, "db_proxy", port - 1)
    monkeypatch.setenv("BUYDESK_PORT_OFFSET", "1")
    async with server:
        yield answering


async def test_a_service_that_is_ready_is_healthy(answering: Answering, runs: Runs) -> None:
    runs(SERVE)
    assert await asyncio.to_thread(probe.main) == 0
    [asked] = answering.asked
    assert asked.startswith(b"GET /readyz HTTP/1.1\r\nHost: ")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Service Unavailable no price", b"", b"SSH-2.0"])
async def test_any_other_answer_is_not_healthy_and_is_shown(
    answer: bytes, answering: Answering, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(SERVE)
    answering.answer = answer
    assert await asyncio.to_thread(probe.main) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"port {topology.PORTS['db_proxy'] + 1}: ")
    assert answer.decode() in said


async def test_a_long_answer_is_read_in_part_only(
    answering: Answering, runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(SERVE)
    monkeypatch.setattr(probe, "ANSWER_BYTES_MAX", 20)
    answering.answer = b"HTTP/1.1 503 " + b"x" * 1000
    assert await asyncio.to_thread(probe.main) == 1
    assert len(capsys.readouterr().out) < 80


def test_no_answer_is_not_healthy(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(SERVE)
    monkeypatch.setitem(topology.PORTS, "db_proxy", 1)
    monkeypatch.delenv("BUYDESK_PORT_OFFSET", raising=False)
    assert probe.main() == 1
    assert "refused" in capsys.readouterr().out


def test_a_container_without_a_service_is_not_healthy(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs("/opt/buydesk/bin/python\0/opt/buydesk/bin/buydesk\0migrate\0")
    assert probe.main() == 1
    assert capsys.readouterr().out == "no service runs here\n"
