"""``edgevl serve``: the OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import engine_options, listen_options, load_model, model_name
from edgevl.cli.terminal import tell
from edgevl.machine import share_heap
from edgevl.optional import needs
from edgevl.serve.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from edgevl.generate import Model
    from edgevl.generate.scheduler import Scheduler


def _check_origins(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> Any:
    for origin in value:
        # As browsers write it in the header Origin, which is compared to the letter.
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
            raise click.BadParameter(
                f"{origin!r} is no origin; write it like https://example.org or "
                "http://localhost:3000, without a path, or * for any"
            )
    return value


@click.command("serve")
@click.argument("model")
@listen_options(port=8000)
@click.option(
    "--served-name",
    metavar="NAME",
    help="What clients call the model.  [default: MODEL's last part]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 10_000),
    default=Settings.max_queue,
    show_default=True,
    metavar="N",
    help="Most requests that wait; more are told to come later.",
)
@click.option(
    "--max-request-mb",
    type=click.IntRange(1, 1024),
    default=Settings.max_request_bytes // 10**6,
    show_default=True,
    metavar="MB",
    help="Largest request, pictures included.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=Settings.timeout_s,
    show_default=True,
    metavar="S",
    help="Most seconds for a request, waiting included.",
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=Settings.grace_s,
    show_default=True,
    metavar="S",
    help="Seconds that requests under way have when the server is stopped.",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A host from which pictures and videos are fetched. Repeatable.  [default: none]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    callback=_check_origins,
    help="An origin whose pages may call the server. Repeatable.  [default: none]",
)
@click.option("--strict", is_flag=True, help="Refuse fields that are not known, not ignore them.")
@click.option("--no-ui", is_flag=True, help="Have no page at /.")
@engine_options
def command(
    model: str,
    host: str,
    port: int,
    served_name: str | None,
    max_request_mb: int,
    no_ui: bool,
    **options: Any,
) -> int:
    """Serve MODEL to programs that speak OpenAI's API, at http://HOST:PORT/v1.

    \b
    edgevl serve tiny
    """  # noqa: D301
    with needs("serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    from edgevl.serve.app import PageGate, create_app
    from edgevl.serve.server import Server, is_loopback, listen, run, url_of
    from edgevl.serve.service import Service
    from edgevl.serve.telemetry import log_to_stderr

    share_heap()
    sock = listen(host, port)
    url = url_of(sock)
    # What is no setting of the server is the engine's.
    names = {field.name for field in fields(Settings)} & set(options)
    settings = Settings(
        name=served_name or model_name(model),
        max_request_bytes=max_request_mb * 10**6,
        loopback=is_loopback(sock),
        **{name: options.pop(name) for name in names},
    )
    if not settings.loopback and settings.api_key is None:
        tell(
            "warning: whoever reaches this machine can use the server: set EDGEVL_API_KEY",
            "警告：能访问本机的人都可以使用此服务，请设置 EDGEVL_API_KEY",
        )

    def on_ready() -> None:
        tell(
            f"{settings.name} is served at {url}/v1 (Ctrl-C stops it)",
            f"{settings.name} 已在 {url}/v1 提供服务（按 Ctrl-C 停止）",
        )

    page = None
    if not no_ui and importlib.util.find_spec("gradio") is not None:
        page = PageGate(page_maker(settings.name, settings.api_key))
    app = create_app(Service(settings), page)
    log_to_stderr()
    run(Server(app, lambda: load_model(model, **options), on_ready), sock)
    return 0


def page_maker(name: str, api_key: str | None) -> Callable[[Model, Scheduler], FastAPI]:
    """Return what makes the page once the model is loaded; Gradio is imported no sooner."""

    def make(model: Model, scheduler: Scheduler) -> FastAPI:
        from edgevl.page import page_app

        return page_app(model, scheduler, name, api_key)

    return make
