"""HTTP as uvicorn speaks it, with limits on heads of requests and refusals in the API's shape."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgevl.serve.errors import ApiError

#: Most bytes of a head: the request line and all headers.
MAX_HEAD_BYTES = 2**16
#: Seconds in which a head must have come, from the beginning of the connection or its first byte.
HEAD_S = 10.0
#: Chunks of a body may be small, but not all of many: each takes h11 some 20 µs, in which nobody
#: else is answered. So many may be of any size, beyond them one for so many bytes.
_FREE_CHUNKS, _CHUNK_BYTES = 512, 256
#: Seconds in which what a client still sends is thrown away after a refusal.
_LINGER_S = 2.0


class Protocol(H11Protocol):
    """A connection."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Take what uvicorn gives a protocol."""
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
