"""The web page: its conversation and markup, its server, and all of it in a real Chromium."""

import asyncio
import errno
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing

import pytest
from PIL import Image

import edgevl
from edgevl import cli
from edgevl.errors import ContextLengthError, ImageError
from edgevl.generate import Answer, Piece, Session, Stream, Timings, Usage
from edgevl.generate.scheduler import Scheduler
from page_browser import CHROMIUM, answered, ask, attach, chromium, open_page, served
from repository import EXAMPLES

pytest.importorskip("gradio", reason="needs edgevl[ui]")

from edgevl.cli import ui
from edgevl.page import blocks, create_page, password_check, texts
from edgevl.page.conversation import MAX_FILES, Conversation, Conversations, PageTurn, Settings
from edgevl.serve.server import listen

METER, SHAPES = EXAMPLES / "meter.png", EXAMPLES / "shapes.png"
QUESTION = "What number is on the display?"


class Scripted:
    """A session that says what a test tells it to, and keeps turns as the real one does."""

    def __init__(self, say, pause_s=0.0):
        self.say, self.pause_s = say, pause_s
        self.turns, self.calls, self.made = [], [], []
        self.words = 0  # said so far, whatever became of the answers

    def new(self):
        """Take the place of ``Model.chat``; sessions share the script and what was counted."""
        session = Scripted(self.say, self.pause_s)
        session.calls, session.owner = self.calls, self
        self.made.append(session)
        return session

    def undo(self):
        return self.turns.pop() if self.turns else None

    def reset(self):
        self.turns = []

    def answer(self, turn, after, frames, **sampling):
        call = {"text": turn.text, "images": turn.files, "frames": frames, **sampling}
        self.calls.append(call)
        return Stream(self._pieces(turn, [*after, turn]))

    def _pieces(self, turn, turns):
        try:
            for part in self.say(turn.text):
                if isinstance(part, Exception):
                    raise part
                self.owner.words += 1
                if getattr(part, "thinking", False):
                    turn.thinking += part
                else:
                    turn.reply += part
                yield part if isinstance(part, Piece) else Piece(part)
                time.sleep(self.pause_s)
            turn.answer = Answer(
                turn.reply, "", (1, 2), "stop", Usage(10, 4, 2, 3), Timings(1, 2, 3, 40, 5, 200)
            )
            return turn.answer
        finally:
            if turn.reply and not isinstance(sys.exc_info()[1], RuntimeError):
                self.turns = turns


def talk(conversation, text, keep=None, **settings):
    turn = PageTurn(text)
    for _ in conversation.ask(turn, Settings(**settings), keep):
        pass
    return turn


@pytest.fixture
def echo(tmp_path):
    """A conversation with a model that repeats the question in capitals."""
    script = Scripted(lambda text: [text.upper()])
    conversation = Conversation(script.new(), tmp_path)
    conversation.script = script
    return conversation


# -- the conversation


def test_turns_follow_one_another(echo):
    first = talk(echo, "one", sampling={"seed": 4})
    second = talk(echo, "two")
    assert [turn.reply for turn in echo.turns] == ["ONE", "TWO"]
    assert first.answer.text == "ONE"
    asked = {"text": "one", "images": [], "frames": 8, "frame_threshold": 0.0, "seed": 4}
    assert echo.script.calls[0] == asked
    assert echo.turns == [first, second]


def test_an_edited_question_replaces_all_that_followed(echo):
    first, second = talk(echo, "one"), talk(echo, "two")
    talk(echo, "three")
    talk(echo, second.again("TWO?").text, keep=[first])
    assert [turn.text for turn in echo.turns] == ["one", "TWO?"]


def test_undo_and_clear(echo):
    assert echo.undo() is None
    talk(echo, "one")
    talk(echo, "two")
    assert echo.undo().text == "two"
    assert [turn.text for turn in echo.turns] == ["one"]
    echo.clear()
    assert echo.turns == []
    talk(echo, "three")
    assert [turn.text for turn in echo.turns] == ["three"]


def test_settings_go_with_the_next_question(tmp_path):
    session = edgevl.load("tiny", engine="reference").chat()
    conversation = Conversation(session, tmp_path)
    talk(conversation, "one", sampling={"max_tokens": 1})
    assert (session.system, session.thinking, session.max_tiles) == (None, None, None)
    talk(conversation, "two", sampling={"max_tokens": 1}, system="Be brief.", thinking=False)
    assert (session.system, session.thinking) == ("Be brief.", False)
    assert [turn.text for turn in conversation.turns] == ["one", "two"]
    assert [message.role for message in session.messages] == ["user", "assistant"] * 2


def test_an_error_leaves_everything_as_it_was(tmp_path):
    script = Scripted(lambda text: [RuntimeError("broken")] if text == "bad" else ["fine"])
    conversation = Conversation(script.new(), tmp_path)
    talk(conversation, "good")
    turn = talk(conversation, "bad", keep=[])
    assert str(turn.error) == "broken"
    assert [turn.text for turn in conversation.turns] == ["good"]
    too_many = PageTurn.of("many", [METER] * (MAX_FILES + 1))
    list(conversation.ask(too_many, Settings()))
    assert "more than 32 files" in str(too_many.error)
    assert "exceeds" in str(talk(conversation, "x" * (1 << 20) + "x").error)
    assert [call["text"] for call in script.calls] == ["good", "bad"]


def test_stopping_keeps_what_was_said(tmp_path):
    script = Scripted(lambda text: (f"{number} " for number in range(10_000)), pause_s=0.01)
    conversation = Conversation(script.new(), tmp_path)
    turn = PageTurn("count")
    asked = conversation.ask(turn, Settings())
    while len(turn.reply) < 6:
        next(asked)
    conversation.stop()
    for _ in asked:
        pass
    assert turn.answer is None
    assert conversation.turns == [turn]
    # Closing the iterator, as Gradio does when the tab is closed, stops as well.
    again = conversation.ask(turn.again(), Settings())
    next(again)
    again.close()
    conversation._reading.join(5)
    assert not conversation._reading.is_alive()
    assert script.words < 500


def test_a_question_stopped_before_the_first_word_is_forgotten(tmp_path):
    went_on = threading.Event()
    conversation = Conversation(
        Scripted(lambda text: went_on.wait(5) and [Piece("hm", True), "yes"]).new(), tmp_path
    )
    asked = conversation.ask(PageTurn("well?"), Settings())
    next(asked)
    conversation.stop()
    went_on.set()
    assert list(asked) is not None
    assert conversation.turns == []


def test_two_tabs_wait_for_one_another(tmp_path):
    """Also where one thread shows both, as Gradio's may."""
    model = edgevl.load("tiny")
    turns = [PageTurn.of(QUESTION, [METER]) for _ in range(2)]
    asked = [Conversation(model.chat(), tmp_path).ask(turn, Settings()) for turn in turns]
    while any([next(one, True) is None for one in asked]):  # noqa: C419 - each of them goes on
        pass
    assert [turn.reply for turn in turns] == ["7305", "7305"]


def test_boxes_are_drawn_on_the_picture_asked_about_before(tmp_path):
    answer = "<ref>star</ref><box>[[610, 100, 860, 430]]</box>"
    script = Scripted(lambda text: ["a star"] if text == "what?" else [answer])
    conversation = Conversation(script.new(), tmp_path)
    list(conversation.ask(PageTurn.of("what?", [SHAPES]), Settings()))
    turn = talk(conversation, "where?")
    with Image.open(turn.drawing) as drawn, Image.open(SHAPES) as original:
        assert drawn.size == original.size
        assert drawn.convert("RGB").tobytes() != original.convert("RGB").tobytes()
    assert conversation.turns[0].drawing is None


def test_a_closed_tab_lingers_for_a_while(tmp_path, monkeypatch):
    conversations = Conversations(
        lambda: Conversation(Scripted(lambda text: ["x"]).new(), tmp_path)
    )
    a = conversations.of("a")
    conversations.close("a")
    conversations.close("unknown")
    assert conversations.of("a") is a  # back in time
    conversations.close("a")
    monkeypatch.setattr(Conversations, "LINGER_S", -1.0)
    conversations.of("b")
    assert len(conversations) == 1
    monkeypatch.setattr(Conversations, "MOST", 3)
    for tab in "cdb":
        conversations.of(tab)
    b = conversations.of("b")
    conversations.of("e")
    assert len(conversations) == 3
    assert conversations.of("b") is b


@pytest.mark.parametrize("how", ["the tab is closed", "others make room", "another question"])
def test_what_nobody_waits_for_any_more_is_stopped(tmp_path, monkeypatch, how):
    monkeypatch.setattr(Conversations, "MOST", 1)
    script = Scripted(lambda text: (f"{number} " for number in range(10_000)), pause_s=0.01)
    conversations = Conversations(lambda: Conversation(script.new(), tmp_path))
    conversation = conversations.of("a")
    turn = PageTurn("count")
    asked = conversation.ask(turn, Settings())
    while not turn.reply:
        next(asked)
    reading = conversation._reading
    if how == "the tab is closed":
        conversations.close("a")
    elif how == "others make room":
        conversations.of("b")
    else:
        next(another := conversation.ask(PageTurn("count"), Settings()))
        assert not reading.is_alive()  # one session answers one question at a time
        another.close()
    reading.join(5)
    assert not reading.is_alive()
    assert script.words < 500


def test_what_is_cleared_or_taken_back_is_stopped_first(tmp_path):
    script = Scripted(lambda text: (f"{number} " for number in range(10_000)), pause_s=0.01)
    conversation = Conversation(script.new(), tmp_path)
    for forget in (conversation.clear, conversation.undo):
        turn = PageTurn("count")
        asked = conversation.ask(turn, Settings())
        while not turn.reply:
            next(asked)
        forget()
        assert not conversation._reading.is_alive()
        assert conversation.turns == []
        asked.close()


def test_who_comes_back_is_not_forgotten_for_having_been_away(tmp_path, monkeypatch):
    conversations = Conversations(
        lambda: Conversation(Scripted(lambda text: ["x"]).new(), tmp_path)
    )
    a = conversations.of("a")
    conversations.close("a")
    conversations.of("a")
    monkeypatch.setattr(Conversations, "LINGER_S", -1.0)
    conversations.of("b")
    assert conversations.of("a") is a


def test_drawings_are_of_the_latest_picture_and_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("edgevl.page.conversation.DRAWING_SIDE", 32)
    script = Scripted(lambda text: ["<box>[[610, 100, 860, 430]]</box>"])
    conversation = Conversation(script.new(), tmp_path)
    tall, wide = tmp_path / "tall.png", tmp_path / "wide.png"
    Image.new("RGB", (40, 80)).save(tall)
    Image.new("RGB", (80, 40)).save(wide)
    for path in (tall, wide):
        list(conversation.ask(turn := PageTurn.of("where?", [path]), Settings()))
    with Image.open(turn.drawing) as drawn:
        assert drawn.size == (32, 16)
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    wide.unlink()  # as old uploads are
    turn = talk(conversation, "and now?")
    conversation._reading.join(5)
    assert turn.answer
    assert turn.drawing is None
    assert failed == []


# -- what is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so $x^2$ and $a$, $b$", r"so \(x^2\) and \(a\), \(b\)"),
        ("from $12.50 to $20", "from $12.50 to $20"),
        ("$5 and $6", "$5 and $6"),
        ("$$x$$ and `$x$`", "$$x$$ and `$x$`"),
        ("```\n$x$ <box>[[1]]</box>", "```\n$x$ <box>[[1]]</box>"),
        ("<ref>cup</ref><box>[[1, 2, 3, 4]]</box>.", "**cup** `[[1, 2, 3, 4]]`."),
        ("<box>[[1, 2, 3, 4]]</box>", "`[[1, 2, 3, 4]]`"),
    ],
)
def test_markdown(text, shown):
    assert texts.markdown(text) == shown


def test_messages_of_a_growing_answer():
    turns = [PageTurn("a", reply="b"), PageTurn.of("what?", [METER]), PageTurn("")]
    turns[1].thinking = "hm"
    messages = texts.chat_messages(turns[:2], "zh", growing=True)
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant", "user", "user", "assistant"]
    assert messages[-1]["metadata"] == {"title": "思考过程", "status": "pending"}
    turns[1].reply = "7305"
    messages = texts.chat_messages(turns, "en")
    assert messages[-2]["metadata"] == {"title": "Thinking", "status": "done"}
    assert messages[-1]["content"]["text"] == "7305"
    numbers = [texts.asked_at(turns, index) for index in range(-1, len(messages) + 1)]
    assert numbers == [None, 0, None, None, 1, None, None, None]


@pytest.mark.parametrize(
    ("header", "lang"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("", "en")],
)
def test_language_of_a_browser(header, lang):
    assert texts.language(header) == lang


def test_labels_are_there_in_both_languages():
    assert texts.LABELS["en"].keys() == texts.LABELS["zh"].keys()


def test_failures_in_the_users_language(tmp_path):
    broken = tmp_path / ("d" * 90) / "photo.png"
    broken.parent.mkdir()
    broken.write_bytes(b"nothing")
    turn = PageTurn.of("?", [broken])
    model = edgevl.load("tiny", engine="reference")
    for _ in Conversation(model.chat(), tmp_path).ask(turn, Settings()):
        pass
    assert isinstance(turn.error, ImageError)
    assert texts.failure(turn, "en").startswith("photo.png: not a picture")
    assert texts.failure(turn, "zh").startswith("photo.png：不是可读取的图片")
    turn = talk(Conversation(model.chat(), tmp_path), "word " * 5000)
    assert isinstance(turn.error, ContextLengthError)
    assert re.match(r"这条消息需要 \d+ 个词元，而上下文只能容纳 2048 个", texts.failure(turn, "zh"))
    turn.error = KeyError("secret")
    assert "secret" not in texts.failure(turn, "en")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("empty.png", b"", "empty.png：文件是空的，不是图片"),
        ("cut.png", METER.read_bytes()[:3000], "cut.png：图片已损坏"),
        ("notes.txt", b"nothing", "notes.txt：不是可读取的图片，请用"),
        ("film.mp4", b"\0\0\0\x18ftypisom", "film.mp4：这是视频而不是图片"),
        ("gone.png", None, "gone.png：没有这个文件，可能已过期，请重新上传"),
    ],
)
def test_pictures_that_fail_in_chinese(tmp_path, name, data, said):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    conversation = Conversation(edgevl.load("tiny", engine="reference").chat(), tmp_path)
    for _ in conversation.ask(turn := PageTurn.of("?", [path]), Settings()):
        pass
    assert texts.failure(turn, "zh").startswith(said)


def test_refusals_in_chinese(tmp_path, monkeypatch):
    scheduler = Scheduler(model := edgevl.load("tiny"))
    conversation = Conversation(Session(model.checkpoint, scheduler), tmp_path)

    def said(text="?", pictures=()):
        for _ in conversation.ask(turn := PageTurn.of(text, pictures), Settings()):
            pass
        return texts.failure(turn, "zh")

    assert said("x" * 1_048_577) == "问题超过 1048576 个字符，请缩短"
    assert said(pictures=(METER,) * 33) == "一个问题最多 32 个文件，请分几次提问"
    monkeypatch.setattr(Scheduler, "waiting", 64)
    assert said() == "已有 64 个问题在等待，请稍后再试"
    scheduler.close(0)
    assert said() == "服务正在关闭，请稍后再试"


def test_statistics():
    answer = Answer("7", "", (1,), "length", Usage(54, 36, 4, 10), Timings(0, 1, 2, 70, 10, 100))
    assert texts.statistics(answer, 2048, "en") == (
        "first token 0.07 s · 100.0 tokens/s · 4 tokens · prompt 54 (36 of pictures, 10 from the "
        "cache) · context 58 of 2048 · cut off at the token limit"
    )
    assert texts.statistics(answer, 2048, "zh") == (
        "首字 0.07 秒 · 100.0 词元/秒 · 回答 4 词元 · 提示 54 词元（图像 36，缓存命中 10） · "
        "上下文 58 / 2048 · 已达长度上限"
    )


def test_files_are_told_apart():
    names = ["a.PNG", "b.mp4", "c.heic", "d.mkv", "e.gif"]
    turn = blocks._turn({"text": "?", "files": names})
    assert [path.name for path in turn.files] == ["a.PNG", "c.heic", "e.gif", "b.mp4", "d.mkv"]
    assert [each.is_video for each in turn.shown] == [False, False, False, True, True]


def test_what_comes_back_into_the_box_is_still_there(tmp_path):
    turn = PageTurn.of("?", [METER, tmp_path / "deleted.png"])
    assert blocks._typed(turn) == {"text": "?", "files": [str(METER)]}


# -- the server


def guarded(path, *chunks):
    """Send a request with a body of ``chunks`` through the guard; return what comes back."""
    sent, parts = [], [{"body": chunk, "more_body": True} for chunk in chunks] + [{"body": b""}]

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"taken"})

    async def receive():
        return {"type": "http.request", **parts.pop(0)}

    async def send(message):
        sent.append(message)

    asyncio.run(blocks.PageGuard(app)({"type": "http", "path": path}, receive, send))
    return sent


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/gradio_api/queue/join", 0, 200),
        ("/gradio_api/queue/join", 1, 413),
        ("/gradio_api/upload", 1, 200),  # Gradio bounds those
        ("/gradio_api/upload/../queue/join", 1, 413),
    ],
)
def test_what_stands_before_the_page(path, more, status):
    half = bytes(blocks.MAX_BODY_BYTES // 2)
    start, body = guarded(path, half, half + bytes(more))
    assert start["status"] == status
    assert body["body"] == (b"taken" if status == 200 else b"")
    headers = dict(start["headers"])
    assert (b"a" in headers) == (status == 200)
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_only_the_password_is_the_password():
    check = password_check("s3cret")
    assert check("me", "s3cret")
    for wrong in ("", "s3", "s3cret ", "S3CRET", "s3cr\u00e9t"):
        assert not check("me", wrong)


def test_what_a_page_takes_is_bounded():
    built = create_page(Scripted(lambda text: ["yes"]).new, "<b>", 100)
    assert built.delete_cache == (blocks.UPLOAD_CHECK_S, blocks.UPLOAD_AGE_S)
    assert built._queue.max_size == blocks.MOST_WAITING
    assert {"en", "zh", "zh-CN", "zh-TW"} <= set(built.i18n_instance.translations)
    title = next(part for part in built.blocks.values() if part.elem_id == "title")
    assert title.value == "&lt;b&gt;"


def test_an_internal_error_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    script = Scripted(lambda text: [KeyError("inside")])
    with served(create_page(script.new, "x", 100)) as url:
        told = submit(url, [])
    assert "inside" not in str(told)
    (logged,) = [found for found in caplog.records if found.name == "edgevl.page.blocks"]
    assert isinstance(logged.exc_info[1], KeyError)


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        return response.read(), response.headers


def test_nothing_is_open_that_need_not_be(monkeypatch, tmp_path):
    """No documents, no endpoints by name, no telemetry, nothing but uploads for a file."""
    connect, connected, fetched = socket.socket.connect, [], []

    def watched(self, address):
        connected.append(address[0])
        return connect(self, address)

    async def fetch(url, cache_dir):
        fetched.append(url)
        raise RuntimeError("fetched")

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    script = Scripted(lambda text: ["yes"])
    built = create_page(script.new, "<b>", 100)
    assert built.analytics_enabled is False
    with served(built) as url:
        assert "connect-src 'self'" in get(url)[1]["content-security-policy"]
        info = json.loads(get(f"{url}gradio_api/info")[0])
        assert info == {"named_endpoints": {}, "unnamed_endpoints": {}}
        closed = ["docs", "redoc", "openapi.json", "gradio_api/runs", "monitoring"]
        for path in [*closed, f"gradio_api/file={METER}"]:
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(url + path)
            assert refused.value.code in (403, 404), path
        for path in (METER, f"{tmp_path}/x/../../meter.png", "https://files.example.com/a.png"):
            assert submit(url, [path])["success"] is False
        assert submit(url, [])["success"] is True
    assert [call["images"] for call in script.calls] == [[]]
    assert list(tmp_path.rglob("meter.png")) == []
    assert fetched == []
    assert set(connected) <= {"127.0.0.1", "::1"}


def submit(url, paths):
    """Send a question as a browser would; return the last that is told of it."""
    config = json.loads(get(f"{url}config")[0])
    event = next(d for d in config["dependencies"] if d["targets"][0][1] == "submit")
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    files = [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in paths]
    data = [{"text": "?", "files": files}, *(values[name] for name in event["inputs"][1:])]
    data = ["" if value is None else value for value in data]
    body = {"data": data, "fn_index": event["id"], "session_hash": "abc"}
    kind = {"content-type": "application/json"}
    join = urllib.request.Request(f"{url}gradio_api/queue/join", json.dumps(body).encode(), kind)
    urllib.request.urlopen(join).close()
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=abc") as events:
        told = next(line for line in events if b"process_completed" in line)
    return json.loads(told.removeprefix(b"data: "))


def test_a_password_is_asked_for():
    built = create_page(Scripted(lambda text: ["yes"]).new, "x", 100)
    with served(built, auth=password_check("s3cret")) as url:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}config")
        for password, status in (("wrong", 400), ("s3cret", 200)):
            connection = http.client.HTTPConnection(url.split("/")[2])
            with closing(connection):
                fields = f"username=me&password={password}"
                kind = {"content-type": "application/x-www-form-urlencoded"}
                connection.request("POST", "/login", fields, kind)
                assert connection.getresponse().status == status


def test_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["ui", "tiny", "--port", str(port)]) == 1
    message = capsys.readouterr().err
    assert message == (
        f"edgevl: error: cannot listen at 127.0.0.1, port {port}: {os.strerror(errno.EADDRINUSE)}; "
        "choose others with --host and --port\n"
    )


@pytest.mark.parametrize("password", ["", " "])
def test_an_empty_password_is_refused(password, capsys):
    assert cli.main(["ui", "tiny", "--api-key", password]) == 2
    assert "--api-key" in (err := capsys.readouterr().err)
    assert "not empty" in err


def test_gradio_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("edgevl.page", "edgevl.page.blocks"):
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["ui", "tiny"]) == 1
    assert "gradio is missing: pip install 'edgevl[ui]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "locked", "warned"),
    [("127.0.0.1", False, False), ("0.0.0.0", False, True), ("0.0.0.0", True, False)],
)
def test_other_machines_let_in_without_a_password(capsys, monkeypatch, host, locked, warned):
    monkeypatch.setenv("LC_ALL", "C")
    with listen(host, 0) as sock:
        ui._announce(sock, locked)
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"http://{host}:\d+/  \(Ctrl-C ends it\)\n", out)
    assert ("no password" in err) == warned


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_ctrl_c(number, tmp_path):
    path = EXAMPLES.parent / "models" / "tiny"
    command = [sys.executable, "-m", "edgevl", "ui", str(path), "--port", "0"]
    environment = os.environ | {"LC_ALL": "zh_CN.UTF-8", "TMPDIR": str(tmp_path)}
    environment.pop("GRADIO_TEMP_DIR", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"页面地址：(http://\S+/)（按 Ctrl-C 结束）\n", line)[1]
            config = get(f"{url}config")[0].decode()
            assert json.loads(config)["title"] == "EdgeVL · tiny"
            assert str(path) not in config  # it is nobody's business
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(url, host="rebound.example.com")
            process.send_signal(number)
            assert process.communicate(timeout=20) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 0
    assert list(tmp_path.glob("edgevl-page-*")) == []


# -- in a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs playwright")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def tiny_page():
    model = edgevl.load("tiny")
    built = create_page(model.chat, "EdgeVL · tiny", model.engine.max_context, max_tiles=1)
    with served(built, max_upload_bytes=1_000_000) as url:
        yield url


def replies(tab):
    return [text.strip() for text in tab.locator("#chat .bot.message").all_inner_texts()]


def test_a_picture_two_turns_retry_edit_undo_clear(browser, tiny_page):
    outside, errors = [], []
    tab = open_page(browser, tiny_page, locale="en-US", viewport={"width": 1000, "height": 700})
    tab.on("request", lambda r: r.url.startswith((tiny_page, "data:")) or outside.append(r.url))
    tab.on("pageerror", lambda error: errors.append(error))
    tab.press("#box textarea", "Enter")  # nothing to ask
    attach(tab, METER)
    ask(tab, QUESTION)
    answered(tab)
    assert replies(tab) == ["7305"]
    line = tab.inner_text("#status")
    assert re.fullmatch(
        r"first token [\d.]+ s · ([\d.]+ tokens/s · )?4 tokens · prompt \d+ \(36 of pictures, 0 "
        r"from the cache\) · context \d+ of 2048",
        line,
    )
    attach(tab, SHAPES)
    ask(tab, "Where is the purple star?")
    answered(tab)
    assert replies(tab)[1].startswith("purple star [[")
    assert tab.locator("#chat .bot img").count() == 1  # the boxes
    tab.click("#chat [aria-label=Retry]")
    answered(tab)
    assert replies(tab)[1].startswith("purple star [[")
    tab.click("#chat [aria-label=Undo]")
    tab.wait_for_function("document.querySelector('#box textarea').value.startsWith('Where')")
    assert replies(tab) == ["7305"]
    tab.locator("#chat [aria-label=Edit]").last.click()
    tab.fill("#chat textarea", "显示屏上的数字是多少？")  # the picture stays
    tab.click("#chat [aria-label=Submit]")
    answered(tab)
    assert "显示屏" in tab.inner_text("#chat")
    assert replies(tab) == ["7305"]
    tab.click("#chat [aria-label=Clear]")
    tab.wait_for_selector("#chat .message", state="detached")
    assert outside == errors == []
    tab.context.close()


def test_files_that_are_refused(browser, tiny_page, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    tab = open_page(browser, tiny_page, locale="zh-CN")
    assert tab.get_attribute("#box textarea", "placeholder") == "输入问题，图片可拖入或粘贴到这里"
    tab.wait_for_selector("#thinking >> text=否", state="attached")
    assert tab.locator("#thinking label").all_text_contents() == [" 默认", " 是", " 否"]
    tab.set_input_files("#box input[type=file]", tmp_path / "large.png")
    lines = tab.inner_text(".toast-body.error").splitlines()
    assert lines[0] == "错误"
    assert lines[-1] == '文件超过 976.6 Kb 的大小上限："large.png"'
    assert tab.locator("#box .thumbnail-item").count() == 0
    attach(tab, tmp_path / "broken.png")
    ask(tab, "这是什么？")
    answered(tab)
    assert tab.inner_text("#status").startswith("broken.png：不是可读取的图片")
    assert "broken.png：不是可读取的图片" in tab.inner_text(".toast-body.warning")
    assert tab.input_value("#box textarea") == "这是什么？"  # to be asked again
    assert replies(tab) == []
    tab.context.close()


def test_a_phone_and_the_dark(browser, tiny_page):
    tab = open_page(
        browser,
        tiny_page,
        locale="zh-CN",
        color_scheme="dark",
        viewport={"width": 375, "height": 667},
        is_mobile=True,
        has_touch=True,
    )
    attach(tab, METER)
    ask(tab, "图中的数字是多少？")
    answered(tab)
    assert replies(tab) == ["7305"]
    assert tab.inner_text("#status").startswith("首字 ")
    width, height = tab.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    assert (width, height) == (375, 667)
    assert tab.locator("#chat").bounding_box()["width"] > 340  # little margin
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 64
    tab.context.close()


def ask_to_count(tab, script):
    """Ask, and wait for the first words."""
    words, deadline = script.words, time.monotonic() + 60
    ask(tab, "count")
    while script.words < words + 5:
        assert time.monotonic() < deadline, "the question was not asked"
        time.sleep(0.02)


def test_stop_thinking_formulas_and_scripts(browser):
    evil = (
        '<img src=x onerror="window.evil=1"><script>window.evil=1</script> '
        "![](http://127.0.0.2:1234/a.png)"
    )

    def say(text):
        if text == "count":
            return (f"{number} " for number in range(10_000))
        return [Piece("Let me see.", True), f"So $x^2$ {evil}"]

    script = Scripted(say, pause_s=0.02)
    with served(create_page(script.new, "scripted", 100)) as url:
        tab = open_page(browser, url, locale="en-US")
        refused = {}
        tab.on("requestfailed", lambda request: refused.update({request.url: request.failure}))
        ask(tab, "think")
        answered(tab)
        tab.wait_for_selector("#chat .katex")
        assert "Thinking" in tab.inner_text("#chat")
        assert tab.evaluate("window.evil") is None
        assert refused["http://127.0.0.2:1234/a.png"] == "csp"
        ask(tab, "count")
        tab.wait_for_selector("#chat >> text=0 1 2")
        tab.click("#box .stop-button")
        answered(tab)
        assert tab.inner_text("#status") == "stopped"
        words = script.words
        time.sleep(0.2)
        assert script.words == words
        ask_to_count(tab, script)
        tab.click("#chat [aria-label=Clear]")
        answered(tab)
        tab.wait_for_selector("#chat .message", state="detached")
        assert tab.inner_text("#status") == tab.input_value("#box textarea") == ""
        words = script.words
        ask_to_count(tab, script)
        tab.context.close()  # as one closes a tab
        deadline = time.monotonic() + 10
        while words != script.words and time.monotonic() < deadline:
            words = script.words
            time.sleep(0.5)
        assert words == script.words < 1000


def test_the_checkpoint_s_defaults_are_where_the_sliders_begin(browser):
    """To the last digit, also where they are beyond a slider's usual ends or between steps."""
    own = {
        "temperature": 0.6,
        "top_p": 0.001,
        "top_k": 20,
        "repetition_penalty": 0.9,
        "min_p": 0.0133,
    }
    script = Scripted(lambda text: ["yes"])
    with served(create_page(script.new, "x", 100, sampling=own)) as url:
        tab = open_page(browser, url, locale="en-US")
        ask(tab, "one")
        answered(tab)
        tab.click(".toggle-button")
        said = tab.inner_text("#settings")
        tab.locator("#settings >> label:has-text('Temperature') >> xpath=../..").locator(
            "input[type=number]"
        ).fill("0.85")
        tab.click("#thinking >> text=no")
        ask(tab, "two")
        answered(tab)
        tab.context.close()
    assert [session.thinking for session in script.made] == [False]
    assert said.count("Default: the model's generation_config.json") == len(own)
    first, second = script.calls
    rest = {"max_tokens": 100, "frequency_penalty": 0, "presence_penalty": 0, "seed": None}
    rest |= {"images": [], "frames": 8, "frame_threshold": 0}
    assert first == {"text": "one", **own, **rest}
    assert second == first | {"text": "two", "temperature": 0.85}


def test_the_camera(browser, tiny_page):
    tab = open_page(browser, tiny_page, locale="en-US", permissions=["camera"])
    tab.click(".toggle-button")
    tab.click("#settings >> text=Camera")
    tab.click("#camera [title='grant webcam access']")
    tab.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    tab.click("#camera [aria-label='capture photo']")
    tab.wait_for_selector("#box .thumbnail-item")
    tab.context.close()
