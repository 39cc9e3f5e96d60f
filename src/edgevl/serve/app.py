"""The application: its endpoints, and what stands before them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from edgevl.generate.model import Model
from edgevl.generate.scheduler import Scheduler
from edgevl.serve.completions import prepare_chat, prepare_completion
from edgevl.serve.errors import add_error_handlers, error_responses, unavailable
from edgevl.serve.middleware import BodyLimit, BodyRoute, HostCheck, KeyCheck
from edgevl.serve.requests import IGNORED_HEADER, ChatRequest, CompletionRequest
from edgevl.serve.responses import ChatCompletion, Completion, ModelBody, ModelList, Status
from edgevl.serve.service import AnswerResponse, Service
from edgevl.serve.telemetry import RequestLog
from edgevl.version import __version__

# Endpoints are the routes below, and nothing else names them: what is asked for the key, what takes
# a body, and what is told from the page's is read off `api`.

#: Asks for the key, where there is one.
api = APIRouter(route_class=BodyRoute)
#: Open to all.
state = APIRouter()

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, as events.",
        "content": {"text/event-stream": {}},
    },
    **error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504),
}


@api.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ANSWERS)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Go on with a conversation that may have pictures and videos."""
    return AnswerResponse(request, body, prepare_chat)


@api.post("/v1/completions", response_model=Completion, responses=_ANSWERS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text. Special tokens in it are special tokens."""
    return AnswerResponse(request, body, prepare_completion)


@api.get("/v1/models", responses=error_responses(401))
async def list_models(request: Request) -> ModelList:
    """List the models: one."""
    return ModelList(object="list", data=[_model(request)])


# A path, since names may be given that have slashes.
@api.get("/v1/models/{model:path}", responses=error_responses(401, 404))
async def retrieve_model(model: str, request: Request) -> ModelBody:
    """Describe a model."""
    _service(request).check_name(model)
    return _model(request)


@api.get("/metrics", response_class=PlainTextResponse, responses=error_responses(401))
async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(_service(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)


@state.get("/health", responses=error_responses())
async def health() -> Status:
    """Say that the process is alive."""
    return Status(status="ok")


@state.get("/ready", responses=error_responses(503))
async def ready(request: Request) -> Status:
    """Say whether requests are taken: not while the model is loaded, or the server stops."""
    if not _service(request).ready:
        raise unavailable("the model is being loaded, or the server stops")
    return Status(status="ok")


async def index() -> PlainTextResponse:
    """Say where to go on."""
    return PlainTextResponse("EdgeVL. The API is at /v1, its description at /docs.\n")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(request: Request) -> ModelBody:
    service = _service(request)
    return ModelBody(
        id=service.settings.name, object="model", created=service.created, owned_by="edgevl"
    )


def create_app(service: Service, page: PageGate | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: what answers; it may start later.
        page: what is at ``/``, if there is a page.
    """
    settings = service.settings
    routes = [route for route in api.routes if isinstance(route, APIRoute)]
    paths = [route.path for route in routes]
    app = FastAPI(title="EdgeVL", version=__version__, redoc_url=None)
    app.state.service, app.state.page = service, page
    add_error_handlers(app)
    # For the document; `KeyCheck` is what asks.
    guards = [Depends(HTTPBearer(auto_error=False))] if settings.api_key is not None else []
    app.include_router(api, dependencies=guards)
    app.include_router(state)
    if page is None:
        app.add_api_route("/", index, include_in_schema=False)
    else:
        # Not mounted, which would take whatever the API answers with 404 and 405.
        app.router.default = _elsewhere(page, app.router.not_found, paths)
    # The last one added is the first one asked.
    with_body = [route.path for route in routes if route.body_field]
    app.add_middleware(BodyLimit, settings=settings, paths=with_body)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, api_key=settings.api_key, paths=["/v1/", *paths])
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
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app


def _elsewhere(page: PageGate, not_found: ASGIApp, paths: list[str]) -> ASGIApp:
    """Return what takes requests for nothing of the API's: the page.

    What is wrong there is said in the API's way, also where a client's base URL lacks ``/v1``.
    """

    async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        inside = f"{path}/".startswith("/v1/") or f"/v1{path}" in paths
        await (not_found if inside else page)(scope, receive, send)

    return elsewhere


class PageGate:
    """An application that passes on to another, as soon as there is one.

    Attributes:
        make: makes the other, once the model is loaded.
    """

    def __init__(self, make: Callable[[Model, Scheduler], FastAPI]) -> None:
        self.make = make
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
