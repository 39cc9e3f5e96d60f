"""The conversation of ``edgevl chat``: turns and commands, line by line from a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.answer import print_answer
from edgevl.cli.terminal import chinese, reason, replacing
from edgevl.errors import EdgeVLError

if TYPE_CHECKING:
    from PIL import Image

    from edgevl.generate import Session
    from edgevl.preprocess import Video

HELP = """\
Type a question, or:
  /image PATH   show a picture with the next question (repeat for several)
  /video PATH   show a video with the next question
  /reset        forget everything said so far
  /save FILE    write the conversation to a JSON file
  /exit         leave (or Ctrl-D)
Ctrl-C stops an answer."""

HELP_ZH = """\
直接输入问题，或使用：
  /image 路径   为下一个问题附上图片（可多次使用）
  /video 路径   为下一个问题附上视频
  /reset        清空对话，重新开始
  /save 文件    将对话保存为 JSON 文件
  /exit         退出（或按 Ctrl-D）
按 Ctrl-C 可中断回答。"""

WELCOME = ("/help lists the commands, Ctrl-D leaves.", "输入 /help 查看命令，按 Ctrl-D 退出。")


class Conversation:
    """Reads lines, keeps what is shown with the next question, and a transcript."""

    def __init__(self, model: str, session: Session, sampling: dict[str, Any]) -> None:
        """Hold a conversation in ``session``; ``sampling`` goes with every question."""
        self._model = model
        self._session = session
        self._sampling = sampling
        self._waiting: list[tuple[str, Image.Image | Video]] = []
        self._turns: list[dict[str, Any]] = []

    def run(self, shown: list[tuple[str, Image.Image | Video]]) -> None:
        """Talk until the user leaves; ``shown`` (name, what) goes with the first question."""
        self._waiting = shown
        _enable_history()
        _tell(*WELCOME)
        while True:
            try:
                while self._step():
                    pass
                return
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):  # pressed twice
                    click.echo(err=True)
                    _tell("(Ctrl-D or /exit leaves)", "（按 Ctrl-D 或输入 /exit 退出）")

    def _step(self) -> bool:
        """Read a line and carry it out; return whether the conversation goes on."""
        try:
            line = _read_line().strip()
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
        """Carry out one line; return whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if not line:
            return True
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            _tell(HELP, HELP_ZH)
        elif name == "/reset":
            self._session.reset()
            self._waiting, self._turns = [], []
            _tell("A new conversation.", "已开始新的对话。")
        elif name == "/image":
            self._add_picture(rest)
        elif name == "/video":
            self._add_video(rest)
        elif name == "/save":
            self._save(rest)
        elif name.startswith("/") and "/" not in name[1:]:
            _tell(
                f"{name} is not a command; /help lists them.", f"没有 {name} 命令，请输入 /help。"
            )
        else:
            self._ask(line)
        return True

    def _add_picture(self, path: str) -> None:
        from edgevl.preprocess import load_image

        if not path:
            _tell("Name a picture: /image PATH", "请给出图片路径：/image 路径")
            return
        path = _path(path)
        picture = load_image(path)
        self._waiting.append((path, picture))
        _tell(
            f"{picture.width} x {picture.height}, goes with the next question.",
            f"{picture.width} x {picture.height}，将随下一个问题一起发送。",
        )

    def _add_video(self, path: str) -> None:
        from edgevl.preprocess import open_video

        if not path:
            _tell("Name a video: /video PATH", "请给出视频路径：/video 路径")
            return
        path = _path(path)
        video = open_video(path)
        self._waiting.append((path, video))
        _tell(
            f"{video.frame_count} frames, {video.duration_s:.1f} s, goes with the next question.",
            f"{video.frame_count} 帧，{video.duration_s:.1f} 秒，将随下一个问题一起发送。",
        )

    def _ask(self, question: str) -> None:
        from edgevl.preprocess import Video

        videos = [(name, shown) for name, shown in self._waiting if isinstance(shown, Video)]
        images = [(name, shown) for name, shown in self._waiting if not isinstance(shown, Video)]
        stream = self._session.stream(
            question,
            images=[picture for _, picture in images],
            videos=[video for _, video in videos],
            **self._sampling,
        )
        said: list[str] = []
        try:
            result = print_answer(stream, said).to_dict()
        except KeyboardInterrupt:
            stream.close()  # the session remembers what was said so far
            click.echo()
            if not said:  # it forgets a question without an answer: what is shown waits on
                return
            result = {"text": "".join(said), "finish_reason": "interrupted"}
        turn: dict[str, Any] = {"question": question, "images": [name for name, _ in images]}
        if videos:
            turn["videos"] = [name for name, _ in videos]
        self._turns.append(turn | result)
        self._waiting = []

    def _save(self, name: str) -> None:
        if not name:
            _tell("Name a file: /save FILE", "请给出文件名：/save 文件")
            return
        path = Path(name).expanduser()
        transcript = {"model": self._model, "turns": self._turns}
        with replacing(path) as file:
            file.write(json.dumps(transcript, ensure_ascii=False, indent=1).encode())
            file.write(b"\n")
        _tell(f"Saved to {path}.", f"已保存到 {path}。")


def _path(path: str) -> str:
    """Return what a picture or video is loaded from; ``~`` is the user's home."""
    if path == "-":
        raise EdgeVLError("standard input is the conversation; give the path of a file")
    return path if path.startswith("data:") else str(Path(path).expanduser())


def _tell(english: str, chinese_text: str) -> None:
    click.echo(chinese_text if chinese() else english, err=True)


def _enable_history() -> None:
    """Give ``input`` line editing and history, where Python was built with it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def _read_line() -> str:
    """Read a line; the prompt goes to standard error where standard output is a file."""
    if sys.stdout.isatty():
        return input("> ")
    click.echo("> ", nl=False, err=True)
    return input()
