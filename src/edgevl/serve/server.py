"""The server: a socket, HTTP within limits, loading beside serving, and the end of it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgevl.axera.npu import close_runtimes
from edgevl.errors import EdgeVLError
from edgevl.serve.errors import ApiError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from edgevl.generate.model import Model
    from edgevl.serve.app import PageGate
    from edgevl.serve.service import Service

#: Most bytes of a head: the request line and all headers.
MAX_HEAD_BYTES = 2**16
#: Seconds in which a head must have come, from the beginning of the connection or its first byte.
HEAD_S = 10.0
#: Chunks of a body may be small, but not all of many: each takes h11 some 20 µs, in which nobody
#: else is answered. So many may be of any size, beyond them one for so many bytes.
_FREE_CHUNKS, _CHUNK_BYTES = 512, 256
#: Seconds in which what a client still sends is thrown away after a refusal.
_LINGER_S = 2.0
#: Seconds that responses have to be sent once all answers have ended or been cancelled.
_LAST_SECONDS = 5
_KEEP_ALIVE_S = 30


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ``port`` 0 takes one that is free.

    Raises:
        EdgeVLError: the host is no address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A name such as localhost may have both: most clients try IPv4, and some only that.
        family, _, _, _, address = min(found, key=lambda place: place[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except UnicodeError:
        raise EdgeVLError(f"--host {host!r}: not the name of a host") from None
    except OSError as error:
        # Python adds the address to what the system says.
        reason = str(error.strerror).partition(" (while")[0]
        raise EdgeVLError(
            f"cannot listen at {host}, port {port}: {reason}; choose others with --host and --port"
        ) from None


def is_loopback(sock: socket.socket) -> bool:
    """Tell whether only this machine reaches a socket that listens."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """Return where a socket that listens is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """A connection: HTTP as uvicorn speaks it, with limits on heads, refused in the API's shape."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn = _Connection(self._clear_deadline)
        self._deadline: asyncio.TimerHandle | None = None
        self._begun = False  # something of a head has come
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._deadline = self.loop.call_later(HEAD_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._refused:
            return
        if self._deadline is None and not self._answering:
            self._deadline = self.loop.call_later(HEAD_S, self._give_up)
        self._begun = True
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that h11 could not read; uvicorn calls this."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", HTTPStatus.BAD_REQUEST)
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"the head is over the limit of {MAX_HEAD_BYTES} bytes: send shorter headers"
        else:
            message = f"the request is not valid HTTP/1.1: {error or msg}"
        self._refuse(ApiError(status, message))

    def _refuse(self, error: ApiError) -> None:
        """Say what is wrong, unless that would be in the middle of an answer; hang up.

        What comes yet is thrown away for a while: a connection that is closed with something unread
        is reset, and the client may not see what was said.
        """
        self._refused = True
        self._clear_deadline()
        if not self._answering or (self.cycle.more_body and not self.cycle.response_started):
            response = error.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            phrase = HTTPStatus(error.status).phrase.encode()
            head = [b"HTTP/1.1 %d %b\r\n" % (error.status, phrase)]
            head += [b"%b: %b\r\n" % header for header in headers]
            self.transport.write(b"".join([*head, b"\r\n", response.body]))
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _clear_deadline(self) -> None:
        self._begun = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self._begun:
            message = f"the head of the request did not come within {HEAD_S:g} s"
            self._refuse(ApiError(HTTPStatus.REQUEST_TIMEOUT, message))
        else:
            self.transport.close()


class _Connection(h11.Connection):
    """h11's parser, with limits on what it reads as a whole: its own are on what is incomplete."""

    def __init__(self, on_head: Callable[[], None]) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._on_head = on_head
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._on_head()
            self._chunks = self._bytes = 0
            lines = [event.target, *(name + b": " + value for name, value in event.headers)]
            if sum(len(line) + 2 for line in lines) > MAX_HEAD_BYTES:
                raise h11.RemoteProtocolError("large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            if not event.target.startswith(b"/"):  # a URL would name a host besides that header's
                raise h11.RemoteProtocolError("the target must be a path: /…")
        elif isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes // _CHUNK_BYTES:
                raise h11.RemoteProtocolError(f"send chunks of at least {_CHUNK_BYTES} bytes")
        return event


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
        self._page: PageGate | None = app.state.page
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
        self.failure: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        # Daemons, so that an exit in haste need not wait for them.
        threading.Thread(target=self._start_service, args=(loop,), daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing more, let requests under way end within the grace, cancel the rest."""
        closing = threading.Thread(target=self._service.close, daemon=True)
        closing.start()

        async def close_page() -> None:
            while closing.is_alive() and not self.force_exit:
                await asyncio.sleep(0.05)
            if self._page is not None:
                self._page.close()

        page_closed = asyncio.create_task(close_page())
        await super().shutdown(sockets)
        await page_closed

    def _start_service(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            model = self._load()
            scheduler = self._service.start(model)
            if self._page is not None:
                opening = self._page.open(self._page.make(model, scheduler))
                asyncio.run_coroutine_threadsafe(opening, loop)
            self._on_ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True


def run(server: Server, sock: socket.socket) -> None:
    """Serve until a signal comes: SIGTERM, SIGHUP or Ctrl-C; a second Ctrl-C ends it at once.

    Raises:
        Exception: the model could not be loaded.
    """
    with signals_end_well(server):
        server.run([sock])
    if server.force_exit:
        close_runtimes()
        os._exit(130)  # threads that still compute are not waited for, but for a call of an NPU
    if server.failure is not None:
        raise server.failure


@contextmanager
def signals_end_well(server: uvicorn.Server) -> Iterator[None]:
    """Ignore the signals that uvicorn repeats once it has stopped: to be stopped is no failure.

    The end of the terminal stops it, too, unless that is ignored (``nohup``).
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if number != signal.SIGHUP:
            signal.signal(number, lambda *_: None)
        elif handler != signal.SIG_IGN:
            signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
