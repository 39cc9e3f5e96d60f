"""What is known of requests afterwards: a JSON line of each in the log, and Prometheus' metrics.

Neither has anything that users say.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevl.generate.generation import Answer, Usage
from edgevl.generate.scheduler import Scheduler
from edgevl.serve.errors import as_api_error

logger = logging.getLogger("edgevl.serve")

#: The status of a request whose client left before its response began, as nginx logs it.
_CLIENT_LEFT = 499
_TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass
class Record:
    """What is known of a request afterwards.

    Attributes:
        started: ``time.perf_counter()`` when its first line was read.
        request_id: its name.
        ttft_ms: from then to the first token, whatever was waited for.
        answers: those that ended.
        usage: the tokens of all of them.
        aborted: why it ended without a whole response: the ``client`` left, took nothing for too
            long (``stalled``), the server's ``shutdown``, or an error's code.
        error: what failed, if the server did.
    """

    started: float = field(default_factory=time.perf_counter)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    ttft_ms: float | None = None
    answers: list[Answer] = field(default_factory=list)
    usage: Usage | None = None
    aborted: str | None = None
    error: str | None = None


class Metrics:
    """The numbers of one server, all 0 at first."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self._waiting = gauge("edgevl_waiting", "Answers that wait for their turn")
        self._running = gauge("edgevl_running", "Answers being computed")
        self._requests = counter(
            "edgevl_requests", "Requests by route and status", ["route", "status"]
        )
        self._aborted = counter(
            "edgevl_requests_aborted",
            "Responses that did not come to their end, by reason",
            ["reason"],
        )
        self._ttft = histogram(
            "edgevl_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_TTFT_S,
        )
        self._per_token = histogram(
            "edgevl_time_per_output_token_seconds",
            "Mean time of an answer's tokens after the first",
            buckets=_TOKEN_S,
        )
        self._tokens = counter(
            "edgevl_tokens",
            "Tokens of answered requests: prompt (all), cached and image (of those), completion",
            ["kind"],
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
        if record.usage:
            for kind in ("prompt", "cached", "image", "completion"):
                self._tokens.labels(kind).inc(getattr(record.usage, f"{kind}_tokens"))

    def page(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestLog:
    """Writes a line and counts, for every request; answers where an internal error left none."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request; say afterwards what came of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["edgevl.record"] = Record()
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = (b"x-request-id", record.request_id.encode())
                message = {**message, "headers": [*message["headers"], request_id]}
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except asyncio.CancelledError:  # the grace is over
            record.aborted = "shutdown"
            raise
        except Exception as error:
            record.error = _where(error)
            if os.environ.get("EDGEVL_DEBUG", "0") not in ("", "0"):
                traceback.print_exc()
            if not status:
                await as_api_error(error).response()(scope, receive, tagged)
        finally:
            page = "edgevl.page" in scope
            route = "page" if page else getattr(scope.get("route"), "path", None) or "other"
            self._metrics.count(record, route, status or _CLIENT_LEFT)
            if not page or record.error:
                logger.info(_line(scope, record, route, status or _CLIENT_LEFT))


def _where(error: Exception) -> str:
    """Return the kind of an internal error and its place; its text may hold what users said."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno} (EDGEVL_DEBUG=1 shows more)"


def _line(scope: Scope, record: Record, route: str, status: int) -> dict[str, Any]:
    line: dict[str, Any] = {
        "request_id": record.request_id,
        "method": scope["method"],
        "route": route,
        "status": status,
        "client": scope["client"][0] if scope.get("client") else None,
        "duration_ms": round(1000 * (time.perf_counter() - record.started), 1),
    }
    if record.ttft_ms is not None:
        line["ttft_ms"] = round(record.ttft_ms, 1)
    if record.usage:
        for name in ("prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens"):
            line[name] = getattr(record.usage, name)
    if record.answers:
        line["finish_reason"] = ",".join(answer.finish_reason for answer in record.answers)
    if record.aborted:
        line["aborted"] = record.aborted
    if record.error:
        line["error"] = record.error
    return line


class JsonFormatter(logging.Formatter):
    """Makes a line of JSON of a log record; a message that is a dict gives its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{stamp}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        fields = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        return json.dumps(line | fields)


def log_to_stderr() -> None:
    """Write the lines of this server, and what libraries warn of, to standard error.

    Nothing else should be written there, or who reads the log would find lines that are not JSON.
    """

    def log_failure(failure: threading.ExceptHookArgs) -> None:
        if isinstance(failure.exc_value, Exception):
            logger.error("a thread failed: %s", _where(failure.exc_value))

    logging.captureWarnings(True)
    threading.excepthook = log_failure
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name, level in (
        ("edgevl", logging.INFO),
        ("uvicorn.error", logging.WARNING),
        ("py.warnings", logging.WARNING),
        ("asyncio", logging.ERROR),  # it warns of every client that leaves in mid-sentence
    ):
        log = logging.getLogger(name)
        log.setLevel(level)
        log.propagate = False
        log.handlers = [handler]
