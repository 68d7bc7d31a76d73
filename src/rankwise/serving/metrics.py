"""What the server counts about itself, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of their own: several servers of a process do not mix."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        names = ["path", "status"]
        registry = self._registry
        self._requests = Counter("rankwise_requests", "Requests that were answered.", names, registry=registry)
        self._seconds = Histogram(
            "rankwise_request_seconds", "Time to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self._sizes = Histogram(
            "rankwise_batch_size", "Requests that the model answered together.", buckets=SIZES, registry=registry
        )
        self._queue = Gauge("rankwise_queue_length", "Requests that wait for the model.", registry=registry)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Ask for the queue's length whenever the metrics are read."""
        self._queue.set_function(length)

    def batch(self, size: int) -> None:
        """Count a call of the model."""
        self._sizes.observe(size)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; ``path`` is one of the server's own, never what a client wrote."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All counts, in Prometheus's text format."""
        return generate_latest(self._registry)
