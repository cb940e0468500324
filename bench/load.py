"""Load, and what it has found: wrk for throughput, bench.latency for latency at a fixed rate."""

import json
import secrets
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.processes import PYTHON, BenchFailed, children_cpu_seconds, output_of

HERE = Path(__file__).parent
BEYOND_SECONDS_MAX = 60.0  # that a load may take longer than it should
WRK_MISSING = "wrk is not on the PATH, and makes the load: apt install wrk"
ANSWER_SECONDS_MAX = 10  # wrk counts a request that takes longer as an error
DIGITS_OF_SEQUENCE = 8  # of a key; see order.lua


@dataclass(frozen=True)
class Run:
    """What one run of wrk has found. `wrong` counts what is no proper answer: other statuses, errors, time-outs."""

    answers: int
    seconds: float
    wrong: dict[str, int]
    load_cpu_seconds: float
    keys: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        return self.answers / self.seconds

    @property
    def errors(self) -> int:
        return sum(self.wrong.values())


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the moment a request should have been sent to its whole answer, and the keys answered."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    keys: list[str]


def wrk_path() -> str:
    """Where wrk is; raises BenchFailed telling how to get it."""
    found = shutil.which("wrk")
    if found is None:
        raise BenchFailed(WRK_MISSING)
    return found


async def orders(url: str, connections: int, seconds: float, directory: Path, shown: Sequence[str] = ()) -> Run:
    """New orders as fast as they are answered, each with a key of its own; `keys` are those of the 201s. `shown` are
    the keys by which clients are known, in turn."""
    seed = secrets.randbelow(2**31 - 1) + 1
    tail = str(uuid.uuid4())[DIGITS_OF_SEQUENCE:]
    file = directory / f"keys{tail}"
    run = await _wrk(url, connections, seconds, "order.lua", str(seed), tail, str(file), *shown)
    keys = file.read_text().split()
    file.unlink()
    return replace(run, keys=keys)


async def replays(url: str, connections: int, seconds: float, keys: Sequence[str], directory: Path) -> Run:
    """The orders that have these keys, again and again."""
    file = directory / "replayed"
    file.write_text("\n".join(keys))
    return await _wrk(url, connections, seconds, "replay.lua", str(file))


async def quotes(url: str, connections: int, seconds: float, directory: Path) -> Run:
    """Quotes as fast as they are answered; `keys` are their tokens."""
    file = directory / "quotes"
    run = await _wrk(url, connections, seconds, "quote.lua", str(file))
    return replace(run, keys=file.read_text().split())


async def orders_by_quote(url: str, connections: int, seconds: float, tokens: Sequence[str], directory: Path) -> Run:
    """Orders by these quotes, each once; `keys` are the ids of the quotes that were executed."""
    given, file = directory / "tokens", directory / "executed"
    given.write_text("\n".join(tokens))
    run = await _wrk(url, connections, seconds, "quoted.lua", str(given), str(file))
    return replace(run, keys=file.read_text().split())


async def pages(url: str, connections: int, seconds: float, lowest: int, highest: int, *shown: str) -> Run:
    """Pages of ten at random places, leaving out `lowest` to `highest` newer orders; `shown` is a key, if any."""
    seed = secrets.randbelow(2**31)
    return await _wrk(url, connections, seconds, "page.lua", str(seed), str(lowest), str(highest), *shown)


async def latency(url: str, rate: int, warmup_seconds: float, seconds: float, directory: Path) -> Latency:
    """Orders at a fixed rate per second, whatever the answers do; raises BenchFailed when one is not a 201."""
    file = directory / f"latency-{secrets.token_hex(4)}"
    command = (*PYTHON, "bench.latency", url, str(rate), str(warmup_seconds), str(seconds), str(file))
    printed = await output_of(command, warmup_seconds + seconds + BEYOND_SECONDS_MAX)
    keys = file.read_text().split()
    file.unlink()
    return Latency(**json.loads(printed), keys=keys)


async def _wrk(url: str, connections: int, seconds: float, script: str, *arguments: str) -> Run:
    spent = children_cpu_seconds()
    options = ("-t1", f"-c{connections}", f"-d{seconds:g}s", f"--timeout={ANSWER_SECONDS_MAX}s")
    command = (wrk_path(), *options, "-s", str(HERE / script), url, "--", *arguments)
    printed = await output_of(command, seconds + BEYOND_SECONDS_MAX)
    spent = children_cpu_seconds() - spent
    [told] = [line.removeprefix("bench ") for line in printed.splitlines() if line.startswith("bench ")]
    found = json.loads(told)
    wrong = {name: found[name] for name in ("others", "socket", "timeout")}
    if not found["answers"]:
        raise BenchFailed(f"wrk got no answer from {url}: {printed}")
    return Run(found["answers"], found["seconds"], wrong, spent)
