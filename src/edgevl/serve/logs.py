"""One JSON line a request on standard error, without anything that users say."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
import traceback
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevl.serve.answers import Record
from edgevl.serve.errors import as_api_error
from edgevl.serve.service import Service

logger = logging.getLogger("edgevl.serve")

#: The status of a request whose client left before its response began, as nginx logs it.
_CLIENT_LEFT = 499


class RequestLog:
    """Writes a line and counts, for every request; answers where an internal error left none."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Stand before ``app``, and before all else."""
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request; say afterwards what came of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(time.perf_counter(), uuid.uuid4().hex)
        scope["edgevl.record"] = record
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
            self._service.metrics.count(record, route, status or _CLIENT_LEFT)
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
    if usage := record.usage:
        line["prompt_tokens"] = usage.prompt_tokens
        line["image_tokens"] = usage.image_tokens
        line["cached_tokens"] = usage.cached_tokens
        line["completion_tokens"] = usage.completion_tokens
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


def _log_failure(failure: threading.ExceptHookArgs) -> None:
    if isinstance(failure.exc_value, Exception):
        logger.error("a thread failed: %s", _where(failure.exc_value))


def log_to_stderr() -> None:
    """Write the lines of this server, and what libraries warn of, to standard error.

    Nothing else should be written there, or who reads the log would find lines that are not JSON.
    """
    logging.captureWarnings(True)
    threading.excepthook = _log_failure
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
