"""What Prometheus is told of the server, under /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

# How a request ended; each is counted once.
OUTCOMES = ("ok", "refused", "full", "draining", "timeout", "cancelled", "failed")
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server. Memory and processor time of the process (Linux) stand beside them."""

    def __init__(self, waiting: Callable[[], int], stored_bytes: Callable[[], int]) -> None:
        """waiting: number of jobs in the queue; stored_bytes: of pictures that are kept for their addresses."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("ditc_requests", "Requests for pictures by outcome", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.pictures = Counter("ditc_pictures", "Pictures drawn", registry=registry)
        text = "Time from a batch's first step to its pictures, for each picture of it"
        self.picture_seconds = Histogram("ditc_picture_seconds", text, buckets=SECONDS, registry=registry)
        text = "Time of a denoising step, for the whole batch"
        self.step_seconds = Histogram("ditc_step_seconds", text, buckets=SECONDS, registry=registry)
        text = "Pictures of a batch at its start"
        self.batch_pictures = Histogram("ditc_batch_pictures", text, buckets=(1, 2, 3, 4), registry=registry)
        text = "Batches begun anew, as the replica that drew them had ended"
        self.batches_again = Counter("ditc_batches_again", text, registry=registry)
        Gauge("ditc_queue_length", "Requests that wait", registry=registry).set_function(waiting)
        text = "PNG files that are kept for their addresses"
        Gauge("ditc_stored_bytes", text, registry=registry).set_function(stored_bytes)
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
