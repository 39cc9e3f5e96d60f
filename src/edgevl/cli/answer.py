"""An answer on the terminal, as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgevl.cli.terminal import chinese, dim, harmless, note

if TYPE_CHECKING:
    from edgevl.generate import Answer, Stream


def print_answer(stream: Stream, said: list[str] | None = None) -> Answer:
    """Print an answer as it comes: text on standard output, thinking dimmed on standard error.

    On a terminal a last line on standard error says how fast it was.

    Args:
        stream: the answer.
        said: receives the text printed, for a caller that outlives an interruption.
    """
    thinking = False
    for piece in stream:
        if piece.thinking:
            thinking = True
            click.echo(dim(harmless(piece)), err=True, nl=False)
            continue
        if thinking:
            thinking = False
            click.echo(err=True)
        click.echo(harmless(piece), nl=False)
        if said is not None:
            said.append(piece)
    if thinking:
        click.echo(err=True)
    click.echo()
    answer = stream.answer
    seconds, rate = answer.timings.ttft_ms / 1000, answer.timings.decode_tokens_per_s
    if chinese():
        cut = " · 已达长度上限" if answer.finish_reason == "length" else ""
        note(f"首字 {seconds:.2f} 秒 · {rate:.1f} 词元/秒{cut}")
    else:
        cut = " · cut off at the token limit" if answer.finish_reason == "length" else ""
        note(f"first token {seconds:.2f} s · {rate:.1f} tokens/s{cut}")
    return answer
