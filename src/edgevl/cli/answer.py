"""An answer on the terminal, as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import click

from edgevl.cli.terminal import dim, harmless, note, translated

if TYPE_CHECKING:
    from edgevl.generate import Answer, Stream


class Printer(Protocol):
    """Puts the text of an answer on standard output."""

    def write(self, text: str) -> None:
        """Print more of it."""

    def end(self) -> None:
        """End it, and its last line."""


class PlainPrinter:
    """Prints an answer as it is."""

    def write(self, text: str) -> None:
        """Print more of it, without control characters."""
        click.echo(harmless(text), nl=False)

    def end(self) -> None:
        """End its last line."""
        click.echo()


def print_answer(stream: Stream, printer: Printer | None = None) -> Answer:
    """Print an answer as it comes: text on standard output, thinking dimmed on standard error.

    On a terminal a last line on standard error says how fast it was.

    Args:
        stream: the answer.
        printer: what prints the text; default is as it is.
    """
    printer = printer or PlainPrinter()
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
