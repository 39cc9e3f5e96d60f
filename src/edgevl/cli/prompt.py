"""What is typed in a conversation: editing, history, completion."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from edgevl.cli.terminal import can_move, is_terminal

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

#: When a conversation begins with a larger history, its older half is dropped.
MAX_HISTORY_BYTES = 1 << 20


def line_reader(
    commands: Iterable[str], settings: Iterable[str], suffixes: tuple[str, ...]
) -> Callable[[], str]:
    """Return a function that reads what is typed next: a line, or several pasted or joined.

    On a terminal that can move its cursor the line is edited, with history and completion; else
    the terminal's own editing must do. The prompt goes to standard error where standard output is
    a file. The function raises EOFError at the end, and KeyboardInterrupt at Ctrl-C.

    Args:
        commands: what may begin a line, for completion.
        settings: what ``/set`` takes, for completion.
        suffixes: how names of pictures and videos end, for completion.
    """
    screen = sys.stdout if is_terminal(sys.stdout) else sys.stderr
    if not (is_terminal(sys.stdin) and can_move(screen)):
        return _read_plain
    from prompt_toolkit import PromptSession
    from prompt_toolkit.data_structures import Size
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.shortcuts import CompleteStyle

    def size() -> Size:
        found = os.get_terminal_size(screen.fileno())
        return Size(rows=found.lines or 24, columns=found.columns or 80)  # 0 on serial lines

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="… ",
        history=_history(),
        completer=_completer(sorted(commands), sorted(settings), suffixes),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        enable_suspend=True,
        key_bindings=_key_bindings(),
        # To ask where the cursor is takes a terminal that answers; serial consoles may not.
        output=Vt100_Output(screen, size, term=os.environ.get("TERM"), enable_cpr=False),
    )
    return session.prompt


@contextmanager
def keys_wait(stream: TextIO | None) -> Iterator[None]:
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


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateHistory(FileHistory):
        """Questions of all conversations; one that cannot be written is none the worse."""

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                super().store_string(string)

    path = history_file()
    return PrivateHistory(path) if path else InMemoryHistory()


def _key_bindings() -> KeyBindings:
    """Return what Enter, Alt-Enter and Ctrl-C do.

    Ctrl-J is Enter: so arrives an Enter that was pressed during an answer.
    """
    from prompt_toolkit.application import get_app
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import Condition, has_focus
    from prompt_toolkit.key_binding import KeyBindings

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


def _completer(commands: list[str], settings: list[str], suffixes: tuple[str, ...]) -> Completer:
    """Complete commands, what ``/set`` takes, and paths of directories, pictures and videos."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    def shown(name: str) -> bool:
        return name.lower().endswith(suffixes) or Path(name).is_dir()

    media, files = PathCompleter(file_filter=shown, expanduser=True), PathCompleter(expanduser=True)

    class LineCompleter(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            line = document.text_before_cursor
            name, blank, rest = line.partition(" ")
            if line and not blank:
                yield from self._words(line, commands)
            if name == "/set":
                yield from self._words(rest, settings)
            elif blank and name in ("/image", "/video", "/save"):
                yield from self._paths(files if name == "/save" else media, rest.lstrip(), event)
            elif word := document.get_word_before_cursor(WORD=True):
                yield from self._paths(media, word, event)

        def _words(self, typed: str, words: list[str]) -> Iterable[Completion]:
            for word in words:
                if word.startswith(typed):
                    yield Completion(word, -len(typed))

        def _paths(
            self, completer: Completer, typed: str, event: CompleteEvent
        ) -> Iterable[Completion]:
            for found in completer.get_completions(Document(typed), event):
                slash = "/" if found.display_text.endswith("/") else ""
                yield Completion(found.text + slash, found.start_position, found.display)

    return LineCompleter()


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
