"""What was measured: all samples, what was proved, and the targets they are held against."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.proof import Proof


@dataclass(frozen=True)
class Measure:
    """Something that is measured, in words, and the unit of its samples."""

    title: str
    unit: str


@dataclass(frozen=True)
class Target:
    """A measure, or its ratio to another, and the limit it is held against. An aim is recorded and may be missed."""

    title: str
    over: str
    under: str | None
    limit: float
    at_least: bool = True
    is_aim: bool = False


MEASURES: Mapping[str, Measure] = {
    "pgbench": Measure("PostgreSQL alone: pgbench, an order a transaction", "orders/s"),
    "pgbench_statement": Measure("the same as one statement", "orders/s"),
    "plain": Measure("plain FastAPI + SQLAlchemy service, 64 connections", "orders/s"),
    "echo": Measure("the same HTTP server without a ledger, 64 connections", "orders/s"),
    "orders": Measure("one process, best of 64 to 1,000 connections", "orders/s"),
    "orders_64": Measure("one process, 64 connections", "orders/s"),
    "orders_256": Measure("one process, 256 connections", "orders/s"),
    "orders_1000": Measure("one process, 1,000 connections", "orders/s"),
    "orders_keys": Measure("the same by 64 clients with keys and limits of every kind", "orders/s"),
    "quotes": Measure("quotes, 64 connections", "quotes/s"),
    "orders_quotes": Measure("orders by quote, 64 connections", "orders/s"),
    "orders_webhook": Measure("one process, 64 connections, while their events are delivered", "orders/s"),
    "deliveries": Measure("events delivered to one endpoint, one after the other", "events/s"),
    "errors_256": Measure("errors at 256 connections, all rounds", ""),
    "errors_1000": Measure("errors at 1,000 connections, all rounds", ""),
    "replays": Measure("one process, repeats of stored keys", "orders/s"),
    "separate_pgbench": Measure("pgbench beside the separate services", "orders/s"),
    "separate": Measure("separate services, best of 32 to 256 connections", "orders/s"),
    "latency_p50": Measure("latency at the fixed rate, p50", "ms"),
    "latency_p99": Measure("latency at the fixed rate, p99", "ms"),
    "echo_latency_p50": Measure("echo at the same rate, p50", "ms"),
    "echo_latency_p99": Measure("echo at the same rate, p99", "ms"),
    "bare_latency_p50": Measure("one bare committed insert at the same rate (pgbench), p50", "ms"),
    "bare_latency_p99": Measure("one bare committed insert at the same rate (pgbench), p99", "ms"),
    "page_near": Measure("a page of 10 below start=1,000", "ms"),
    "page_far": Measure("a page of 10 beyond four fifths of all orders", "ms"),
    "pages": Measure("pages of 10 at random places, 64 connections", "pages/s"),
    "pages_keys": Measure("the same pages, of a client with a key and a limit", "pages/s"),
    "pages_echo": Measure("echo in turn with the pages", "orders/s"),
    "growth_none": Measure("a desk without orders, 64 connections", "orders/s"),
    "growth_stored": Measure("a desk with many stored orders, 64 connections", "orders/s"),
    "standby_none": Measure("a desk whose standby nobody waits for, 64 connections", "orders/s"),
    "standby_sync": Measure("the same while each commit waits for the standby", "orders/s"),
    "memory": Measure("memory of the one-process desk (Python) at peak", "MB"),
    "start_fresh": Measure("empty data directory to first 201", "s"),
    "start_again": Measure("restart to first 201", "s"),
}

TARGETS = (
    Target("one process ÷ pgbench", "orders", "pgbench", 5),
    Target("with keys and limits ÷ without", "orders_keys", "orders", 0.9),
    Target("with a webhook ÷ without", "orders_webhook", "orders_64", 0.95),
    Target("one process ÷ echo", "orders_64", "echo", 0.4),
    Target("separate services ÷ pgbench", "separate", "separate_pgbench", 4),
    Target("replays ÷ new orders", "replays", "orders_64", 1),
    Target("latency p50 ÷ echo's", "latency_p50", "echo_latency_p50", 3, at_least=False),
    Target("latency p99 ÷ echo's", "latency_p99", "echo_latency_p99", 3, at_least=False),
    Target("far page ÷ near page, time", "page_far", "page_near", 1.1, at_least=False),
    Target("pages ÷ echo", "pages", "pages_echo", 0.2),
    Target("pages with a key ÷ without", "pages_keys", "pages", 0.9),
    Target("with many stored ÷ with none", "growth_stored", "growth_none", 0.85),
    Target("with a synchronous standby ÷ without", "standby_sync", "standby_none", 0.5, is_aim=True),
    Target("256 ÷ 64 connections", "orders_256", "orders_64", 0.75),
    Target("1,000 ÷ 64 connections", "orders_1000", "orders_64", 0.6),
    Target("errors at 256 connections", "errors_256", None, 0, at_least=False),
    Target("errors at 1,000 connections", "errors_1000", None, 0, at_least=False),
    Target("memory", "memory", None, 150, at_least=False, is_aim=True),
    Target("first start", "start_fresh", None, 4, at_least=False, is_aim=True),
    Target("restart", "start_again", None, 2, at_least=False, is_aim=True),
)


@dataclass
class Results:
    """Everything that was found. `cpu_us` is CPU time per order by measure and by what the processes do."""

    is_quick: bool
    samples: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    runs_proved: int = 0
    orders_proved: int = 0
    orders_unanswered: int = 0
    replays_proved: int = 0

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def add_proof(self, proof: Proof) -> None:
        self.runs_proved += 1
        self.orders_proved += proof.answered
        self.orders_unanswered += proof.unanswered

    def add_cpu(self, name: str, spent_seconds: Mapping[str, float], orders: int) -> None:
        """What the processes spent on so many orders."""
        by_part = self.cpu_us.setdefault(name, {})
        for part, seconds in spent_seconds.items():
            by_part.setdefault(part, []).append(seconds / orders * 1e6)

    def best(self, name: str) -> str | None:
        """Of the measures `name_1`, `name_2` … the one with the highest median; `name` itself if it was measured."""
        if name in self.samples:
            return name
        numbered = [each for each in self.samples if each.rpartition("_")[0] == name and each[-1].isdecimal()]
        return max(numbered, key=self._median, default=None)

    def value(self, name: str) -> float | None:
        """The median of its samples, of the best where there are several of that name; None when not measured.

        Errors are added up instead.
        """
        found = self.best(name)
        if found is not None and name.startswith("errors_"):
            return sum(self.samples[found])
        return None if found is None else self._median(found)

    def ratio(self, target: Target) -> float | None:
        """What the target is about; None when not measured."""
        over = self.value(target.over)
        if target.under is None or over is None:
            return over
        under = self.value(target.under)
        return None if under is None else over / under

    def held(self, target: Target) -> bool | None:
        ratio = self.ratio(target)
        if ratio is None:
            return None
        return ratio >= target.limit if target.at_least else ratio <= target.limit

    def missed(self) -> list[Target]:
        """The targets that were measured and do not hold, aims left out."""
        return [target for target in TARGETS if not target.is_aim and self.held(target) is False]

    def document(self) -> dict[str, Any]:
        """All of it, for the JSON file."""
        return {
            "quick": self.is_quick,
            **self.facts,
            "medians": {name: self.value(name) for name in MEASURES if self.value(name) is not None},
            "best_of": {
                name: self.best(name)
                for name in ("pgbench", "pgbench_statement", "orders", "separate", "separate_pgbench")
            },
            "targets": [
                {
                    "title": target.title,
                    "value": self.ratio(target),
                    "limit": target.limit,
                    "at_least": target.at_least,
                    "aim": target.is_aim,
                    "held": self.held(target),
                }
                for target in TARGETS
            ],
            "proofs": {
                "runs": self.runs_proved,
                "orders_answered_and_found_once": self.orders_proved,
                "orders_stored_after_the_load_had_ended": self.orders_unanswered,
                "replays_that_added_nothing": self.replays_proved,
            },
            "cpu_us_per_order": {
                name: {part: statistics.median(samples) for part, samples in parts.items()}
                for name, parts in self.cpu_us.items()
            },
            "samples": self.samples,
            "cpu_us_samples": self.cpu_us,
        }

    def _median(self, name: str) -> float:
        return statistics.median(self.samples[name])
