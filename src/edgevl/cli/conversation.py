"""The conversation of ``edgevl chat``: turns, commands and dropped files, typed on a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import unquote

import click

from edgevl.cli.terminal import (
    Printer,
    can_move,
    chinese,
    is_terminal,
    is_utf8,
    print_answer,
    reason,
    tell,
)
from edgevl.errors import EdgeVLError
from edgevl.files import replacing
from edgevl.generate.session import Attachment, Turn
from edgevl.options import OPTIONS
from edgevl.preprocess import load_image, open_video
from edgevl.preprocess.sources import PICTURE_SUFFIXES, VIDEO_SUFFIXES

if TYPE_CHECKING:
    from edgevl.generate import Session

WELCOME = ("/help lists the commands, Ctrl-D leaves.", "输入 /help 查看命令，按 Ctrl-D 退出。")

#: Command -> what it takes and what it does, in English and in Chinese; `Conversation` has a method
#: for each, such as ``_do_image``.
COMMANDS = {
    "/image": (
        ("PATH", "show a picture with the next question (repeat for several)"),
        ("路径", "为下一个问题附上图片（可多次使用）"),
    ),
    "/video": (
        ("PATH", "show a video with the next question"),
        ("路径", "为下一个问题附上视频"),
    ),
    "/retry": (("", "answer the last question again"), ("", "重新回答上一个问题")),
    "/undo": (
        ("", "forget the last question; what it showed goes with the next"),
        ("", "撤回上一个问题，其图片和视频将随下一个问题一起发送"),
    ),
    "/system": (
        ("TEXT", "system message from now on; without TEXT the model's own"),
        ("文本", "设置系统消息；不带文本则恢复模型默认值"),
    ),
    "/set": (
        ("NAME VALUE", "set temperature, max_tokens, seed, …; without NAME list them"),
        ("名称 值", "设置 temperature、max_tokens、seed 等；不带参数则列出当前值"),
    ),
    "/reset": (("", "forget everything said so far"), ("", "清空对话，重新开始")),
    "/save": (
        ("FILE", "write the conversation to a JSON file"),
        ("文件", "将对话保存为 JSON 文件"),
    ),
    "/help": (("", "show this"), ("", "显示本帮助")),
    "/exit": (("", "leave (or Ctrl-D)"), ("", "退出（或按 Ctrl-D）")),
}
_BEFORE = (
    "Type a question, drop or paste the path of a picture or video, or:",
    "直接输入问题，拖入或粘贴图片、视频的路径，或使用：",
)
_AFTER = (
    "Alt-Enter, or \\ at the end of a line, begins a new line. "
    "Tab completes commands and paths.\n"
    "Ctrl-C stops an answer, or clears what is typed.",
    "按 Alt-Enter 或在行尾输入 \\ 可换行，按 Tab 可补全命令和路径。\n"
    "按 Ctrl-C 可中断回答，或清空已输入的内容。",
)

_SUFFIXES = PICTURE_SUFFIXES + VIDEO_SUFFIXES
#: A path between quotes, with ``\'`` between two quoted parts for a quote in it, or a word, whose
#: blanks are escaped. An apostrophe within a word quotes nothing.
_WORD = re.compile(r"""(?<!\S)(?:'(?:[^']|'\\'')+'|"[^"]+"|(?:\\.|[^\s\\])+)""", re.DOTALL)


class Conversation:
    """Reads what is typed, and keeps what is shown with the next question."""

    def __init__(self, model: str, session: Session, sampling: dict[str, Any]) -> None:
        """Hold a conversation in ``session``; ``sampling`` goes with every question."""
        self._model = model
        self._session = session
        self._sampling = dict(sampling)
        # Has a text if it was asked, and was stopped before its answer began, or failed.
        self._next = Turn()

    def run(self, shown: list[Attachment]) -> None:
        """Talk until the user leaves; ``shown`` goes with the first question."""
        self._next.shown = shown
        read = line_reader()
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
        if name in COMMANDS:
            getattr(self, f"_do_{name[1:]}")(rest[0].strip() if rest else "")
            return True
        question, paths = find_files(line)
        if paths:
            self._show(*paths)
            if question:
                self._ask(question)
        elif name.startswith("/") and "/" not in name[1:]:
            tell(f"{name} is not a command; /help lists them.", f"没有 {name} 命令，请输入 /help。")
        else:
            self._ask(line)
        return True

    def _do_image(self, path: str) -> None:
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

    def _do_video(self, path: str) -> None:
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
                (self._do_video if is_video else self._do_image)(path)
        except Exception:
            self._next.shown = before
            raise

    def _ask(self, question: str) -> None:
        turn = self._next
        turn.text = question
        with _keys_wait(sys.stdin):
            stream = self._session.answer(turn, **self._sampling)
            try:
                print_answer(stream, _printer())
            except KeyboardInterrupt:
                stream.close()  # the session keeps what was said so far
        if turn in self._session.turns:
            self._next = Turn()

    def _do_retry(self, _: str) -> None:
        if self._next.text or self._take_back():
            self._ask(self._next.text)

    def _do_undo(self, _: str) -> None:
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

    def _do_system(self, text: str) -> None:
        self._session.system = text or None
        tell("Goes with the next question.", "从下一个问题起生效。")

    def _do_set(self, text: str) -> None:
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

    def _do_reset(self, _: str) -> None:
        self._session.reset()
        self._next = Turn()
        tell("A new conversation.", "已开始新的对话。")

    def _do_save(self, name: str) -> None:
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

    def _do_help(self, _: str) -> None:
        language = int(chinese())
        click.echo(_BEFORE[language], err=True)
        heads = {name: f"{name} {texts[language][0]}".strip() for name, texts in COMMANDS.items()}
        column = max(map(_cells, heads.values())) + 2
        for name, head in heads.items():
            padding = " " * (column - _cells(head))
            click.echo(f"  {head}{padding}{COMMANDS[name][language][1]}", err=True)
        click.echo(_AFTER[language], err=True)


def _cells(text: str) -> int:
    """Return how many cells of a terminal ``text`` fills."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def _printer() -> Printer:
    """Render Markdown where the terminal can; files and pipes get it as it is."""
    if can_move(sys.stdout) and is_utf8(sys.stdout):
        from edgevl.cli.screen import MarkdownPrinter

        return MarkdownPrinter()
    return Printer()


def line_reader() -> Callable[[], str]:
    """Return a function that reads what is typed next: a line, or several pasted or joined.

    On a terminal that can move its cursor the line is edited, with history and completion; else
    the terminal's own editing must do. The prompt goes to standard error where standard output is
    a file. The function raises EOFError at the end, and KeyboardInterrupt at Ctrl-C.
    """
    screen = sys.stdout if is_terminal(sys.stdout) else sys.stderr
    if not (is_terminal(sys.stdin) and can_move(screen)):
        return _read_plain
    from edgevl.cli.screen import line_editor

    return line_editor(screen, sorted(COMMANDS), sorted(OPTIONS), _SUFFIXES)


def _read_plain() -> str:
    """Read a line, and those that a backslash at its end joins to it."""
    lines: list[str] = []
    prompt = "> "
    while True:
        if is_terminal(sys.stdout):
            line = input(prompt)
        else:
            click.echo(prompt, nl=False, err=True)
            line = input()
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = "… "


@contextlib.contextmanager
def _keys_wait(stream: TextIO | None) -> Iterator[None]:
    """Let what is typed meanwhile wait for the next prompt, unseen; Ctrl-C works as always.

    Echoed, it would be drawn into the answer.
    """
    if stream is None or not is_terminal(stream):
        yield
        return
    before = termios.tcgetattr(stream)
    quiet = termios.tcgetattr(stream)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(stream, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSANOW, before)


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


def unquoted(text: str) -> str:
    """Return the path that ``text`` stands for: quoted, with escaped blanks, a URL, or itself."""
    if text[:1] in ("'", '"') and text[-1:] == text[0] and len(text) > 1:
        return text[1:-1].replace(r"'\''", "'")
    if text[:7].lower() == "file://":
        return unquote("/" + text[7:].partition("/")[2])  # without the host
    return re.sub(r"\\(.)", r"\1", text)


def find_files(line: str) -> tuple[str, list[str]]:
    """Find the existing pictures and videos in a line, by the ends of their names.

    Args:
        line: what was typed, pasted or dropped; it may have several lines.

    Returns:
        The question, and the paths. Paths at the line's beginning and end are no part of the
        question; of one in its middle the file's name is left.
    """
    if path := _existing(line):  # blanks and quotes may be in the name itself
        return "", [path]
    found = [
        (match, path) for match in _WORD.finditer(line) if (path := _existing(unquoted(match[0])))
    ]
    begin, end = 0, len(line)
    for match, _ in found:
        if not line[begin : match.start()].strip():
            begin = match.end()
    for match, _ in reversed(found):
        if match.start() >= begin and not line[match.end() : end].strip():
            end = match.start()
    question, position = "", begin
    for match, path in found:
        if begin <= match.start() and match.end() <= end:
            question += line[position : match.start()] + Path(path).name
            position = match.end()
    return (question + line[position:end]).strip(), [path for _, path in found]


def _existing(text: str) -> str | None:
    """Return the path of a picture or video that is there; ``~`` is the user's home."""
    if not text.lower().endswith(_SUFFIXES):
        return None
    try:
        path = Path(text).expanduser()
        return str(path) if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's home
        return None
