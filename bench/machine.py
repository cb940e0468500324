"""The machine in words, as far as figures depend on it; nothing that names it or its owner."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.processes import BenchFailed, output_of

SYNCED_WRITES = 500
BLOCK_BYTES = 8192
PACKAGES = ("uvicorn", "uvloop", "httptools", "asyncpg", "msgspec", "fastapi", "sqlalchemy")


def describe(directory: Path) -> dict[str, object]:
    """Processor, memory, the disk below the directory, system and versions."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "sync_p50_ms": round(_sync_p50_ms(directory), 3),
        "system": f"{_system()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


async def commit() -> str:
    """The commit that is measured, with a + when files differ from it; "unknown" outside a checkout."""
    try:
        revision = (await output_of(("git", "rev-parse", "--short=12", "HEAD"), 10)).strip()
        changes = await output_of(("git", "status", "--porcelain", "--untracked-files=no"), 10)
    except (BenchFailed, FileNotFoundError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+" if changes.strip() else "")


def today() -> str:
    """The date, in UTC."""
    return datetime.now(UTC).date().isoformat()


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _system() -> str:
    for line in _lines(Path("/etc/os-release")):
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.system()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _sync_p50_ms(directory: Path) -> float:
    """How long a written page takes to be on disk: what no commit can be faster than."""
    path = directory / "synced"
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    taken = []
    sync = getattr(os, "fdatasync", os.fsync)
    try:
        for number in range(SYNCED_WRITES):
            started = time.perf_counter()
            os.pwrite(file, bytes(BLOCK_BYTES), number * BLOCK_BYTES)
            sync(file)
            taken.append(time.perf_counter() - started)
    finally:
        os.close(file)
        path.unlink()
    return statistics.median(taken) * 1000
