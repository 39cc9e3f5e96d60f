"""HTTP as uvicorn speaks it, with limits on heads of requests and refusals in the API's shape."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from edgevl.serve.errors import ApiError

#: Most bytes of a head: the request line and all headers.
MAX_HEAD_BYTES = 2**16
#: Seconds in which a head must have come, from the beginning of the connection or its first byte.
HEAD_S = 10.0


class Protocol(HttpToolsProtocol):
    """A connection.

    Of uvicorn's parsers, httptools: with h11 a body in chunks of a few bytes takes seconds for each
    megabyte, in which nobody else is answered.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Take what uvicorn gives a protocol."""
        super().__init__(*arguments, **more)
        self._deadline: asyncio.TimerHandle | None = None
        #: Bytes since the last that were a whole head, or of a body: the parser keeps them.
        self._kept = 0
        self._fault = ApiError(HTTPStatus.BAD_REQUEST, "the request is not valid HTTP/1.1")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._clear_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._deadline is None and not self._answering:
            self._set_deadline()
        self._kept += len(data)
        super().data_received(data)
        if self._kept > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_large_head())

    def on_headers_complete(self) -> None:
        """Answer, if the head is one that can be answered.

        Raises:
            ApiError: it is not; the parser makes an error of its own of it.
        """
        self._clear_deadline()
        self._kept = 0
        try:
            self._check_head()
        except ApiError as error:
            self._fault = error
            raise
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._kept = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a body."""
        self._kept = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong, unless that would be in the middle of an answer; hang up."""
        if not self._answering or (self.cycle.more_body and not self.cycle.response_started):
            response = self._fault.response()
            headers = [*self.server_state.default_headers, *response.raw_headers]
            lines = [b"%b: %b\r\n" % header for header in [*headers, (b"connection", b"close")]]
            head = [STATUS_LINE[response.status_code], *lines, b"\r\n"]
            self.transport.write(b"".join([*head, response.body]))
        self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _check_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise _large_head()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise ApiError(HTTPStatus.BAD_REQUEST, "the request must have one Host header")
        if not self.url.startswith(b"/"):  # a whole URL would name a host besides that header's
            raise ApiError(HTTPStatus.BAD_REQUEST, "the request's target must be a path: /…")

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self._give_up)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self._kept:
            message = f"the head of the request did not come within {HEAD_S:g} s"
            self._refuse(ApiError(HTTPStatus.REQUEST_TIMEOUT, message))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        self._fault = error
        self.send_400_response("")


def _large_head() -> ApiError:
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes: send shorter headers",
    )
