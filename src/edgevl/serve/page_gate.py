"""The page at ``/`` of the server, which is there once the model is."""

from __future__ import annotations

import asyncio

import anyio
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class PageGate:
    """An application that passes on to another, as soon as there is one."""

    def __init__(self) -> None:
        """Have none yet."""
        self._app: ASGIApp = PlainTextResponse("The model is being loaded: try again.\n", 503)
        self._closed = asyncio.Event()
        self._under_way: set[anyio.CancelScope] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request."""
        scope["edgevl.page"] = True  # no line in the log: a page asks for a hundred things
        with anyio.CancelScope() as cancelling:
            self._under_way.add(cancelling)
            try:
                await self._app(scope, receive, send)
            finally:
                self._under_way.discard(cancelling)

    async def open(self, app: FastAPI) -> None:
        """Pass on to ``app`` from when it has started; return when it has ended, after `close`."""
        async with app.router.lifespan_context(app):
            self._app = app
            await self._closed.wait()

    def close(self) -> None:
        """Let the application end, and with it what browsers keep open as long as they show it."""
        self._closed.set()
        for cancelling in list(self._under_way):
            cancelling.cancel()
