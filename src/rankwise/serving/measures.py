"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Measures:
    """Requests by path and status, their seconds, the sizes of batches, and how many wait."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rankwise_requests_total", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "rankwise_request_seconds", "Seconds to the answer.", ["path"], buckets=SECONDS, registry=self._registry
        )
        self.batches = Histogram(
            "rankwise_batch_size", "Histories read together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self.queue = Gauge("rankwise_waiting", "Requests that wait for the model.", registry=self._registry)

    def done(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' form."""
        return generate_latest(self._registry)
