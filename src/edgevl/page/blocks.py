"""The web page: a conversation with pictures and videos, in a browser, with Gradio.

Nothing is fetched from the internet, neither by the server nor by the browser.
"""

from __future__ import annotations

import atexit
import hmac
import html
import importlib.util
import logging
import mimetypes
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from edgevl.errors import EdgeVLError, needs
from edgevl.generate.model import Model
from edgevl.generate.session import Answerer, Session, Turn
from edgevl.options import OPTIONS
from edgevl.page.conversation import Conversation, Conversations, PageTurn, Settings
from edgevl.page.texts import (
    LABELS,
    LATEX_DELIMITERS,
    asked_at,
    chat_messages,
    failure,
    language,
    statistics,
    stopped,
    working,
)
from edgevl.preprocess.image import MAX_BYTES
from edgevl.preprocess.picture import MAX_TILES
from edgevl.preprocess.video import DEFAULT_FRAMES, MAX_MEMORY_BYTES, MAX_SAMPLED

with needs("ui"):
    import gradio as gr
    from fastapi import FastAPI
    from starlette.routing import Mount
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Where the slider of differences ends. At half of it answers about films change already
#: (docs/performance.md).
LARGEST_THRESHOLD = 40
#: Answers at a time, and questions that wait for their turn; more are refused.
MOST_ANSWERING, MOST_WAITING = 16, 64
#: Uploads are deleted when they are this old, and it is looked so often, seconds.
UPLOAD_AGE_S, UPLOAD_CHECK_S = 6 * 3600, 600
#: Largest body of a request, bytes; uploaded files, which Gradio bounds itself, are another matter.
MAX_BODY_BYTES = 8 << 20
_UPLOADS = "/gradio_api/upload"
# A picture or link in an answer must not call out: what it names could tell what was said.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

_SLIDERS = [name for name, option in OPTIONS.items() if option.slider is not None]
_RARE = [name for name in _SLIDERS if OPTIONS[name].rare]
#: Whether the model thinks first. ``page.js`` translates what Gradio's `I18n` leaves as it is.
_THINKING = {"default": None, "yes": True, "no": False}

# Browsers, and Python's table, do not know all of these by their kind.
_PICTURES = ["image", ".heic", ".heif"]
_VIDEOS = ["video", ".mkv", ".webm", ".ts", ".flv", ".wmv", ".mxf", ".ivf", ".ogv"]

_log = logging.getLogger(__name__)

#: What a handler returns: the chat, the box, the line below.
Shown: TypeAlias = tuple[Any, Any, Any]


def create_page(
    new_session: Callable[[], Session],
    title: str,
    context: int,
    sees: bool = True,
    max_tiles: int | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> gr.Blocks:
    """Build the page; `mount_page` puts it into an application.

    Every tab has a conversation of its own. They are answered side by side, as far as the sessions
    allow that.

    Args:
        new_session: makes a session, such as `edgevl.generate.Model.chat`.
        title: the model's name.
        context: most tokens of prompt and answer.
        sees: whether the model takes pictures.
        max_tiles: most tiles of a picture unless the user sets another number; None for the
            model's own number, of which the page then says nothing.
        sampling: defaults of the checkpoint, `edgevl.checkpoint.config.ModelConfig.sampling`.
    """
    uploads = _private_uploads()
    conversations = Conversations(lambda: Conversation(new_session(), uploads))
    labels = gr.I18n(**LABELS, **dict.fromkeys(("zh-CN", "zh-TW"), LABELS["zh"]))
    films = sees and importlib.util.find_spec("av") is not None
    with gr.Blocks(
        analytics_enabled=False,
        title=title,
        fill_height=True,
        delete_cache=(UPLOAD_CHECK_S, UPLOAD_AGE_S),
    ) as page:
        gr.Markdown(html.escape(title), elem_id="title")
        chat = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            scale=1,
            height="100%",
            latex_delimiters=LATEX_DELIMITERS,
            allow_tags=False,
            editable="user",
            group_consecutive_messages=False,  # else only what stands alone can be edited
            buttons=["copy"],
            feedback_options=None,
            layout="bubble",
        )
        status = gr.Markdown(elem_id="status")
        box = gr.MultimodalTextbox(
            show_label=False,
            elem_id="box",
            sources=["upload"] if sees else [],
            file_types=_PICTURES * sees + _VIDEOS * films or None,
            file_count="multiple",
            placeholder=labels("ask_picture" if sees else "ask"),
            max_plain_text_length=1 << 20,  # longer text would be made a file
            autofocus=True,
        )
        with gr.Sidebar(labels("settings"), open=False, position="right", elem_id="settings"):
            if sees:
                with gr.Accordion(labels("camera"), open=False):
                    camera = gr.Image(
                        sources=["webcam"],
                        type="filepath",
                        format="jpeg",
                        show_label=False,
                        buttons=[],
                        elem_id="camera",
                    )
            settings, read = _settings(labels, context, sees, films, max_tiles, sampling or {})

        page.i18n_instance = labels
        _connect(page, conversations, context, read, chat, status, box, settings)
        if sees:
            camera.change(
                _add, [camera, box], [camera, box], api_visibility="private", show_progress="hidden"
            )
    _take_uploads_only(page, uploads)
    page.queue(api_open=False, max_size=MOST_WAITING, default_concurrency_limit=MOST_ANSWERING)
    return page


def mount_page(
    app: FastAPI,
    page: gr.Blocks,
    path: str = "/",
    max_upload_bytes: int | None = None,
    auth: Callable[[str, str], bool] | None = None,
) -> None:
    """Put the page into an application, with everything of Gradio turned off that it does not need.

    Args:
        app: the application.
        page: what `create_page` returned.
        path: where the page is.
        max_upload_bytes: largest file; default is that of pictures, or of videos if those are
            taken.
        auth: (name, password) -> whether they may enter.
    """
    if max_upload_bytes is None:
        films = importlib.util.find_spec("av") is not None
        max_upload_bytes = MAX_MEMORY_BYTES if films else MAX_BYTES
    gr.mount_gradio_app(
        app,
        page,
        path=path,
        auth=auth,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        i18n=page.i18n_instance,
        theme=gr.themes.Base(
            primary_hue="blue",
            neutral_hue="gray",
            font=["system-ui", "Noto Sans", "Noto Sans SC", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ),
        css_paths=Path(__file__).with_name("page.css"),
        head=f"<script>{Path(__file__).with_name('page.js').read_text('utf-8')}</script>",
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = PageGuard(mounted.app)


class PageGuard:
    """Bounds the bodies of requests, and adds headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise _TooLargeError
            return message

        upload = scope["path"].endswith(_UPLOADS)
        try:
            await self._app(scope, receive if upload else bounded, with_headers)
        except _TooLargeError:
            if not begun:
                await with_headers({"type": "http.response.start", "status": 413, "headers": []})
                await send({"type": "http.response.body", "body": b""})


class _TooLargeError(Exception):
    """A body is over the limit."""


def page_app(model: Model, answerer: Answerer, name: str, api_key: str | None) -> FastAPI:
    """Return an application that is the page of a model and nothing else.

    Args:
        model: the model.
        answerer: what answers, such as a `Scheduler` with that model.
        name: what the model is called.
        api_key: the page's password, with any name; None lets everyone in.
    """
    checkpoint = model.checkpoint
    config = checkpoint.config
    page = create_page(
        lambda: Session(checkpoint, answerer),
        f"EdgeVL · {name}",
        answerer.max_context,
        sees=checkpoint.has_vision,
        max_tiles=config.max_tiles if config.dynamic_tiling else None,
        sampling=config.sampling,
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_page(app, page, auth=None if api_key is None else password_check(api_key))
    return app


def password_check(key: str) -> Callable[[str, str], bool]:
    """Return a check of name and password: the name may be any; its time tells nothing."""
    expected = key.encode()
    return lambda name, password: hmac.compare_digest(password.encode(), expected)


def _take_uploads_only(page: gr.Blocks, uploads: Path) -> None:
    """Refuse files that were not uploaded.

    Gradio would fetch an address that a client names in place of a file, and in an application
    that it is mounted in, it would read any file of the server's.
    """
    preprocess, place = page.preprocess_data, uploads.resolve()

    def foreign(value: Any) -> bool:
        if isinstance(value, dict):
            path = value.get("path")
            if path and not Path(str(path)).resolve().is_relative_to(place):
                return True
            return any(map(foreign, value.values()))
        return isinstance(value, list) and any(map(foreign, value))

    async def checked(block_fn: Any, inputs: list[Any], *rest: Any, **more: Any) -> Any:
        if foreign(inputs):
            raise gr.Error("files must be uploaded", print_exception=False)
        return await preprocess(block_fn, inputs, *rest, **more)

    page.preprocess_data = checked


def _private_uploads() -> Path:
    """Give Gradio a directory that is this process's alone and ends with it."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        made = tempfile.mkdtemp(prefix="edgevl-page-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = made
    return Path(os.environ["GRADIO_TEMP_DIR"])


def _settings(
    labels: gr.I18n,
    context: int,
    sees: bool,
    films: bool,
    max_tiles: int | None,
    sampling: Mapping[str, Any],
) -> tuple[list[gr.components.Component], Callable[..., Settings]]:
    """Make the controls; return them, and what reads their values."""

    def slider(name: str) -> gr.components.Component:
        option = OPTIONS[name]
        assert option.slider is not None
        low, high, step = option.slider
        value = sampling.get(name, option.default)
        return gr.Slider(
            min(low, value),
            max(high, value),
            value,
            step=step,
            label=labels(name),
            info=labels("own") if name in sampling else None,
        )

    controls: dict[str, gr.components.Component] = {
        "system": gr.Textbox(label=labels("system"), lines=2, elem_id="system"),
        "thinking": gr.Radio(
            list(_THINKING), value="default", label=labels("thinking"), elem_id="thinking"
        ),
        "max_tokens": gr.Slider(
            1, context, min(512, context), step=1, label=labels("max_tokens"), elem_id="max_tokens"
        ),
        **{name: slider(name) for name in _SLIDERS if name not in _RARE},
        "seed": gr.Number(-1, precision=0, minimum=-1, label=labels("seed")),
    }
    if sees and max_tiles is not None:
        most = max(MAX_TILES, max_tiles)
        controls["max_tiles"] = gr.Slider(1, most, max_tiles, step=1, label=labels("max_tiles"))
    if films:
        controls["frames"] = gr.Slider(
            1, MAX_SAMPLED, DEFAULT_FRAMES, step=1, label=labels("frames")
        )
        controls["frame_threshold"] = gr.Slider(
            0,
            LARGEST_THRESHOLD,
            0,
            step=1,
            label=labels("frame_threshold"),
            info=labels("frame_threshold_is"),
        )
    with gr.Accordion(labels("more"), open=any(name in sampling for name in _RARE)):
        controls |= {name: slider(name) for name in _SLIDERS if name in _RARE}
    gr.Markdown(labels("next"))

    def read(*values: Any) -> Settings:
        given = dict(zip(controls, values, strict=True))
        tiles, seed = given.pop("max_tiles", None), given.pop("seed")
        return Settings(
            system=given.pop("system").strip() or None,
            thinking=_THINKING[given.pop("thinking")],
            max_tiles=None if tiles is None else int(tiles),
            frames=int(given.pop("frames", DEFAULT_FRAMES)),
            frame_threshold=float(given.pop("frame_threshold", 0)),
            sampling=given
            | {name: int(given[name]) for name in given if OPTIONS[name].kind == "integer"}
            | {"seed": None if seed is None or seed < 0 else seed},
        )

    return list(controls.values()), read


def _connect(
    page: gr.Blocks,
    conversations: Conversations,
    context: int,
    read: Callable[..., Settings],
    chat: gr.Chatbot,
    status: gr.Markdown,
    box: gr.MultimodalTextbox,
    settings: list[gr.components.Component],
) -> None:
    """Say what happens when the user does something.

    The conversation itself stays here; the browser has a copy to show. So nothing that a browser
    sends can put words into the model's mouth.
    """

    def of(request: gr.Request) -> Conversation:
        return conversations.of(str(request.session_hash))

    def ready(**typed: Any) -> dict[str, Any]:
        return gr.update(submit_btn=True, stop_btn=False, **typed)

    def show(
        request: gr.Request,
        turn: PageTurn,
        given: tuple[Any, ...],
        keep: list[PageTurn] | None = None,
    ) -> Iterator[Shown]:
        """Have ``turn`` answered, and show it as it grows."""
        conversation, lang = of(request), _language(request)
        cleared = {"value": {"text": "", "files": []}} if keep is None else {}
        yield gr.skip(), gr.update(submit_btn=False, stop_btn=True, **cleared), ""
        started = time.monotonic()
        for _ in conversation.ask(turn, read(*given), keep):
            begun = turn.reply or turn.thinking
            line = gr.skip() if begun else working(time.monotonic() - started, lang)
            yield chat_messages(conversation.turns, lang, growing=True), gr.skip(), line
        if conversation.asked is not turn:  # cleared, taken back or asked anew meanwhile
            growing = conversation.asked is not None
            yield chat_messages(conversation.turns, lang, growing), gr.skip(), gr.skip()
            return
        line, restored = "", {}
        if turn.answer:
            line = statistics(turn.answer, context, lang)
        elif turn.error:
            line = failure(turn, lang)
            gr.Warning(html.escape(line))
            if not isinstance(turn.error, EdgeVLError):
                _log.error("a question could not be answered", exc_info=turn.error)
        else:
            line = stopped(lang)
        if turn not in conversation.turns and cleared:
            restored = {"value": _typed(turn)}  # nothing came of it: to be mended and asked again
        shown = chat_messages(conversation.turns, lang)
        yield shown, ready(**restored), html.escape(line)

    nothing: Shown = (gr.skip(), gr.skip(), gr.skip())

    def ask(request: gr.Request, typed: dict[str, Any], *given: Any) -> Iterator[Shown]:
        turn = _turn(typed)
        if turn.text.strip() or turn.shown:
            yield from show(request, turn, given)
        else:
            yield nothing

    def retry(request: gr.Request, *given: Any) -> Iterator[Shown]:
        if turns := of(request).turns:
            yield from show(request, turns[-1].again(), given, turns[:-1])
        else:
            yield nothing

    def edit(event: gr.EditData, request: gr.Request, *given: Any) -> Iterator[Shown]:
        turns = of(request).turns
        index = event.index[0] if isinstance(event.index, list | tuple) else event.index
        number = asked_at(turns, index)
        if number is None or not isinstance(event.value, str):
            yield chat_messages(turns, _language(request)), gr.skip(), gr.skip()
        else:
            yield from show(request, turns[number].again(event.value), given, turns[:number])

    def undo(request: gr.Request) -> Shown:
        conversation = of(request)
        turn = conversation.undo()
        typed = {"value": _typed(turn)} if turn else {}
        return chat_messages(conversation.turns, _language(request)), ready(**typed), ""

    def clear(request: gr.Request) -> Shown:
        of(request).clear()
        return [], ready(), ""

    def stop(request: gr.Request) -> None:
        of(request).stop()

    def close(request: gr.Request) -> None:
        conversations.close(str(request.session_hash))

    shown = [chat, box, status]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    # One limit for all that has the model compute.
    limit: dict[str, Any] = {"concurrency_limit": MOST_ANSWERING, "concurrency_id": "answers"}
    box.submit(ask, [box, *settings], shown, **private, **limit)
    chat.retry(retry, settings, shown, **private, **limit)
    chat.edit(edit, settings, shown, **private, **limit)
    chat.undo(undo, None, shown, **private)
    chat.clear(clear, None, shown, **private)
    box.stop(stop, None, None, queue=False, **private)
    page.unload(close)


def _language(request: gr.Request) -> str:
    return language(request.headers.get("accept-language", ""))


def _turn(typed: dict[str, Any]) -> PageTurn:
    """Return what stands in the box as a turn."""
    files = [Path(name) for name in typed.get("files") or ()]
    videos = [path for path in files if _is_video(path)]
    pictures = [path for path in files if path not in videos]
    return PageTurn.of(typed.get("text") or "", pictures, videos)


def _typed(turn: Turn) -> dict[str, Any]:
    """Return a turn as what stands in the box."""
    files = [str(each.source) for each in turn.shown if each.source.exists()]
    return {"text": turn.text, "files": files}


def _is_video(path: Path) -> bool:
    kind = mimetypes.guess_type(path.name)[0] or ""
    return kind.startswith("video/") or path.suffix.lower() in _VIDEOS


def _add(photo: str | None, typed: dict[str, Any]) -> tuple[Any, Any]:
    """Put a photo into the box, and make the camera ready for another."""
    if photo is None:  # it has just been made ready
        return gr.skip(), gr.skip()
    return None, {"text": typed.get("text") or "", "files": [*(typed.get("files") or ()), photo]}
