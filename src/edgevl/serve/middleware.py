"""What a request passes before its endpoint: who may ask, and how large and costly its body is.

Python computes in one thread at a time, and a call of a parser cannot be interrupted. So what a
body may cost is bounded before it is parsed: pictures and videos are long strings, which are read
quickly, and the rest is small. Larger bodies are parsed one after another, beside the event loop.
"""

from __future__ import annotations

import hmac
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Coroutine
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edgevl.serve.errors import ApiError, as_invalid, busy, timed_out
from edgevl.serve.settings import Settings

Model = TypeVar("Model", bound=BaseModel)

#: Requests whose bodies have been taken, beyond those that wait in the queue: some are computed,
#: the pictures of others decoded.
EXTRA_IN_FLIGHT = 32
#: Most bytes of a body without its pictures and videos, four times what a context of 40,960 tokens
#: holds as JSON with every character escaped. The time and memory that a body takes depend on them.
MAX_PLAIN_BYTES = 10**6
#: Most values in a body: three times as many as such a context has token ids.
MAX_VALUES = 2**17
#: Most bytes that the bodies of all requests under way take in memory; always two of the largest.
BODIES_BYTES = 128 * 10**6
#: Bodies up to so many bytes are parsed at once, which takes a millisecond or two.
_SMALL = 2**16
#: Shorter ``data:`` URLs need not be told from text.
_LONG = 2**12
#: What a value may take in memory, with Pydantic's model of it: 40 to 240 bytes were measured.
_BYTES_PER_VALUE = 256

_LARGE = CapacityLimiter(1)
_URL_KEY = re.compile(rb'url"\s*:\s*\Z')
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]+)?")


class HostCheck:
    """Refuses requests for other names than this machine's.

    A web page whose name is made to lead to this machine (DNS rebinding) could else read answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        app = self.app
        if scope["type"] == "http" and not _is_loopback(Headers(scope=scope).get("host", "")):
            app = ApiError(
                403,
                "the Host header names another machine, and this server listens to its own only: "
                "ask for localhost, have a proxy do so, or start the server with --host",
            ).response()
        await app(scope, receive, send)


def _is_loopback(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    try:
        if match[1] is None:
            return match[2].lower() == "localhost" or IPv4Address(match[2]).is_loopback
        return IPv6Address(match[1]).is_loopback
    except ValueError:
        return False


class KeyCheck:
    """Asks for the API key, for all paths that begin with one of ``paths``."""

    def __init__(self, app: ASGIApp, api_key: str, paths: Collection[str]) -> None:
        self.app = app
        self._key = api_key.encode()
        self._paths = tuple(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        app = self.app
        if scope["type"] == "http" and scope["path"].startswith(self._paths):
            given = Headers(scope=scope).get("authorization", "")
            scheme, _, key = given.partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
            if scheme.lower() != "bearer" or not right:
                what = "Incorrect API key provided" if given else "You didn't provide an API key"
                app = ApiError(
                    401,
                    f"{what}: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                ).response()
        await app(scope, receive, send)


class BodyLimit:
    """Reads the bodies of requests at ``paths``, within limits, before anything is made of them."""

    def __init__(self, app: ASGIApp, settings: Settings, paths: Collection[str]) -> None:
        self.app = app
        self._paths = paths
        self._settings = settings
        self._most_held = max(BODIES_BYTES, 2 * settings.max_request_bytes)
        self._requests = 0
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with its whole body, or refuse it."""
        with_body = scope["type"] == "http" and scope["path"] in self._paths
        if not with_body or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = scope["edgevl.body"] = Body(self._hold)
        self._requests += 1
        try:
            self._check_head(Headers(scope=scope))
            whole = False
            with anyio.move_on_after(self._settings.timeout_s) as in_time:
                whole = await self._read(body, receive)
            if in_time.cancelled_caught:
                raise timed_out(self._settings.timeout_s)
            if whole:
                await self.app(scope, receive, send)
            else:
                scope["edgevl.record"].aborted = "client"
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self._requests -= 1
            self._held -= body.held
            body.data = bytearray()  # uvicorn keeps the scope for as long as the connection

    def _check_head(self, headers: Headers) -> None:
        # A page of another origin may send text/plain without asking first, but not JSON.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: set Content-Type to application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        length = headers.get("content-length", "0")
        if len(length) > 18 or int(length) > self._settings.max_request_bytes:
            raise self._too_large()
        if self._requests > self._settings.max_queue + EXTRA_IN_FLIGHT:
            raise busy()

    async def _read(self, body: Body, receive: Receive) -> bool:
        """Read a body; return whether the client has stayed until it was whole."""
        more = True
        while more:
            with anyio.move_on_after(self._settings.stall_s) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise ApiError(408, "the body of the request did not come")
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            if len(body.data) + len(chunk) > self._settings.max_request_bytes:
                raise self._too_large()
            body.hold(len(chunk))
            body.data += chunk
        return True

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > self._most_held:
            raise busy()

    def _too_large(self) -> ApiError:
        most = self._settings.max_request_bytes
        return _too_large(
            f"the body is over the limit of {most} bytes: send fewer or smaller pictures"
        )


def _too_large(message: str) -> ApiError:
    return ApiError(413, message, code="request_too_large")


class Body:
    """The body of a request.

    Attributes:
        data: what has come of it.
        held: the bytes that the request takes in memory, as they are counted.
    """

    def __init__(self, hold: Callable[[int], None]) -> None:
        """Be empty; ``hold`` counts bytes more of all requests, or refuses them."""
        self.data = bytearray()
        self.held = 0
        self._hold = hold

    def hold(self, size: int) -> None:
        """Count so many bytes more.

        Raises:
            ApiError: the requests under way take too much.
        """
        self.held += size
        self._hold(size)

    async def parsed(self, model: type[Model]) -> Model:
        """Return the body as ``model`` has it, and let go of its bytes.

        Raises:
            ApiError: it is not what it must be, has too much text or too many values, or takes more
                memory than there is for bodies.
        """
        data, self.data = self.data, bytearray()
        if len(data) <= _SMALL:
            values, request = _parse(data, model)
        else:
            values, request = await to_thread.run_sync(_parse, data, model, limiter=_LARGE)
        self.hold(values * _BYTES_PER_VALUE)
        return request


def _parse(data: bytearray, model: type[Model]) -> tuple[int, Model]:
    """Return the number of values in a body, at least, and what it says."""
    pieces = _without_media(data)
    if sum(map(len, pieces)) > MAX_PLAIN_BYTES:
        raise _too_large(
            f"the body is over the limit of {MAX_PLAIN_BYTES} bytes, not counting pictures and "
            "videos in data: URLs: send less text"
        )
    plain = b"".join(pieces)
    del pieces  # which would keep the body from being changed
    values = sum(map(plain.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise _too_large(f"the body has more than {MAX_VALUES} values: send less")
    if data.startswith(BOM_UTF8):
        del data[: len(BOM_UTF8)]
    try:
        parsed = from_json(data)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    try:
        return values, model.model_validate(parsed)
    except ValidationError as error:
        raise as_invalid(error, parsed) from None


def _without_media(data: bytearray) -> list[memoryview]:
    """Return the pieces of a body between the long ``data:`` URLs in it.

    They are found by ``"data:`` after a key that ends in ``url``. No JSON has anything but text
    between that and the next quote, wherever it is found; so nothing is left out that takes more
    time or memory than plain text does. What is too long is not searched to its end.
    """
    view = memoryview(data)
    pieces: list[memoryview] = []
    size = begin = at = 0
    while (start := data.find(b'"data:', at)) >= 0 and size + start - begin <= MAX_PLAIN_BYTES:
        at = data.find(b'"', start + 1)
        if at < 0:
            break
        if at - start >= _LONG and _URL_KEY.search(data, max(0, start - 32), start):
            pieces.append(view[begin:start])
            size += start - begin
            begin = at
    return [*pieces, view[begin:]]


class BodyRoute(APIRoute):
    """A route that takes its body, if it has one, as `BodyLimit` has read it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request: FastAPI's, with the body parsed before."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model: Any = self.body_field.field_info.annotation

        async def with_body(request: Request) -> Response:
            body: Body = request.scope["edgevl.body"]
            parsed = _ParsedRequest(request.scope, request.receive)
            parsed.parsed = await body.parsed(model)
            response = await handle(parsed)
            response.headers.update(request.app.state.service.ignored.headers(parsed.parsed))
            return response

        return with_body


class _ParsedRequest(Request):
    parsed: BaseModel

    async def body(self) -> bytes:
        return b"parsed"  # FastAPI asks whether there is any

    async def json(self) -> BaseModel:
        return self.parsed
