"""Metrics: what one service counts for Prometheus."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Traffic(Collector):
    """Counts what one service answers, for Prometheus. In plain numbers: everything runs in one thread, and the locks
    of prometheus_client's own counters cost each request as much as reading its JSON."""

    _SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self, service: str) -> None:
        self._service = service
        self._answers: dict[tuple[str, str, int], int] = {}  # by method, path and status
        self._seconds: dict[str, list[float]] = {}  # by path: how many within each bound, beyond all, and the sum

    def count(self, method: str, path: str, status: int, seconds: float) -> None:
        """Counts one answer and the seconds it took."""
        answered = method, path, status
        self._answers[answered] = self._answers.get(answered, 0) + 1
        buckets = self._seconds.get(path)
        if buckets is None:
            buckets = self._seconds[path] = [0.0] * (len(self._SECONDS) + 2)
        buckets[bisect_left(self._SECONDS, seconds)] += 1
        buckets[-1] += seconds

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        answers = CounterMetricFamily(
            "buydesk_http_requests", "Answers given.", labels=["service", "method", "path", "status"]
        )
        for (method, path, status), count in self._answers.items():
            answers.add_metric([self._service, method, path, str(status)], count)
        yield answers
        seconds = HistogramMetricFamily("buydesk_http_seconds", "Time until the answer.", labels=["service", "path"])
        bounds = [*map(str, self._SECONDS), "+Inf"]
        for path, (*counts, total) in self._seconds.items():
            seconds.add_metric([self._service, path], list(zip(bounds, accumulate(counts), strict=True)), total)
        yield seconds


class RefusedCallers(Collector):
    """Counts the callers that one service refused for their key or their rate, by why: they themselves are not told."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._refused: dict[str, int] = {}

    def count(self, why: str) -> None:
        """Counts one."""
        self._refused[why] = self._refused.get(why, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at every scrape."""
        refused = CounterMetricFamily(
            "buydesk_callers_refused", "Callers refused for their key or their rate.", labels=["service", "why"]
        )
        for why, count in self._refused.items():
            refused.add_metric([self._service, why], count)
        yield refused
