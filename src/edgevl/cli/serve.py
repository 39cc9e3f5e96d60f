"""``edgevl serve``: the OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import flags, listen_options, load_model, model_name, taken
from edgevl.cli.terminal import tell
from edgevl.errors import needs
from edgevl.machine import share_heap
from edgevl.options import LoadOptions
from edgevl.serve.settings import Settings

if TYPE_CHECKING:
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
@flags(Settings, cors_origins=_check_origins)
@click.option("--no-ui", is_flag=True, help="Have no page at /.")
@flags(LoadOptions)
def command(
    model: str,
    host: str,
    port: int,
    served_name: str | None,
    api_key: str | None,
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
    settings = Settings(
        name=served_name or model_name(model),
        api_key=api_key,
        loopback=is_loopback(sock),
        **taken(Settings, options),
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

    def make_page(model: Model, scheduler: Scheduler) -> FastAPI:
        from edgevl.page import page_app  # once the model is loaded, as Gradio takes a while

        return page_app(model, scheduler, settings.name, settings.api_key)

    has_page = not no_ui and importlib.util.find_spec("gradio") is not None
    app = create_app(Service(settings), PageGate(make_page) if has_page else None)
    log_to_stderr()
    run(Server(app, lambda: load_model(model, **options), on_ready), sock)
    return 0
