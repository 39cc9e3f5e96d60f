"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from edgevl.errors import (
    ContextLengthError,
    EdgeVLError,
    FetchError,
    ImageError,
    PromptError,
    QueueFullError,
    SchemaError,
    VideoError,
)
from edgevl.preprocess.sources import short_name

#: Errors of EdgeVL that are the request's fault.
REQUEST_ERRORS = (PromptError, ImageError, VideoError, FetchError)

#: Type of a fault: a field that other servers know, with a value that cannot be had here.
NOT_OFFERED = "not_offered"
#: Most characters of a message.
_MAX_CHARS = 1000


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="One line: what is wrong and how to mend it.")
    type: str = Field(description="The kind: `invalid_request_error`, `server_error` and others.")
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str | None = Field(description="For programs, where there is one.")


class ErrorBody(BaseModel):
    """Every error has this body; within a stream it is an event."""

    error: ErrorDetail


class ApiError(Exception):
    """An error as the client is told of it.

    Attributes:
        status: of HTTP.
        detail: the body.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Put an error together; its type follows from the status."""
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        message = _shortened(" ".join(message.split()))
        param = None if param is None else _shortened(param)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the body as plain types."""
        return ErrorBody(error=self.detail).model_dump()

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body(), self.status, self.headers)


def _shortened(text: str) -> str:
    """Return text that may repeat what a request says, of a length that is fit to be read."""
    return text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…"


def busy(retry_after_s: float = 1.0) -> ApiError:
    """Return the error of a server that has too much to do."""
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too many requests wait; try again later",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))},
    )


def unavailable(message: str) -> ApiError:
    """Return the error of a server that is not ready yet, or stopping."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE, message, code="unavailable", headers={"Retry-After": "5"}
    )


def stopping() -> ApiError:
    """Return the error of a server that takes no more."""
    return unavailable("the server stops: ask another one")


def timed_out(timeout_s: float) -> ApiError:
    """Return the error of a request that took longer than the operator allows."""
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"the request took longer than {timeout_s:g} s, the limit of this server; "
        "ask for fewer tokens",
        code="timeout",
    )


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Return the error that a client is told of ``error``; ``param`` is the field at fault.

    Of what is not EdgeVL's own, nothing but that it happened.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy(error.retry_after_s)
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), param, "context_length_exceeded")
    if isinstance(error, SchemaError):
        param = error.where
    if isinstance(error, REQUEST_ERRORS):
        return ApiError(400, str(error), param, "invalid_value")
    if isinstance(error, EdgeVLError):
        return ApiError(500, str(error))
    return ApiError(500, "internal error; the server's log says more")


@contextmanager
def blamed_on(param: str | None) -> Iterator[None]:
    """Let an error of EdgeVL in the block name the field at fault.

    Raises:
        ApiError: in its place.
    """
    try:
        yield
    except EdgeVLError as error:
        raise as_api_error(error, param) from error


def as_invalid(error: ValidationError, body: Any) -> ApiError:
    """Return the error of a body that is not what it must be: the fault that lies deepest."""
    fault, path = max(
        ((fault, list(_path(fault, body))) for fault in error.errors(include_url=False)),
        key=lambda found: len(found[1]),
    )
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:] or None
    where, what, code = param or "the body", fault["msg"], "invalid_value"
    if fault["type"] == NOT_OFFERED:
        message, code = f"{param} {what}", "unsupported_value"
    elif fault["type"] == "missing":
        message, code = f"Missing required parameter: {where}", "missing_required_parameter"
    else:
        if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
            what = "Input should be an object, {…}"  # Pydantic speaks of Python's types
        message = f"{where}: {what}"
    return ApiError(400, message, param, code)


def _path(fault: Mapping[str, Any], body: Any) -> Iterable[int | str]:
    """Yield what of a fault's location is in the body, or missing: Pydantic names types as well."""
    keys = fault["loc"]
    for position, key in enumerate(keys, start=1):
        inside = isinstance(body, list) and isinstance(key, int) and key < len(body)
        if inside or (isinstance(body, dict) and key in body):
            body = body[key]
        elif fault["type"] != "missing" or position < len(keys):
            continue
        yield key


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` that shape."""

    async def own(request: Request, error: Exception) -> JSONResponse:
        failure: ApiError = request.app.state.service.client_error(error)
        if failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            request.scope["edgevl.record"].error = failure.detail.message
        return failure.response()

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"nothing is at {short_name(request.url.path)}: the API is at /v1, see /docs"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} is not for {short_name(request.url.path)}: use {allowed}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(EdgeVLError, own)
    app.add_exception_handler(HTTPException, plain)


_DESCRIPTIONS = {
    400: "The request is malformed, or asks for what cannot be.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not JSON by its Content-Type.",
    429: "Too many requests wait; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The model is being loaded, or the server stops.",
    504: "The request took too long.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route, for its OpenAPI description."""
    named: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]} for status in statuses
    }
    return named | {"4XX": {"model": ErrorBody, "description": "Any other error of a request."}}
