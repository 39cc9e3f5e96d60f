"""Serving, and loading beside it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from edgevl.axera.npu import close_runtimes
from edgevl.generate.model import Model
from edgevl.generate.scheduler import Scheduler
from edgevl.serve.app import PageGate
from edgevl.serve.listening import signals_end_well
from edgevl.serve.logs import log_to_stderr
from edgevl.serve.protocol import Protocol
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
        gate: PageGate | None = None,
        make_page: Callable[[Model, Scheduler], FastAPI] | None = None,
    ) -> None:
        """Do nothing yet.

        Args:
            app: of `create_app`.
            load: loads the model, in a thread of its own.
            on_ready: called from there when the model is ready.
            gate: where the page goes, if there is one.
            make_page: makes the page.
        """
        self._service: Service = app.state.service
        config = uvicorn.Config(
            app,
            http=Protocol,
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
        self._gate = gate
        self._make_page = make_page
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        # Daemons, so that an exit in haste need not wait for them.
        threading.Thread(target=self._start_service, daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more, let requests under way end within the grace, cancel the rest."""
        closing = threading.Thread(target=self._service.close, daemon=True)
        closing.start()

        async def close_page() -> None:
            while closing.is_alive() and not self.force_exit:
                await asyncio.sleep(0.05)
            if self._gate is not None:
                self._gate.close()

        page_closed = asyncio.create_task(close_page())
        await super().shutdown(sockets)
        await page_closed

    def _start_service(self) -> None:
        try:
            model = self._load()
            scheduler = self._service.start(model)
            if self._gate is not None and self._make_page is not None:
                assert self._loop is not None
                opening = self._gate.open(self._make_page(model, scheduler))
                asyncio.run_coroutine_threadsafe(opening, self._loop)
            self._on_ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True


def run(server: Server, sock: socket.socket) -> None:
    """Serve until a signal comes: SIGTERM, SIGHUP or Ctrl-C; a second Ctrl-C ends it at once.

    Raises:
        Exception: the model could not be loaded.
    """
    log_to_stderr()
    with signals_end_well(server):
        server.run([sock])
    if server.force_exit:
        close_runtimes()
        os._exit(130)  # threads that still compute are not waited for, but for a call of an NPU
    if server.failure is not None:
        raise server.failure
