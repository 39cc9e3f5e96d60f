"""What the subcommands say: results, answers as they come, notes, bars, in the user's language."""

from __future__ import annotations

import json
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from edgevl.errors import EdgeVLError

if TYPE_CHECKING:
    from tqdm import tqdm

    from edgevl.generate import Answer, Stream

#: Engines' notes that users read often.
_CHINESE_NOTES = {"emulated NPU: no board computes": "模拟的 NPU：没有板子在计算"}


def print_json(value: object) -> None:
    """Print one JSON object on standard output, in ASCII where it cannot show more."""
    click.echo(json.dumps(value, ensure_ascii=not is_utf8(sys.stdout), allow_nan=False))


def print_result(result: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print a result on standard output: as one JSON object, or as lines for people."""
    if as_json:
        print_json(result)
        return
    for line in lines:
        click.echo(line)


def note(text: str) -> None:
    """Write a dimmed line to standard error, if that is a terminal."""
    if is_terminal(sys.stderr):
        click.echo(dim(text), err=True)


def show_notes(notes: Iterable[str]) -> None:
    """Write what an engine has to say to standard error, also where that is no terminal."""
    for line in notes:
        click.echo(dim(translated(line, _CHINESE_NOTES.get(line, line))), err=True)


def leave_on_signals() -> None:
    """Let SIGTERM, and the end of the terminal, end this program as an error does: with SystemExit.

    By default they would end it on the spot, and what it holds would be left behind: an NPU's
    memory, programs that it has started, a terminal that does not echo. A signal that comes during
    a call of a library is handled at the call's end. What the caller has this process ignore
    (``nohup``) stays ignored. In other threads than the main one nothing changes.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            with suppress(ValueError):  # of other threads
                signal.signal(number, leave)


def is_terminal(stream: IO[Any] | None) -> bool:
    """Tell whether a standard stream is a terminal; one that the caller has closed is None."""
    return stream is not None and stream.isatty()


def can_move(stream: IO[Any] | None) -> bool:
    """Tell whether a standard stream is a terminal that can move its cursor."""
    return is_terminal(stream) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def is_utf8(stream: TextIO) -> bool:
    """Tell whether a standard stream is written in UTF-8."""
    return (stream.encoding or "").lower().replace("-", "") == "utf8"


def harmless(text: str) -> str:
    """Leave out control characters, with which a picture could make a model steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def dim(text: str) -> str:
    """Dim ``text`` on a terminal; elsewhere, or with ``NO_COLOR`` set, leave it as it is."""
    if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
        return click.style(text, dim=True)
    return text


def chinese() -> bool:
    """Tell whether the user's locale asks for Chinese."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return value.lower().startswith("zh")
    return False


def translated(english: str, in_chinese: str) -> str:
    """Return what is to be said in the user's language."""
    return in_chinese if chinese() else english


def reason(error: Exception) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, EdgeVLError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, UnicodeError):
        text = "the text is not valid UTF-8"
    elif isinstance(error, MemoryError):
        text = "not enough memory; close other programs or use a smaller model"
    else:
        text = f"internal error, {type(error).__name__}: {error} (EDGEVL_DEBUG=1 shows where)"
    return " ".join(text.split())


def tell(english: str, in_chinese: str) -> None:
    """Write a line to standard error, in the user's language."""
    click.echo(translated(english, in_chinese), err=True)


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Say what an interruption leaves, where it ends a command that writes ``output``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tell(
            f"interrupted; the same command goes on in {output}.partial",
            f"已中断；再次运行同一命令即可从 {output}.partial 继续",
        )
        raise


def bar_of(**options: Any) -> tqdm[Any]:
    """Return a bar, with tqdm's options, that is shown on a terminal only."""
    from tqdm import tqdm

    return tqdm(disable=not is_terminal(sys.stderr), **options)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], object]]:
    """Show a bar with an estimate while a stretch of work is done."""
    with bar_of(desc=name) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                bar.total = total
                bar.initial = done - 1  # what an earlier run has done tells nothing of the rate
            bar.update(done - bar.n)

        yield show


class Printer:
    """Prints the text of an answer as it is, on standard output."""

    def write(self, text: str) -> None:
        """Print more of it, without control characters."""
        click.echo(harmless(text), nl=False)

    def end(self) -> None:
        """End it, and its last line."""
        click.echo()


def print_answer(stream: Stream, printer: Printer) -> Answer:
    """Print an answer as it comes: text on standard output, thinking dimmed on standard error.

    On a terminal a last line on standard error says how fast it was.

    Args:
        stream: the answer.
        printer: what prints the text.
    """
    thinking = answering = False
    try:
        for piece in stream:
            if piece.thinking:
                thinking = True
                click.echo(dim(harmless(piece)), err=True, nl=False)
                continue
            if thinking:
                thinking = False
                click.echo(err=True)
            answering = True
            printer.write(piece)
    except BaseException:  # what follows begins a line of its own
        if thinking:
            click.echo(err=True)
        elif answering:
            printer.end()
        raise
    if thinking:
        click.echo(err=True)
    printer.end()
    answer = stream.answer
    seconds, rate = answer.timings.ttft_ms / 1000, answer.timings.decode_tokens_per_s
    speed = translated(
        f"first token {seconds:.2f} s · {rate:.1f} tokens/s",
        f"首字 {seconds:.2f} 秒 · {rate:.1f} 词元/秒",
    )
    cut = translated(" · cut off at the token limit", " · 已达长度上限")
    note(speed + cut * (answer.finish_reason == "length"))
    return answer
