"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edgevl.generate.scheduler import Scheduler
from edgevl.serve.answers import Record

_TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """The numbers of one server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Start all at 0."""
        self._registry = registry
        self._waiting = Gauge(
            "edgevl_waiting", "Answers that wait for their turn", registry=registry
        )
        self._running = Gauge("edgevl_running", "Answers being computed", registry=registry)
        self._requests = Counter(
            "edgevl_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self._aborted = Counter(
            "edgevl_requests_aborted",
            "Responses that did not come to their end, by reason",
            ["reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            "edgevl_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_TTFT_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "edgevl_time_per_output_token_seconds",
            "Mean time of an answer's tokens after the first",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self._tokens = Counter(
            "edgevl_tokens",
            "Tokens of answered requests: prompt (all), cached and image (of those), completion",
            ["kind"],
            registry=registry,
        )

    def watch(self, scheduler: Scheduler) -> None:
        """Read the queue's length from ``scheduler``."""
        self._waiting.set_function(lambda: scheduler.waiting)
        self._running.set_function(lambda: scheduler.running)

    def count(self, record: Record, route: str, status: int) -> None:
        """Count a request that has ended."""
        self._requests.labels(route, status).inc()
        if record.aborted:
            self._aborted.labels(record.aborted).inc()
        if record.ttft_ms is not None:
            self._ttft.observe(record.ttft_ms / 1000)
        for answer in record.answers:
            if answer.timings.decode_ms_per_token:
                self._per_token.observe(answer.timings.decode_ms_per_token / 1000)
        if usage := record.usage:
            self._tokens.labels("prompt").inc(usage.prompt_tokens)
            self._tokens.labels("cached").inc(usage.cached_tokens)
            self._tokens.labels("image").inc(usage.image_tokens)
            self._tokens.labels("completion").inc(usage.completion_tokens)

    def page(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)
