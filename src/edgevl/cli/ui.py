"""``edgevl ui``: a conversation in the browser."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import click

from edgevl.cli.options import as_unicode, engine_options, model_name
from edgevl.cli.terminal import chinese, ends_like_ctrl_c, note, show_notes
from edgevl.optional import needs
from edgevl.serve.listening import is_loopback, listen, url_of

if TYPE_CHECKING:
    from edgevl.engine import KVCacheFormat, Precision

#: What is under way when the page ends has so long to be broken off, seconds.
FAREWELL_S = 2


def _check_password(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    # A variable that is not set (--api-key "$KEY") must not open the page to everyone.
    if value is not None and not value.strip():
        raise click.BadParameter("must not be empty")
    return as_unicode(value)


@click.command("ui")
@click.argument("model")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; 0.0.0.0 lets other machines in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    metavar="N",
    help="0 takes any that is free.",
)
@click.option(
    "--api-key",
    envvar="EDGEVL_API_KEY",
    metavar="KEY",
    callback=_check_password,
    help="Password of the page.  [environment: EDGEVL_API_KEY, which others cannot see]",
)
@engine_options
def command(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    engine: str,
    max_context: int | None,
    precision: Precision,
    kv_cache: KVCacheFormat,
    threads: int | None,
) -> None:
    """Open a page in the browser that talks to MODEL about pictures and videos.

    \b
    edgevl ui tiny
    EDGEVL_API_KEY=secret edgevl ui OpenGVLab/InternVL3_5-1B --host 0.0.0.0
    """  # noqa: D301
    with needs("ui"):
        import uvicorn
        from fastapi import FastAPI

        from edgevl.page import mount_page, page_of, password_check
        from edgevl.serve.middleware import HostCheck

    # What can fail at once fails before the model is loaded.
    with contextlib.suppress(KeyboardInterrupt), ends_like_ctrl_c(), listen(host, port) as sock:
        import edgevl
        from edgevl.generate.scheduler import Scheduler

        note(f"{'正在加载' if chinese() else 'loading'} {model} …")
        loaded = edgevl.load(
            model,
            engine=engine,
            max_context=max_context,
            precision=precision,
            threads=threads,
            kv_cache=kv_cache,
        )
        show_notes(loaded.engine.notes)
        scheduler = Scheduler(loaded)
        page = page_of(loaded, scheduler, model_name(model))
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mount_page(app, page, auth=password_check(api_key) if api_key else None)
        if is_loopback(sock):
            app.add_middleware(HostCheck)
        _announce(sock, bool(api_key))
        # Its messages are about browsers that have left.
        settings = uvicorn.Config(
            app, log_level="critical", access_log=False, timeout_graceful_shutdown=FAREWELL_S
        )
        try:
            uvicorn.Server(settings).run(sockets=[sock])
        finally:
            scheduler.close(0)


def _announce(sock: socket.socket, locked: bool) -> None:
    url = url_of(sock)
    click.echo(f"页面地址：{url}/（按 Ctrl-C 结束）" if chinese() else f"{url}/  (Ctrl-C ends it)")
    if not locked and not is_loopback(sock):
        click.echo(
            "警告：未设密码，能访问本机的人都可以使用此页面；可用环境变量 EDGEVL_API_KEY 设置密码"
            if chinese()
            else "warning: there is no password: whoever reaches this machine can use the page; "
            "set EDGEVL_API_KEY",
            err=True,
        )
