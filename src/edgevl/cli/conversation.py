"""The conversation of ``edgevl chat``: turns and commands, typed on a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.answer import PlainPrinter, Printer, print_answer
from edgevl.cli.commands import COMMANDS, help_text
from edgevl.cli.dropped import find_files, unquoted
from edgevl.cli.prompt import keys_wait, line_reader
from edgevl.cli.terminal import can_move, chinese, reason, tell
from edgevl.errors import EdgeVLError
from edgevl.files import replacing
from edgevl.generate.session import Attachment, Turn
from edgevl.options import OPTIONS
from edgevl.preprocess import load_image, open_video
from edgevl.preprocess.sources import PICTURE_SUFFIXES, VIDEO_SUFFIXES

if TYPE_CHECKING:
    from edgevl.generate import Session

WELCOME = ("/help lists the commands, Ctrl-D leaves.", "输入 /help 查看命令，按 Ctrl-D 退出。")


class Conversation:
    """Reads what is typed, and keeps what is shown with the next question."""

    def __init__(self, model: str, session: Session, sampling: dict[str, Any]) -> None:
        """Hold a conversation in ``session``; ``sampling`` goes with every question."""
        self._model = model
        self._session = session
        self._sampling = dict(sampling)
        # Has a text if it was asked, and was stopped before its answer began, or failed.
        self._next = Turn()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_picture,
            "/video": self._add_video,
            "/retry": self._retry,
            "/undo": self._undo,
            "/system": self._set_system,
            "/set": self._set,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: click.echo(help_text(), err=True),
        }

    def run(self, shown: list[Attachment]) -> None:
        """Talk until the user leaves; ``shown`` goes with the first question."""
        self._next.shown = shown
        read = line_reader(COMMANDS, OPTIONS, PICTURE_SUFFIXES + VIDEO_SUFFIXES)
        tell(*WELCOME)
        while True:
            try:
                while self._step(read):
                    pass
                return
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):  # pressed twice
                    click.echo(err=True)
                    tell("(Ctrl-D or /exit leaves)", "（按 Ctrl-D 或输入 /exit 退出）")

    def _step(self, read: Callable[[], str]) -> bool:
        """Read what is typed and carry it out; return whether the conversation goes on."""
        try:
            line = read().strip()
            line.encode()  # bytes that are not UTF-8 may have come in disguise (PEP 383)
            return self.take(line)
        except EOFError:
            click.echo(err=True)
            return False
        except BrokenPipeError:
            raise
        except (EdgeVLError, OSError, UnicodeError, MemoryError) as error:
            # One failed turn is no reason to lose the conversation.
            click.echo(f"edgevl: error: {reason(error)}", err=True)
            return True

    def take(self, line: str) -> bool:
        """Carry out what was typed; return whether the conversation goes on."""
        if not line:
            return True
        name, *rest = line.split(maxsplit=1)
        if name in ("/exit", "/quit"):
            return False
        if command := self._commands.get(name):
            command(rest[0].strip() if rest else "")
            return True
        question, paths = find_files(line, PICTURE_SUFFIXES + VIDEO_SUFFIXES)
        if paths:
            self._show(*paths)
            if question:
                self._ask(question)
        elif name.startswith("/") and "/" not in name[1:]:
            tell(f"{name} is not a command; /help lists them.", f"没有 {name} 命令，请输入 /help。")
        else:
            self._ask(line)
        return True

    def _add_picture(self, path: str) -> None:
        if not path:
            tell("Name a picture: /image PATH", "请给出图片路径：/image 路径")
            return
        path = _path(path)
        picture = load_image(path)
        self._next.shown.append(Attachment(picture, name=path))
        tell(
            f"{picture.width} x {picture.height}, goes with the next question.",
            f"{picture.width} x {picture.height}，将随下一个问题一起发送。",
        )

    def _add_video(self, path: str) -> None:
        if not path:
            tell("Name a video: /video PATH", "请给出视频路径：/video 路径")
            return
        path = _path(path)
        video = open_video(path)
        self._next.shown.append(Attachment(video, is_video=True, name=path))
        tell(
            f"{video.frame_count} frames, {video.duration_s:.1f} s, goes with the next question.",
            f"{video.frame_count} 帧，{video.duration_s:.1f} 秒，将随下一个问题一起发送。",
        )

    def _show(self, *paths: str) -> None:
        """Show pictures and videos with the next question; all of them or, on an error, none."""
        before = list(self._next.shown)
        try:
            for path in paths:
                is_video = path.lower().endswith(VIDEO_SUFFIXES)
                (self._add_video if is_video else self._add_picture)(path)
        except Exception:
            self._next.shown = before
            raise

    def _ask(self, question: str) -> None:
        turn = self._next
        turn.text = question
        with keys_wait(sys.stdin):
            stream = self._session.answer(turn, **self._sampling)
            try:
                print_answer(stream, printer=_printer())
            except KeyboardInterrupt:
                stream.close()  # the session keeps what was said so far
        if turn in self._session.turns:
            self._next = Turn()

    def _retry(self, _: str) -> None:
        if self._next.text or self._take_back():
            self._ask(self._next.text)

    def _undo(self, _: str) -> None:
        if self._take_back():
            tell(f"Forgotten: {self._next.text}", f"已撤回：{self._next.text}")
            self._next.text = ""

    def _take_back(self) -> bool:
        """Make the last turn, without its answer, the next; what it showed goes before the rest."""
        turn = self._session.undo()
        if turn is None:
            tell("Nothing has been asked yet.", "还没有提过问题。")
            return False
        self._next = Turn(turn.text, turn.shown + self._next.shown)
        return True

    def _set_system(self, text: str) -> None:
        self._session.system = text or None
        tell("Goes with the next question.", "从下一个问题起生效。")

    def _set(self, text: str) -> None:
        name, value = re.split(r"[\s=]+", f"{text} ", maxsplit=1)
        name, value = name.lower().strip("-").replace("-", "_"), value.strip()
        if name and name not in OPTIONS:
            raise EdgeVLError(f"/set {name}: there is no such setting, but {', '.join(OPTIONS)}")
        if value:
            setting = {name: OPTIONS[name].parse(value)}
            self._session.params(**setting)  # not every token id is of a token
            self._sampling |= setting
        elif name:
            self._sampling.pop(name, None)
        given = {each: self._sampling.get(each) for each in OPTIONS}
        params = self._session.params(**given)
        for each in [name] if name else OPTIONS:
            line = f"{each} {OPTIONS[each].spell(getattr(params, each))}"
            if given[each] is None and each in self._session.defaults:
                line += " （模型自带的默认值）" if chinese() else " (the checkpoint's)"
            click.echo(line, err=True)

    def _reset(self, _: str) -> None:
        self._session.reset()
        self._next = Turn()
        tell("A new conversation.", "已开始新的对话。")

    def _save(self, name: str) -> None:
        if not name:
            tell("Name a file: /save FILE", "请给出文件名：/save 文件")
            return
        path = Path(unquoted(name)).expanduser()
        transcript = {
            "model": self._model,
            "turns": [turn.to_dict() for turn in self._session.turns],
        }
        with replacing(path) as file:
            file.write(json.dumps(transcript, ensure_ascii=False, indent=1).encode())
            file.write(b"\n")
        tell(f"Saved to {path}.", f"已保存到 {path}。")


def _path(text: str) -> str:
    """Return what a picture or video is loaded from; ``~`` is the user's home.

    Raises:
        EdgeVLError: it is standard input, which the conversation has.
    """
    if text == "-":
        raise EdgeVLError("standard input is the conversation; give the path of a file")
    if text.startswith("data:"):
        return text
    path = Path(text).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if path.exists():  # a name may have quotes and backslashes of its own
            return str(path)
    return str(Path(unquoted(text)).expanduser())


def _printer() -> Printer:
    """Render Markdown where the terminal can; files and pipes get it as it is."""
    if can_move(sys.stdout) and sys.stdout.encoding.lower().replace("-", "") == "utf8":
        from edgevl.cli.markdown import MarkdownPrinter

        return MarkdownPrinter()
    return PlainPrinter()
