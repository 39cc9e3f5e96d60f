"""A program on a pseudo-terminal, and what its user sees."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import nullcontext
from pathlib import Path

import pyte

#: The terminal controls the session, so that Ctrl-C becomes a signal.
START = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Screen:
    """Runs Python with ``args`` on a terminal of ``rows`` x ``columns``; close it with ``with``."""

    def __init__(
        self,
        *args: str,
        rows: int = 24,
        columns: int = 80,
        stdout: Path | None = None,
        **env: str,
    ) -> None:
        """Start it; its standard output is the terminal unless a file is given."""
        self._screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.01)
        self._stream = pyte.ByteStream(self._screen)
        self.received = b""
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        with stdout.open("wb") if stdout else nullcontext(theirs) as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, *args],
                stdin=theirs,
                stdout=output,
                stderr=theirs,
                start_new_session=True,
                env=os.environ | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"} | env,
            )
        os.close(theirs)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    @property
    def lines(self) -> list[str]:
        """All lines, those that have left the window first, without the empty ones at the end."""
        before = [
            "".join(row[column].data for column in range(self._screen.columns))
            for row in self._screen.history.top
        ]
        lines = [line.rstrip() for line in [*before, *self._screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def in_order(self) -> bool:
        """Whether the terminal shows what is typed, and takes it line by line."""
        flags = termios.tcgetattr(self._terminal)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    def styled(self, text: str) -> pyte.screens.Char:
        """Return the first character of ``text`` on the screen, with its attributes."""
        for row, line in enumerate(self._screen.display):
            if text in line:
                return self._screen.buffer[row][line.index(text)]
        raise AssertionError(f"{text!r} is not on the screen:\n{self.text}")

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def wait_for(self, text: str, times: int = 1, key: str = "") -> None:
        """Wait until ``text`` is there so many times; press ``key`` again and again until then."""
        deadline = time.monotonic() + 30
        while self.text.count(text) < times:
            assert time.monotonic() < deadline, self.text
            assert self._read(key), self.text

    def leave(self) -> int:
        """Press Ctrl-D until the program ends, read what it says, and return its exit status.

        Pressed before the program reads keys one by one, it would be lost.
        """
        deadline = time.monotonic() + 30
        while self._read("\x04"):
            assert time.monotonic() < deadline, self.text
        return self.process.wait(30)

    def _read(self, key: str) -> bool:
        """Show what comes, or press ``key`` if nothing does; False at the end."""
        if not select.select([self._terminal], [], [], 0.2)[0]:
            self.type(key)
            return True
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # it has ended
            return False
        self.received += data
        self._stream.feed(data)
        return bool(data)
