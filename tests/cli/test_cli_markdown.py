"""Markdown on a terminal while it comes."""

import io
import sys

import pyte
import pytest

from edgevl.cli.screen import MarkdownPrinter

ANSWER = """\
# 标题 Title

图中的数字是 **7305**，显示在一块很长的液晶屏上，旁边还有一些中文说明文字（包括标点）。`code` here.

1. First item with **bold** that is long enough to be wrapped in a window of forty columns
2. Second
   - nested

\\[
x_1 = \\sum_{i=1}^n a_i * b_i
\\]

So $a_{1}*b_{2}*c$ costs $5 or $10 in <box>[[1, 2, 3, 4]]</box>, see [this](http://x.y/z).

| Name | 值 |
|---|---:|
| left | 12 |
| much longer | 3 |

```python
def f(x):
    return x  # -
```

> quote

[1]: defined

Text
- end
"""

RENDERED = """\
标题 Title

图中的数字是 7305，显示在一块很长的液晶
屏上，旁边还有一些中文说明文字（包括标
点）。code here.

 1 First item with bold that is long
   enough to be wrapped in a window of
   forty columns
 2 Second
    • nested

\\[
x_1 = \\sum_{i=1}^n a_i * b_i
\\]

So $a_{1}*b_{2}*c$ costs $5 or $10 in
<box>[[1, 2, 3, 4]]</box>, see this
(http://x.y/z).

 Name         值
 ───────────────
 left         12
 much longer   3

def f(x):
    return x  # -

▌ quote

[1]: defined

Text

 • end
"""


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def show(monkeypatch):
    """Return a function (pieces, rows) -> screen with its history, and what was sent to it."""
    monkeypatch.setattr("edgevl.cli.screen.MIN_INTERVAL_S", 0)
    monkeypatch.setattr("edgevl.cli.screen.MAX_LOAD", float("inf"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(pieces, rows=60):
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("LINES", str(rows))
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        printer = MarkdownPrinter()
        for piece in pieces:
            printer.write(piece)
        printer.end()
        sent = terminal.getvalue()
        screen = pyte.HistoryScreen(40, rows, history=1000, ratio=0.01)
        pyte.Stream(screen).feed(sent.replace("\n", "\r\n"))
        return screen, sent

    return run


def lines(screen):
    rows = [*screen.history.top, *(screen.buffer[i] for i in range(screen.lines))]
    text = "\n".join("".join(row[i].data for i in range(40)).rstrip() for row in rows)
    return text.rstrip() + "\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("rows", [5, 60])
def test_it_looks_the_same_however_it_comes(show, size, rows):
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    assert lines(show(pieces, rows)[0]) == RENDERED


def test_what_has_left_the_window_is_not_printed_again(show):
    words = [f"line {i}  \n" for i in range(300)]
    screen, sent = show(words, rows=5)
    assert lines(screen) == "".join(f"line {i}\n" for i in range(300))
    assert len(sent) < 2 * len("".join(words))


def test_a_table_taller_than_the_window_has_columns_of_one_width(show):
    rows = [f"| {'x' * (i % 7)} | {i} |\n" for i in range(30)]
    pieces = ["| a | b |\n", "|---|---|\n", *rows, "\nend"]
    assert lines(show(pieces, rows=8)[0]) == lines(show(["".join(pieces)], rows=8)[0])


@pytest.mark.parametrize(
    "answer",
    [
        "> " * 30 + "deep 中文",
        "1. " * 25 + "deep 中文",
        "|" + " a |" * 60 + "\n|" + "---|" * 60 + "\n|" + " 1 |" * 60,
        "\u200b\u200d" * 50 + "a",
        "[" * 500,
        "```\n" + "x" * 500,
        "#",
        "",
    ],
)
def test_odd_answers(show, answer):
    pieces = [answer[i : i + 40] for i in range(0, len(answer), 40)]
    assert lines(show(pieces)[0]) == lines(show([answer])[0])


def test_styles(show):
    screen, _ = show(["# Title\n\nplain **bold**"])
    title, text = screen.buffer[0], screen.buffer[2]
    assert title[0].bold
    assert [text[i].bold for i in (0, 6)] == [False, True]


def test_without_colour(show, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen, _ = show(["```python\ndef f(): return 1\n```\n`code`"])
    assert {screen.buffer[row][i].fg for row in range(4) for i in range(20)} == {"default"}


@pytest.mark.parametrize(
    "attack", ["\x1b]0;evil\x07", "&#27;]0;evil&#7;", "`\x9b2J`", "[a](http://b/&#27;]0;evil)"]
)
def test_an_answer_cannot_steer_the_terminal(show, attack):
    screen, sent = show([*attack, "\n\n```\x1b[2J\n\x1b[2J\n```"])
    assert screen.title == ""
    for control in ("\x1b]", "\x1b[2J", "\x07", "\x9b"):
        assert control not in sent
