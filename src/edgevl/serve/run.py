"""Serving: signals, and loading beside it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from edgevl.generate.model import Model
from edgevl.serve.logs import log_to_stderr
from edgevl.serve.service import Service

#: Seconds that responses have to be sent once all answers have ended or been cancelled.
_LAST_SECONDS = 5
_KEEP_ALIVE_S = 30


class Server(uvicorn.Server):
    """Serves while the model is still being loaded, and ends its answers before it stops.

    Attributes:
        failure: why the model could not be loaded.
    """

    def __init__(
        self,
        app: FastAPI,
        load: Callable[[], Model],
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Do nothing yet.

        Args:
            app: of `create_app`.
            load: loads the model, in a thread of its own.
            on_ready: called from there when the model is ready.
        """
        self._service: Service = app.state.service
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(self._service.settings.grace_s) + _LAST_SECONDS,
        )
        super().__init__(config)
        self._load = load
        self._on_ready = on_ready
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        await super().startup(sockets)
        # Daemons, so that an exit in haste need not wait for them.
        threading.Thread(target=self._start_service, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more, let requests under way end within the grace, cancel the rest."""
        closing = threading.Thread(target=self._service.close, daemon=True)
        closing.start()
        await super().shutdown(sockets)
        while closing.is_alive() and not self.force_exit:
            await asyncio.sleep(0.05)

    def _start_service(self) -> None:
        try:
            self._service.start(self._load())
            self._on_ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True


def run(server: Server, sock: socket.socket) -> None:
    """Serve until a signal comes: SIGTERM or Ctrl-C; a second Ctrl-C ends it at once.

    Raises:
        Exception: the model could not be loaded.
    """
    log_to_stderr()
    with _signals_end_well():
        server.run([sock])
    if server.force_exit:
        os._exit(130)  # threads that still compute are not waited for
    if server.failure is not None:
        raise server.failure


@contextmanager
def _signals_end_well() -> Iterator[None]:
    """Ignore the signals that uvicorn repeats once it has stopped: to be stopped is no failure."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
