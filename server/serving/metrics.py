"""What a service counts, for Prometheus. No label comes from a client: a label that anybody can invent fills memory.

Not here: figures about pictures (`shared.metrics`).
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from server.serving.load import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry a service, so that two of them in one process do not meet."""

    def __init__(self, load: Load, *, model: str, epsilon: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter(
            "fedcanvas_requests", "Answers, by route and status.", ["method", "route", "status"], registry=r
        )
        self.seconds = Histogram(
            "fedcanvas_request_seconds", "From head to answer.", ["route"], buckets=_SECONDS, registry=r
        )
        self.pictures = Counter("fedcanvas_pictures", "Pictures drawn.", registry=r)
        self.batches = Histogram(
            "fedcanvas_batch_pictures", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=r
        )
        self.drawing = Counter("fedcanvas_drawing_seconds", "Spent in drawing.", registry=r)
        self.refused = Counter("fedcanvas_refused", "Requests turned away, by why.", ["why"], registry=r)
        self.given_up = Counter("fedcanvas_given_up", "Requests whose client left before its answer.", registry=r)
        self.kept = Gauge("fedcanvas_gallery_bytes", "Of pictures kept for their URL.", registry=r)
        self.connections = Gauge("fedcanvas_connections", "Open.", registry=r)
        Gauge("fedcanvas_units", "Asked for and not yet sent.", registry=r).set_function(lambda: load.units)
        Info("fedcanvas_model", "What is served.", registry=r).info({"digest": model, "epsilon": epsilon})

    def batch(self, pictures: int, seconds: float) -> None:
        self.pictures.inc(pictures)
        self.batches.observe(pictures)
        self.drawing.inc(seconds)

    def answer(self, method: str, route: str, status: int, seconds: float) -> None:
        self.requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
