"""What a server does, for Prometheus. Nothing of any text is among it."""

from collections.abc import Iterator
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhfjax.serving.asking import Hall
from rlhfjax.serving.jobs import Job

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SOON = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The metrics of one server."""

    def __init__(self, hall: Hall):
        self.registry = CollectorRegistry()
        self.registry.register(_Now(hall))
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("rlhfjax_requests", "Requests by path and status", ["path", "status"], **own)
        self.seconds = Histogram(
            "rlhfjax_request_seconds", "Until the last byte of an answer", ["path"], buckets=_LONG, **own
        )
        self.first = Histogram(
            "rlhfjax_time_to_first_token_seconds", "From a request to its first token", buckets=_SOON, **own
        )
        self.rate = Histogram(
            "rlhfjax_response_tokens_per_second", "Of a response after its first token", buckets=_RATES, **own
        )
        self.ends = Counter("rlhfjax_responses", "Responses by why they ended", ["finish_reason"], **own)

    def ended(self, job: Job) -> None:
        """Count a response that has ended."""
        self.ends.labels(job.response.finish_reason or "cancelled").inc()
        if job.first is None:
            return
        self.first.observe(job.first - job.began)
        took, more = monotonic() - job.first, len(job.response.tokens) - 1
        if more > 0 and took > 0:
            self.rate.observe(more / took)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What is read when somebody asks."""

    def __init__(self, hall: Hall):
        self.hall, self._last = hall, (monotonic(), 0)

    def collect(self) -> Iterator[Any]:
        worker = self.hall.worker
        yield GaugeMetricFamily("rlhfjax_queue", "Responses that wait for a slot", value=worker.waiting)
        yield CounterMetricFamily("rlhfjax_generated_tokens", "Tokens of responses", value=worker.drawn)
        yield CounterMetricFamily("rlhfjax_prompt_tokens", "Tokens of prompts", value=worker.read)
        engines = {one.name: one.batch.engine for one in list(self.hall.models.values()) if one.batch}
        shared = sum(engine.shared for engine in engines.values())
        yield CounterMetricFamily("rlhfjax_shared_prompt_tokens", "Those not read again", value=shared)
        (then, before), (now, drawn) = self._last, (monotonic(), worker.drawn)
        self._last = now, drawn
        rate = (drawn - before) / max(now - then, 1e-3)
        yield GaugeMetricFamily("rlhfjax_tokens_per_second", "Tokens drawn since the last look", value=rate)
        slots = GaugeMetricFamily("rlhfjax_slots", "Responses that can be written at a time", labels=["model"])
        used = GaugeMetricFamily("rlhfjax_slots_used", "Responses that are being written", labels=["model"])
        for name, engine in engines.items():
            slots.add_metric([name], engine.room.slots)
            used.add_metric([name], engine.room.slots - engine.free)
        yield slots
        yield used


class Counted:
    """ASGI middleware that counts requests by the path of their route, and how long they took."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = monotonic(), "500"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            # Another path would be a series of its own for each that somebody makes up.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(monotonic() - began)
