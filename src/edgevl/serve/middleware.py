"""What stands before the routes: who may ask, what, and how much of it."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edgevl.serve.answers import Record
from edgevl.serve.bodies import Body
from edgevl.serve.errors import ApiError, busy, timed_out
from edgevl.serve.settings import BODIES_BYTES, EXTRA_IN_FLIGHT, Settings

_RETRY_AFTER_S = 1.0
#: What the API key is asked for.
_WITH_KEY = ("/v1/", "/metrics")


class HostCheck:
    """Refuses requests for other names than this machine's.

    A web page whose name is made to lead to this machine (DNS rebinding) could else read answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before ``app``."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] == "http" and not _is_loopback(Headers(scope=scope).get("host", "")):
            error = ApiError(
                403,
                "the Host header names another machine, and this server listens to its own only: "
                "ask for localhost, have a proxy do so, or start the server with --host",
            )
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::[0-9]+)?")


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
    """Asks for the API key, for the API and the metrics."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """Stand before ``app``."""
        self.app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith(_WITH_KEY):
            given = Headers(scope=scope).get("authorization", "")
            scheme, _, key = given.partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
            if scheme.lower() != "bearer" or not right:
                what = "Incorrect API key provided" if given else "You didn't provide an API key"
                error = ApiError(
                    401,
                    f"{what}: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Reads the bodies of the API's requests, within limits, before anything is made of them."""

    def __init__(self, app: ASGIApp, settings: Settings, paths: Collection[str]) -> None:
        """Stand before ``app``; ``paths`` are those that take bodies."""
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
            with anyio.move_on_after(self._settings.timeout_s) as in_time:
                await self._read(body, receive)
            if in_time.cancelled_caught:
                raise timed_out(self._settings.timeout_s)
            await self.app(scope, receive, send)
        except _LeftError:
            record: Record = scope["edgevl.record"]
            record.aborted = "client"
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
            raise busy(_RETRY_AFTER_S)

    async def _read(self, body: Body, receive: Receive) -> None:
        more = True
        while more:
            with anyio.move_on_after(self._settings.stall_s) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise ApiError(408, "the body of the request did not come")
            if message["type"] == "http.disconnect":
                raise _LeftError
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            if len(body.data) + len(chunk) > self._settings.max_request_bytes:
                raise self._too_large()
            body.hold(len(chunk))
            body.data += chunk

    def _hold(self, body: Body, size: int) -> None:
        body.held += size
        self._held += size
        if self._held > self._most_held:
            raise busy(_RETRY_AFTER_S)

    def _too_large(self) -> ApiError:
        most = self._settings.max_request_bytes
        return ApiError(
            413,
            f"the body is over the limit of {most} bytes: send fewer or smaller pictures",
            code="request_too_large",
        )


class _LeftError(Exception):
    """The client has left before its request was whole."""
