"""The server's figures, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16)


class Metrics:
    """Counters of one server. `waiting` is asked for the length of the queue."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "npedit_requests", "Requests by path and HTTP status.", ["path", "status"], registry=self.registry
        )
        self.in_progress = Gauge(
            "npedit_requests_in_progress", "Requests begun and not answered.", registry=self.registry
        )
        self.seconds = Histogram(
            "npedit_request_seconds", "Seconds of a request, with waiting.", ["path"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.batch = Histogram("npedit_batch_items", "Pictures of one batch.", buckets=SIZES, registry=self.registry)
        self.batch_seconds = Histogram(
            "npedit_batch_seconds", "Seconds of one batch.", buckets=SECONDS, registry=self.registry
        )
        gauge = Gauge("npedit_waiting", "Requests that wait.", registry=self.registry)
        gauge.set_function(waiting)

    def note_batch(self, size: int, seconds: float) -> None:
        """Note a finished batch."""
        self.batch.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self.registry)
