"""The screen of a conversation: the line that is edited, the answer whose Markdown is painted."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import click
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    WordCompleter,
)
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, Paragraph
from rich.syntax import Syntax
from rich.text import Text

from edgevl.cli.terminal import Printer, harmless

#: When a conversation begins with a larger history, its older half is dropped.
MAX_HISTORY_BYTES = 1 << 20
#: Least seconds between two paintings, and the part of the time that they may take.
MIN_INTERVAL_S, MAX_LOAD = 0.05, 0.1

#: Formulas, which are left as they are: their backslashes and underscores are no Markdown.
_FORMULA = re.compile(
    r"\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]|\$\$.{1,2000}?\$\$|"
    r"\$(?=\S)[^$\n]+?(?<=\S)\$(?!\d)",
    re.DOTALL,
)
#: A last line that may yet become anything.
_MARKS = re.compile(r"(?:^|\n)[ \t]*(?:[-+*_#>`~|=:]+|\d{1,9}[.)]?)[ \t]*\Z")
#: What rich fills lines with, and its empty lines around lists and tables.
_PADDING = re.compile(r" +((?:\x1b\[0m)?)$")
_BLANK = re.compile(r"(?:\x1b\[[\d;]*m|\s)*")
#: What is not parted at the end of a line: a wide character or a run of others, and the
#: punctuation that must not begin a line.
_WORD = re.compile(
    r"\s*(?:[（《「『【“‘]*(?:[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff01-\uff60]|"
    r"[^\s\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff01-\uff60]+))"
    r"[、。，．：；？！）》」』】”’…]*"
)


def line_editor(
    screen: TextIO, commands: list[str], settings: list[str], suffixes: tuple[str, ...]
) -> Callable[[], str]:
    """Return a function that reads what is typed next, with editing, history and completion.

    Args:
        screen: the standard stream that the prompt goes to.
        commands: what may begin a line, for completion.
        settings: what ``/set`` takes, for completion.
        suffixes: how names of pictures and videos end, for completion.
    """
    output = Vt100_Output.from_pty(screen, os.environ.get("TERM"))
    # To ask where the cursor is takes a terminal that answers; serial consoles may not.
    output.enable_cpr = False
    history = history_file()
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="… ",
        history=_PrivateHistory(history) if history else InMemoryHistory(),
        completer=_LineCompleter(commands, settings, suffixes),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        enable_suspend=True,
        key_bindings=_key_bindings(),
        output=output,
    )
    return session.prompt


def history_file() -> Path | None:
    """Return the file of questions asked before, made private and brought within its bound.

    It is ``edgevl/chat_history`` in ``$XDG_STATE_HOME`` or ``~/.local/state``; None with
    ``EDGEVL_NO_HISTORY`` set, or where no such file can be written.
    """
    if os.environ.get("EDGEVL_NO_HISTORY", "0") not in ("", "0"):
        return None
    try:
        state = os.environ.get("XDG_STATE_HOME", "")
        base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
        path = base / "edgevl" / "chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "rb+") as file:
            os.fchmod(file.fileno(), 0o600)
            if file.seek(0, os.SEEK_END) > MAX_HISTORY_BYTES:
                file.seek(-MAX_HISTORY_BYTES // 2, os.SEEK_END)
                newest = file.read().partition(b"\n# ")[2]  # from the beginning of an entry
                file.truncate(0)
                file.write(b"\n# " + newest)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return path


class _PrivateHistory(FileHistory):
    """Questions of all conversations; one that cannot be written is none the worse."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def _key_bindings() -> KeyBindings:
    """Return what Enter, Alt-Enter and Ctrl-C do.

    Ctrl-J is Enter: so arrives an Enter that was pressed during an answer.
    """
    bindings = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @bindings.add("enter", filter=typing)
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter", filter=typing)
    def alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @bindings.add("c-c", filter=typing & Condition(lambda: bool(get_app().current_buffer.text)))
    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return bindings


class _LineCompleter(Completer):
    """Completes commands, what ``/set`` takes, and paths of directories, pictures and videos."""

    def __init__(self, commands: list[str], settings: list[str], suffixes: tuple[str, ...]) -> None:
        def is_media(name: str) -> bool:
            return name.lower().endswith(suffixes) or Path(name).is_dir()

        self._commands = WordCompleter(commands, sentence=True)
        self._settings = WordCompleter(settings, sentence=True)
        self._media = PathCompleter(file_filter=is_media, expanduser=True)
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        name, blank, rest = line.partition(" ")
        chosen: list[tuple[Completer, str]] = []
        if line and not blank:
            chosen.append((self._commands, line))
        if name == "/set":
            chosen.append((self._settings, rest))
        elif blank and name in ("/image", "/video", "/save"):
            chosen.append((self._files if name == "/save" else self._media, rest.lstrip()))
        elif word := document.get_word_before_cursor(WORD=True):
            chosen.append((self._media, word))
        for completer, typed in chosen:
            for found in completer.get_completions(Document(typed), event):
                slash = "/" if found.display_text.endswith("/") else ""
                yield Completion(found.text + slash, found.start_position, found.display)


class MarkdownPrinter(Printer):
    """Paints the blocks of an answer on standard output, a terminal.

    Only the last block (paragraph, list, fence, table, …), which more may come to, is ever painted
    again: from its first line that has changed on, and never lines that have left the window.
    """

    def __init__(self) -> None:
        """Begin an answer at the beginning of a line."""
        self._console = Console(file=sys.stdout, highlight=False)
        self._parser = _parser()
        self._source = ""  # of what is not finished
        self._lines = [""]  # what is painted of it; the cursor is at the end of the last one
        self._began = False
        self._next_s = 0.0

    def write(self, text: str) -> None:
        """Add to the answer, without control characters, and paint it unless it just was."""
        self._source += harmless(text)
        started = time.monotonic()
        if started >= self._next_s:
            self._paint(final=False)
            took = time.monotonic() - started
            self._next_s = started + max(MIN_INTERVAL_S, took / MAX_LOAD)

    def end(self) -> None:
        """Paint what is left, and end the last line."""
        self._paint(final=True)
        click.echo()

    def _paint(self, final: bool) -> None:
        source = self._source if final else _MARKS.sub("", self._source)
        tokens = self._parser.parse(source)
        _clean(tokens)
        starts = [i for i, token in enumerate(tokens) if token.level == 0 and token.nesting >= 0]
        lines: list[str] = []
        last = 0  # the first line of the last block
        for start, stop in pairwise([*starts, len(tokens)]):
            last = len(lines)
            if self._began or start:
                lines.append("")
            lines += self._rendered(tokens[start:stop])
        if not lines:
            return
        if not final and tokens[starts[-1]].type == "table_open":
            # Columns widen as rows come: what has left the window could not follow.
            lines = lines[: last + max(self._console.height - 1, 1)]
        self._show(lines)
        (first, _) = tokens[starts[-1]].map or (0, 0)
        rest = self._source.split("\n")[first:]
        if last and len(rest) > 1:  # a line that is not complete may yet join the block above
            self._source = "\n".join(rest)
            self._lines = self._lines[last:]
            self._began = True

    def _rendered(self, block: Sequence[Token]) -> list[str]:
        """Render a block to lines that are narrower than the window, so that none is broken."""
        with self._console.capture() as capture:
            self._console.print(_Block(block), end="", width=max(self._console.width - 1, 20))
        lines = [_PADDING.sub(r"\1", line) for line in capture.get().split("\n")]
        filled = [i for i, line in enumerate(lines) if _BLANK.fullmatch(line) is None]
        return lines[filled[0] : filled[-1] + 1] if filled else []

    def _show(self, lines: list[str]) -> None:
        """Change what is painted into ``lines``, where the window still has it."""
        old = self._lines
        pairs = enumerate(zip(old, lines, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(old), len(lines) - 1))
        first = max(first, len(old) - max(self._console.height, 1))
        new = lines[first:] or [""]
        if first == len(old):
            text = "\n" + "\n".join(new)
        elif first == len(old) - 1 and new[0].startswith(old[first]):
            text = "\n".join(new)[len(old[first]) :]
        else:
            up = len(old) - 1 - first
            text = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J" + "\n".join(new)
        click.echo(text, nl=False)
        self._lines = old[:first] + new


class _Block(Markdown):
    """Tokens of Markdown as rich renders them, with elements of our own."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        super().__init__("", hyperlinks=False)  # links show where they lead
        self.parsed = list(tokens)


class _Paragraph(Paragraph):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _Heading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _Code(CodeBlock):
    """Code without margins and background, which would be copied with it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = self.text.plain.rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", word_wrap=True)


_Block.elements = Markdown.elements | {
    "paragraph_open": _Paragraph,
    "heading_open": _Heading,
    "fence": _Code,
    "code_block": _Code,
}


def _parser() -> MarkdownIt:
    """Return a parser of what models write.

    HTML is text (boxes are written so) and so are definitions of links; pictures are links. Dashes
    below a paragraph make no heading of it, which it might be for a moment only.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    parser.disable(["image", "lheading", "reference"])
    parser.inline.ruler.before("escape", "formula", _formula)
    return parser


def _formula(state: StateInline, silent: bool) -> bool:
    found = _FORMULA.match(state.src, state.pos)
    if not found:
        return False
    if not silent:
        state.push("text", "", 0).content = found[0]
    state.pos = found.end()
    return True


def _clean(tokens: Iterable[Token]) -> None:
    """Take out control characters that were written as entities, and keep line breaks."""
    for token in tokens:
        token.content = harmless(token.content)
        token.info = harmless(token.info)
        token.attrs = {
            key: harmless(value) if isinstance(value, str) else value
            for key, value in token.attrs.items()
        }
        if token.type == "softbreak":
            token.type = "hardbreak"
        _clean(token.children or ())


def _wrapped(text: Text, width: int) -> Iterable[Text]:
    """Break text into lines of at most ``width`` cells; Chinese between any two characters."""
    text.expand_tabs(4)
    for line in text.split("\n", allow_blank=True):
        breaks: list[int] = []
        used = 0
        for match in _WORD.finditer(line.plain):
            word, start = match[0], match.start()
            if used and used + cell_len(word) > width:
                start += len(word) - len(word.lstrip())
                word = word.lstrip()
                breaks.append(start)
                used = 0
            pieces = chop_cells(word, max(width, 2)) or [word]  # [] if it fills no cell
            for piece in pieces[:-1]:
                start += len(piece)
                breaks.append(start)
            used = cell_len(pieces[-1]) + (used if len(pieces) == 1 else 0)
        for part in line.divide(breaks):
            part.rstrip()
            yield part
