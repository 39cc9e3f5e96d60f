"""Bodies of requests: how they are parsed and checked without holding others up.

Python computes in one thread at a time, and a call of a parser cannot be interrupted. So what a
body may cost is bounded before it is parsed: pictures and videos are long strings, which are read
quickly, and the rest is small. Larger bodies are parsed one after another, beside the event loop.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from edgevl.serve.errors import ApiError, as_invalid
from edgevl.serve.settings import MAX_PLAIN_BYTES, MAX_VALUES

Model = TypeVar("Model", bound=BaseModel)

#: Bodies up to so many bytes are parsed at once, which takes a millisecond or two.
_SMALL = 2**16
#: Shorter ``data:`` URLs need not be told from text.
_LONG = 2**12
#: What a value may take in memory, with Pydantic's model of it: 40 to 240 bytes were measured.
_BYTES_PER_VALUE = 256

_LARGE = CapacityLimiter(1)
_URL_KEY = re.compile(rb'url"\s*:\s*\Z')


class Body:
    """The body of a request.

    Attributes:
        data: what has come of it.
        held: the bytes that the request takes in memory, as they are counted.
    """

    def __init__(self, hold: Callable[[Body, int], None]) -> None:
        """Be empty; ``hold`` counts bytes more, or refuses them."""
        self.data = bytearray()
        self.held = 0
        self._hold = hold

    def hold(self, size: int) -> None:
        """Count so many bytes more.

        Raises:
            ApiError: the requests under way take too much.
        """
        self._hold(self, size)

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


class BodyRoute(APIRoute):
    """A route whose body `BodyLimit` has read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request: FastAPI's, with the body parsed before."""
        handle = super().get_route_handler()
        assert self.body_field is not None
        model: Any = self.body_field.field_info.annotation

        async def with_body(request: Request) -> Response:
            body: Body = request.scope["edgevl.body"]
            parsed = _ParsedRequest(request.scope, request.receive)
            parsed.parsed = await body.parsed(model)
            return await handle(parsed)

        return with_body


class _ParsedRequest(Request):
    parsed: BaseModel

    async def body(self) -> bytes:
        return b"parsed"  # FastAPI asks whether there is any

    async def json(self) -> BaseModel:
        return self.parsed


def _parse(data: bytearray, model: type[Model]) -> tuple[int, Model]:
    """Return the number of values in a body, at least, and what it says."""
    pieces = _without_media(data)
    if sum(map(len, pieces)) > MAX_PLAIN_BYTES:
        raise ApiError(
            413,
            f"the body is over the limit of {MAX_PLAIN_BYTES} bytes, not counting pictures and "
            "videos in data: URLs: send less text",
            code="request_too_large",
        )
    plain = b"".join(pieces)
    del pieces  # which would keep the body from being changed
    values = sum(map(plain.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise ApiError(
            413, f"the body has more than {MAX_VALUES} values: send less", code="request_too_large"
        )
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
