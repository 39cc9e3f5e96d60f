"""``edgevl ui``: a conversation in the browser."""

from __future__ import annotations

import socket
from typing import Any

import click

from edgevl.cli.options import flags, listen_options, load_model, model_name
from edgevl.cli.terminal import tell, translated
from edgevl.errors import needs
from edgevl.machine import share_heap
from edgevl.options import LoadOptions

#: What is under way when the page ends has so long to be broken off, seconds.
FAREWELL_S = 2


@click.command("ui")
@click.argument("model")
@listen_options(port=7860)
@flags(LoadOptions)
def command(model: str, host: str, port: int, api_key: str | None, **loading: Any) -> None:
    """Open a page in the browser that talks to MODEL about pictures and videos.

    \b
    edgevl ui tiny
    EDGEVL_API_KEY=secret edgevl ui OpenGVLab/InternVL3_5-1B --host 0.0.0.0
    """  # noqa: D301
    with needs("ui"):
        import uvicorn

        from edgevl.page import page_app
        from edgevl.serve.middleware import HostCheck
        from edgevl.serve.server import Protocol, is_loopback, listen, signals_end_well

    share_heap()
    # What can fail at once fails before the model is loaded.
    with listen(host, port) as sock:
        from edgevl.generate.scheduler import Scheduler

        loaded = load_model(model, **loading)
        scheduler = Scheduler(loaded)
        app = page_app(loaded, scheduler, model_name(model), api_key)
        if is_loopback(sock):
            app.add_middleware(HostCheck)
        _announce(sock, bool(api_key))
        # Its messages are about browsers that have left.
        settings = uvicorn.Config(
            app,
            http=Protocol,
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=FAREWELL_S,
        )
        server = uvicorn.Server(settings)
        try:
            with signals_end_well(server):
                server.run(sockets=[sock])
        finally:
            scheduler.close(0)


def _announce(sock: socket.socket, locked: bool) -> None:
    from edgevl.serve.server import is_loopback, url_of

    url = url_of(sock)
    click.echo(translated(f"{url}/  (Ctrl-C ends it)", f"页面地址：{url}/（按 Ctrl-C 结束）"))
    if not locked and not is_loopback(sock):
        tell(
            "warning: there is no password: whoever reaches this machine can use the page; "
            "set EDGEVL_API_KEY",
            "警告：未设密码，能访问本机的人都可以使用此页面；可用环境变量 EDGEVL_API_KEY 设置密码",
        )
