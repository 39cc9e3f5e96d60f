"""What stands before the page: how large requests may be, and what browsers may do with it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

#: Largest body of a request, bytes; uploaded files, which Gradio bounds itself, are another matter.
MAX_BODY_BYTES = 8 << 20
_UPLOADS = "/gradio_api/upload"

# A picture or link in an answer must not call out: what it names could tell what was said.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class PageGuard:
    """Bounds the bodies of requests, and adds headers to every response."""

    def __init__(self, app: Any) -> None:
        """Stand before ``app``."""
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Pass on a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        size = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal size
            message: MutableMapping[str, Any] = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise _TooLargeError
            return message

        upload = scope["path"].endswith(_UPLOADS)
        try:
            await self._app(scope, receive if upload else bounded, with_headers)
        except _TooLargeError:
            if not begun:
                await with_headers({"type": "http.response.start", "status": 413, "headers": []})
                await send({"type": "http.response.body", "body": b""})


class _TooLargeError(Exception):
    """A body is over the limit."""
