"""The application: routes, and what stands before them."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from edgevl.serve import chat, completions
from edgevl.serve.errors import add_error_handlers, error_responses, unavailable
from edgevl.serve.ignored import HEADER as IGNORED_HEADER
from edgevl.serve.logs import RequestLog
from edgevl.serve.middleware import BodyLimit, HostCheck, KeyCheck
from edgevl.serve.responses import ModelBody, ModelList, Status
from edgevl.serve.service import Service, service_of
from edgevl.version import __version__

_API = (chat.PATH, completions.PATH, "/v1/models")

router = APIRouter()
state = APIRouter()


@router.get("/v1/models", responses=error_responses(401))
async def list_models(request: Request) -> ModelList:
    """List the models: one."""
    return ModelList(object="list", data=[_model(service_of(request))])


# A path, since names may be given that have slashes.
@router.get("/v1/models/{model:path}", responses=error_responses(401, 404))
async def retrieve_model(model: str, request: Request) -> ModelBody:
    """Describe a model."""
    service = service_of(request)
    service.check_name(model)
    return _model(service)


def _model(service: Service) -> ModelBody:
    return ModelBody(
        id=service.settings.name, object="model", created=service.created, owned_by="edgevl"
    )


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=error_responses(401),
)
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)


@state.get("/health", responses=error_responses())
async def health() -> Status:
    """Say that the process is alive."""
    return Status(status="ok")


@state.get("/ready", responses=error_responses(503))
async def ready(request: Request) -> Status:
    """Say whether requests are taken: not while the model is loaded, or the server stops."""
    if not service_of(request).ready:
        raise unavailable("the model is being loaded, or the server stops")
    return Status(status="ok")


async def index() -> PlainTextResponse:
    """Say where to go on."""
    return PlainTextResponse("EdgeVL. The API is at /v1, its description at /docs.\n")


def _elsewhere(page: PageGate, not_found: ASGIApp) -> ASGIApp:
    """Return what takes requests for nothing of the API's: the page.

    What is wrong there is said in the API's way, also where a client's base URL lacks ``/v1``.
    """

    async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        inside = f"{path}/".startswith("/v1/") or f"/v1{path}" in _API
        await (not_found if inside else page)(scope, receive, send)

    return elsewhere


def create_app(service: Service, page: PageGate | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: what answers; it may start later.
        page: what is at ``/``, if there is a page.
    """
    settings = service.settings
    app = FastAPI(title="EdgeVL", version=__version__, redoc_url=None)
    app.state.service = service
    add_error_handlers(app)
    guards: list[Any] = []
    if settings.api_key is not None:
        # For the document; `KeyCheck` is what asks.
        guards = [Depends(HTTPBearer(auto_error=False))]
    for part in (chat.router, completions.router, router):
        app.include_router(part, dependencies=guards)
    app.include_router(state)
    if page is None:
        app.add_api_route("/", index, include_in_schema=False)
    else:
        # Not mounted, which would take whatever the API answers with 404 and 405.
        app.router.default = _elsewhere(page, app.router.not_found)
    # The last one added is the first one asked.
    app.add_middleware(BodyLimit, settings=settings, paths=(chat.PATH, completions.PATH))
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, api_key=settings.api_key)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", IGNORED_HEADER],
        )
    if settings.loopback:
        app.add_middleware(HostCheck)
    app.add_middleware(RequestLog, service=service)
    return app


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
